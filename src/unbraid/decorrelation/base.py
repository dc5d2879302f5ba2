"""What every penalty on features shares: how it is called, and when it acts."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from unbraid.config import DecorrelationConfig
from unbraid.decorrelation.across import gathered
from unbraid.decorrelation.decoder_rows import require_decoder
from unbraid.decorrelation.entries import Batch, SparseCodes
from unbraid.decorrelation.gradient import attached
from unbraid.decorrelation.hinge import Evaluation
from unbraid.decorrelation.stats import DecorrelationStats
from unbraid.distributed.shard import Shard

DEFAULTS = DecorrelationConfig()


class Penalty(nn.Module, ABC):
    """A penalty to add to an SAE's loss: a scalar, unweighted by lambda2, and what was found.

    It counts calls and may act on every T-th only; in evaluation mode nothing that is remembered changes.

    Args:
        interval: act on every T-th call, the first included, with weight T; the others return zero.
        seed: of everything random.
        space: what is penalised; "codes", "decoder", or "co-active" (both).
        counts_calls: whether the number of calls matters even when interval is 1, so that it belongs to the state.

    Attributes:
        reads_codes: whether calls must bring codes; in decoder space most penalties do not look at them.
        shard: set where codes come from an SAE split by features: the slice they are of. Stats then name the pairs
            whose first feature is in it.
    """

    step: Tensor
    shard: Shard | None = None
    remembers: bool = False
    """Whether calls change more than their number."""

    def __init__(self, interval: int, seed: int, space: str, *, counts_calls: bool = False):
        super().__init__()
        self.interval, self.seed, self.space = interval, seed, space
        self.reads_codes = space != "decoder"
        self.register_buffer("step", torch.zeros((), dtype=torch.int64), persistent=counts_calls or interval > 1)

    @torch.compiler.disable
    def forward(
        self,
        f: Tensor | None = None,
        *,
        indices: Tensor | None = None,
        values: Tensor | None = None,
        n_features: int | None = None,
        codes: SparseCodes | None = None,
        decoder: Tensor | None = None,
    ) -> tuple[Tensor, DecorrelationStats]:
        """The penalty of one batch.

        Args:
            f: codes [B, N], dense or a sparse tensor, or
            indices: [B, K] feature ids with `values` [B, K] (0 is padding) and `n_features` N, or
            codes: an object with CSR `offsets`, `indices`, `values` and `n_features`.
            decoder: [N, D], a row a feature; penalties on decoder rows need it and may do without codes.

        Raises:
            CodesError: codes or decoder are missing, of the wrong shape, not finite, or negative.
        """
        batch, decoder = self._inputs(f, indices, values, n_features, codes, decoder)
        target = decoder
        if self.space == "codes":
            assert batch is not None
            target = batch.source
        assert target is not None
        acts = self._count_call()
        with torch.no_grad(), torch.autocast(target.device.type, enabled=False):
            everything = None
            if batch is not None and self.shard is not None:
                everything = gathered(batch.entries, self.shard)
            found, stats = self.find(Batch(codes=everything.entries) if everything else batch, decoder, acts)
            stats = stats if self.shard is None else stats.of(self.shard)
        if found is None or not acts:
            return attached(target, 0.0, None), stats
        gradient = found.gradient if everything is None else found.gradient[everything.own]
        if batch is not None and self.space == "codes" and gradient.shape != target.shape:
            target = batch.entries.values
        return attached(target, self.interval * found.penalty, self.interval * gradient), stats

    @torch.compiler.disable
    @torch.no_grad()
    def advance(
        self,
        f: Tensor | None = None,
        *,
        indices: Tensor | None = None,
        values: Tensor | None = None,
        n_features: int | None = None,
        codes: SparseCodes | None = None,
        decoder: Tensor | None = None,
    ) -> None:
        """A call whose penalty nobody asks for: what is remembered ends as after `forward`, without the cost of R.

        Arguments and errors are those of `forward`.
        """
        acts = self._count_call()
        if not (self.remembers and self.training):
            return
        batch, decoder = self._inputs(f, indices, values, n_features, codes, decoder)
        if batch is not None and self.shard is not None:
            batch = Batch(codes=gathered(batch.entries, self.shard).entries)
        source = decoder if batch is None else batch.source
        assert source is not None
        with torch.autocast(source.device.type, enabled=False):
            self.remember(batch, decoder, acts)

    def _inputs(
        self,
        f: Tensor | None,
        indices: Tensor | None,
        values: Tensor | None,
        n_features: int | None,
        codes: SparseCodes | None,
        decoder: Tensor | None,
    ) -> tuple[Batch | None, Tensor | None]:
        batch = Batch(f, indices, values, n_features, codes) if self.reads_codes else None
        if self.space != "codes":
            decoder = require_decoder(decoder, batch.n_features if batch else None)
        return batch, decoder

    def _count_call(self) -> bool:
        """Whether this call penalises."""
        acts = int(self.step) % self.interval == 0
        if self.training:
            self.step += 1
        return acts

    def remember(self, batch: Batch | None, decoder: Tensor | None, acts: bool) -> None:
        """What `find` does to the state, for penalties whose `remembers` is true."""

    @abstractmethod
    def find(
        self, batch: Batch | None, decoder: Tensor | None, acts: bool
    ) -> tuple[Evaluation | None, DecorrelationStats]:
        """Value and gradient, if there is something to penalise on this call, and the stats."""
