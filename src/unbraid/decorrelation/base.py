"""What every penalty on features shares: how it is called, when it acts, and how its gradient enters autograd.

A gradient worked out by hand enters as one node: nothing of a selection is recorded, the gradient exists once and
reaches only what it belongs to. Codes are checked here, once, and nowhere behind it.

Codes of an SAE that is split by features over ranks are brought together on every one of them. What travels is what
fires: of each active entry its feature and its value, and how many there are a row. Every rank then knows all codes; it
looks for pairs whose lower feature is its own, so the slices share out the co-activations and no pair is looked at
twice. Where decoder rows are compared, all of them are brought together in the same way.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from unbraid.config import DecorrelationConfig
from unbraid.decorrelation.decoder_rows import require_decoder
from unbraid.decorrelation.selection import Evaluation
from unbraid.decorrelation.stats import DecorrelationStats
from unbraid.distributed.shard import Shard
from unbraid.errors import CodesError, ConfigError
from unbraid.kernels.codes import Codes, positive_entries, require_codes, require_matrix
from unbraid.kernels.host import WithHostBuffers


class Penalty(WithHostBuffers, ABC):
    """A penalty to add to an SAE's loss: a scalar, unweighted by lambda2, and what was found.

    It counts calls and may act on every T-th only; in evaluation mode nothing that is remembered changes.

    Args:
        interval: act on every T-th call, the first included, with weight T; the others return zero.
        seed: of everything random.
        space: what is penalised; "codes", "decoder", or "co-active" (both).
        counts_calls: whether the number of calls matters even when interval is 1, so that it belongs to the state.

    Attributes:
        reads_codes: whether calls must bring codes; in decoder space most penalties do not look at them.
        remembers: whether calls change more than their number.
        shard: set where codes come from an SAE split by features: the slice they are of. Stats then name the pairs
            whose first feature is in it.
    """

    settings: ClassVar[type[DecorrelationConfig]]
    """The settings this penalty reads."""
    step: Tensor
    on_host = ("step",)
    remembers: bool = False
    shard: Shard | None = None

    def __init__(self, interval: int, seed: int, space: str, *, counts_calls: bool = False):
        super().__init__()
        self.interval, self.seed, self.space = interval, seed, space
        self.reads_codes = space != "decoder"
        self.register_buffer("step", torch.zeros((), dtype=torch.int64), persistent=counts_calls or interval > 1)

    def forward(
        self,
        f: Tensor | None = None,
        *,
        indices: Tensor | None = None,
        values: Tensor | None = None,
        n_features: int | None = None,
        codes: Codes | Any = None,
        decoder: Tensor | None = None,
    ) -> tuple[Tensor, DecorrelationStats]:
        """The penalty of one batch.

        Args:
            f: codes [B, N], dense or a sparse tensor, or
            indices: [B, K] feature ids with `values` [B, K] (0 is padding; a feature named twice in a row counts with
                its sum) and `n_features` N, or
            codes: `Codes`, or any object with its `offsets`, `indices`, `values` and `n_features`.
            decoder: [N, D], one row per feature; penalties on decoder rows need it and may do without codes.

        Raises:
            CodesError: codes or decoder are missing, of the wrong shape, not finite, or negative.
        """
        if torch.compiler.is_compiling():  # A decorator would import the compiler with this module.
            run: Any = torch.compiler.disable(type(self).forward)
            return run(self, f, indices=indices, values=values, n_features=n_features, codes=codes, decoder=decoder)
        given = self._given(f, indices, values, n_features, codes)
        target = self._target(given, decoder)
        acts = self._count_call()
        if not acts and not self.remembers:
            return attached(target, 0.0, None), DecorrelationStats("skipped", refreshed=False, penalised=False)
        if isinstance(given, Tensor) and (self.shard is not None or not self.takes_dense(given)):
            given = positive_entries(given if self.space == "codes" else given.detach())
            target = given.values if self.space == "codes" else target
        own = None
        with torch.no_grad(), torch.autocast(target.device.type, enabled=False):
            if isinstance(given, Codes) and self.shard is not None:
                given, own = gathered(given, self.shard)
            if self.shard is not None and self.space != "codes":
                decoder, own = self._all_rows(decoder, acts), slice(self.shard.start, self.shard.end)
            found, stats = self.find(given, decoder, acts)
            stats = stats if self.shard is None else stats.of(self.shard)
        if found is None:
            return attached(target, 0.0, None), stats
        gradient = found.gradient if own is None else found.gradient[own]
        return attached(target, self.interval * found.penalty, self.interval * gradient), stats

    @torch.no_grad()
    def advance(
        self,
        f: Tensor | None = None,
        *,
        indices: Tensor | None = None,
        values: Tensor | None = None,
        n_features: int | None = None,
        codes: Codes | Any = None,
        decoder: Tensor | None = None,
    ) -> None:
        """A call whose penalty nobody asks for: what is remembered ends as after `forward`, without the cost of R.

        Arguments and errors are those of `forward`.
        """
        acts = self._count_call()
        if not (self.remembers and self.training):
            return
        given = self._given(f, indices, values, n_features, codes)
        target = self._target(given, decoder)
        if isinstance(given, Tensor) and (self.shard is not None or not self.takes_dense(given)):
            given = positive_entries(given)
        if isinstance(given, Codes) and self.shard is not None:
            given, _ = gathered(given, self.shard)
        if self.shard is not None and self.space != "codes":
            decoder = self._all_rows(decoder, acts)
        with torch.autocast(target.device.type, enabled=False):
            self.remember(given, decoder, acts)

    @classmethod
    @abstractmethod
    def from_settings(cls, config: Any, seed: int) -> "Penalty":
        """The penalty its settings describe.

        Args:
            config: of the class `settings`.
            seed: of everything random.
        """

    def takes_dense(self, f_BN: Tensor) -> bool:
        """Whether these dense codes are looked at as they are, not as the list of their active entries."""
        return False

    @abstractmethod
    def find(
        self, codes: Codes | Tensor | None, decoder: Tensor | None, acts: bool
    ) -> tuple[Evaluation | None, DecorrelationStats]:
        """Value and gradient, if there is something to penalise on this call, and the stats.

        Called with dense codes only where `takes_dense` says so, and where nothing is remembered only when `acts`.
        """

    def remember(self, codes: Codes | Tensor | None, decoder: Tensor | None, acts: bool) -> None:
        """What `find` does to the state, for penalties that remember."""

    def _given(self, *forms: Any) -> Codes | Tensor | None:
        """The codes of a call, if this penalty looks at any; those with padding come from an encoder, and are codes."""
        if not self.reads_codes:
            return None
        codes = forms[-1]
        if isinstance(codes, Codes) and codes.padded:
            return codes if self.takes_padding else codes.without_padding()
        return codes_of(*forms)

    @property
    def takes_padding(self) -> bool:
        """Whether zeros may stand among the codes; decoder space only counts who fires."""
        return self.space == "decoder"

    def _target(self, codes: Codes | Tensor | None, decoder: Tensor | None) -> Tensor:
        """What the gradient belongs to."""
        source = codes.values if isinstance(codes, Codes) else codes
        if self.space == "codes":
            assert source is not None
            return source
        width = codes.n_features if isinstance(codes, Codes) else codes.shape[1] if codes is not None else None
        return require_decoder(decoder, width, None if source is None else source.device)

    def split(self, shard: Shard) -> None:
        """From now on codes and decoder rows are those of one slice of the features."""
        self.shard = shard

    def _all_rows(self, decoder: Tensor | None, acts: bool) -> Tensor | None:
        """Decoder rows of all ranks, where they are looked at."""
        assert self.shard is not None and decoder is not None
        if self.space == "decoder" and not acts:
            return None
        return torch.cat(self.shard.ranks.gather_ragged(decoder.detach().flatten())).view(-1, decoder.shape[1])

    def _count_call(self) -> bool:
        """Whether this call penalises."""
        acts = int(self.step) % self.interval == 0
        if self.training:
            self.step += 1
        return acts


def codes_of(
    f: Tensor | None,
    indices: Tensor | None,
    values: Tensor | None,
    n_features: int | None,
    codes: Codes | Any,
) -> Codes | Tensor:
    """The codes of a call, checked: a dense tensor as it is, every other form as `Codes`.

    Raises:
        CodesError: no or several forms of codes were passed, or they are not codes.
    """
    forms = sum((f is not None, indices is not None or values is not None, codes is not None))
    if forms != 1:
        raise CodesError(
            f"{forms} forms of codes were passed; expected exactly one: dense codes, indices= with values= and "
            "n_features=, or codes="
        )
    if codes is not None:
        if isinstance(codes, Codes):
            require_codes(codes.values)
            return codes
        parts: list[Any] = [getattr(codes, name, None) for name in ("offsets", "indices", "values", "n_features")]
        if any(part is None for part in parts):
            raise CodesError(
                f"codes= is a {type(codes).__name__}; expected an object with offsets, indices, values and n_features; "
                "pass dense codes as the first argument"
            )
        return Codes(*parts)
    if f is None:
        if indices is None or values is None or n_features is None:
            raise CodesError("indices, values and n_features belong together, and one is missing; pass all three")
        require_matrix(values, "values", "[B, K]")
        require_codes(values)
        return Codes.from_topk(indices, values, n_features)
    require_matrix(f, "codes", "[B, N]")
    if f.layout == torch.strided:
        require_codes(f)
        return f
    coordinates = f.to_sparse_coo().coalesce()
    require_codes(coordinates.values())
    kept = (coordinates.values() > 0).nonzero().squeeze(1)
    rows, features = coordinates.indices()[:, kept]
    return Codes.from_rows(rows, features, coordinates.values()[kept], *f.shape)


class _KnownGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: Tensor, value: float, gradient: Tensor | None) -> Tensor:
        ctx.gradient = gradient
        dtype = torch.promote_types(source.dtype, torch.float32)
        return torch.full((), value, dtype=dtype, device=source.device)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, None, None]:
        gradient = ctx.gradient
        return None if gradient is None else gradient * grad_outputs[0].to(gradient.dtype), None, None


def attached(source: Tensor, value: float, gradient: Tensor | None) -> Tensor:
    """A scalar that is `value` and whose gradient with respect to `source` is `gradient` (none: zero).

    Differentiable once. At least float32, whatever the codes are.
    """
    gradient = None if gradient is None else gradient.to(source.dtype)
    return _KnownGradient.apply(source, float(value), gradient)  # pyright: ignore[reportReturnType]


def gathered(codes: Codes, shard: Shard) -> tuple[Codes, Tensor]:
    """All codes [B, N] from each rank's slice [B, n], without a graph, and which of the entries are this rank's.

    Slices are contiguous, so rows stay sorted by feature.
    """
    values = codes.values.detach()
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    counts_B = codes.offsets.diff()
    message = torch.cat([counts_B.int(), (codes.indices + shard.start).int(), values.view(torch.int32)])
    messages = shard.ranks.gather_ragged(message)
    n_rows, words = codes.n_rows, values.element_size() // 4
    counts_RB = torch.stack([message[:n_rows] for message in messages]).long()
    ends_BR = counts_RB.T.reshape(-1).cumsum(0).view(n_rows, -1)
    all_rows = torch.repeat_interleave(torch.arange(n_rows, device=values.device), counts_RB.sum(0))
    all_indices, all_values = torch.empty_like(all_rows), values.new_empty(all_rows.numel())
    own = all_rows
    for rank, (message, counts_B) in enumerate(zip(messages, counts_RB, strict=True)):
        places = torch.arange(int(counts_B.sum()), device=values.device)
        places += torch.repeat_interleave(ends_BR[:, rank] - counts_B.cumsum(0), counts_B)
        all_indices[places] = message[n_rows : n_rows + places.numel()].long()
        # Copied, because a view as wider numbers must start at a multiple of their size.
        all_values[places] = message[n_rows + places.numel() :][: words * places.numel()].clone().view(values.dtype)
        own = places if rank == shard.ranks.rank else own
    return Codes.from_rows(all_rows, all_indices, all_values, n_rows, shard.n_features), own


ClassT = TypeVar("ClassT", bound=type[Penalty])


def register(penalty: ClassT) -> ClassT:
    """Make a penalty known under the default of its settings' `method`, here or from a user's module.

    Raises:
        ConfigError: the class names no settings of its own, or the name is taken.
    """
    settings = vars(penalty).get("settings")
    if not (isinstance(settings, type) and issubclass(settings, DecorrelationConfig)):
        raise ConfigError(
            f"{penalty.__qualname__}.settings is {settings!r}; expected a subclass of DecorrelationConfig of its own"
        )
    DecorrelationConfig.registry.add(settings.model_fields["method"].default, penalty)
    return penalty
