"""Published dictionaries in inference form only: what no architecture that unbraid trains computes.

They differ in the norm taken of every token first, in which codes are kept, and in whether they reconstruct what they
read or something else. The formulas are those of the libraries they come from, so that codes are equal to theirs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unbraid.distributed.shard import Shard
from unbraid.errors import CodesError
from unbraid.sae import SAE

LAYER_NORM_EPSILON = 1e-5
TokenNorm = Literal["none", "constant_norm_rescale", "layer_norm"]


@dataclass(frozen=True)
class Form:
    """How an imported dictionary computes its codes and its output.

    Attributes:
        activation: a key of `ACTIVATIONS`, or "matching_pursuit".
        k: how many codes topk and abstopk keep; how many groups groupmax has.
        token_norm: what every token is divided by before anything else, and multiplied with at the end.
        subtracts_b_dec: whether the encoder reads x - b_dec.
        transcoder: whether it predicts something other than what it reads.
        residual_threshold: matching pursuit ends for a token whose residual has a smaller norm.
        max_iterations: steps of matching pursuit; D where it is None.
        stop_on_duplicate_support: matching pursuit ends for a token that gains no new feature.
    """

    activation: str
    k: int | None = None
    token_norm: TokenNorm = "none"
    subtracts_b_dec: bool = True
    transcoder: bool = False
    residual_threshold: float = 0.01
    max_iterations: int | None = None
    stop_on_duplicate_support: bool = True


class TokenScale(NamedTuple):
    """What a token's norm took away: y = y_normalised * factor + offset."""

    factor: Tensor
    offset: Tensor | float


class ImportedSAE(SAE):
    """A dictionary that can be used but not trained.

    With a norm per token, `decode` needs to know the tokens: it takes them from the last `encode`, or as its second
    argument. `forward` adds the skip connection of a transcoder that has one; `decode` does not.

    Attributes:
        form: how it computes.
        encoder_ND, b_enc, W_dec, b_dec: as in every SAE; the decoder is `[N, M]` for an output of M numbers.
        threshold, b_gate, b_mag, r_mag, selection: `[N]`, where the form has them; topk ranks `pre * selection`.
        W_skip: `[D, M]`, where a transcoder has a skip connection.
        glu_ND, b_glu: the gate that a gated linear unit multiplies pre-activations with, sigmoid(x glu^T + b_glu).
    """

    threshold: Tensor
    b_gate: Tensor
    b_mag: Tensor
    r_mag: Tensor
    selection: Tensor | None
    glu_ND: Tensor | None
    b_glu: Tensor | None
    OPTIONAL: ClassVar[tuple[str, ...]] = ("b_enc", "threshold", "b_gate", "b_mag", "r_mag", "selection", "W_skip")

    def __init__(self, name: str, form: Form, tensors: dict[str, Tensor]):
        nn.Module.__init__(self)
        self.form = form
        self._name = name
        self.W_dec = nn.Parameter(tensors["W_dec"])
        self.encoder_ND = nn.Parameter(tensors["W_enc"].T.contiguous())
        self.b_dec = nn.Parameter(tensors["b_dec"])
        for key in self.OPTIONAL:
            self.register_parameter(key, nn.Parameter(tensors[key]) if key in tensors else None)
        glu = tensors.get("W_glu")
        self.register_parameter("glu_ND", None if glu is None else nn.Parameter(glu.T.contiguous()))
        self.register_parameter("b_glu", None if glu is None else nn.Parameter(tensors["b_glu"]))
        self.n_features, self.d_in = self.encoder_ND.shape
        self.shard, self.is_transcoder = Shard(self.n_features), form.transcoder
        self.metadata: dict[str, Any] = {}
        self._scale: TokenScale | None = None

    @property
    def architecture(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The name under which the layout knows it."""
        return self._name

    @property
    def k(self) -> int | None:
        """How many codes a token has, where that is fixed."""
        return self.form.k

    def preactivations(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows N"]:
        """What the activation is applied to, from raw activations."""
        return self._preactivations(self._normalised(x)[0])

    def encode(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows N"]:
        """Codes of raw activations; abstopk's are signed."""
        z, self._scale = self._normalised(x)
        if self.form.activation == "matching_pursuit":
            return self._matching_pursuit(z)
        return ACTIVATIONS[self.form.activation](self, self._preactivations(z))

    def decode(
        self, f: Float[Tensor, "*rows N"], x: Float[Tensor, "*rows D"] | None = None
    ) -> Float[Tensor, "*rows M"]:
        """Output from codes.

        Args:
            f: codes.
            x: the tokens they belong to; those of the last `encode` by default. Only needed with a norm per token.

        Raises:
            CodesError: a norm per token was taken, and the tokens are not known.
        """
        y = self.require_codes(f) @ self.W_dec + self.b_dec
        if self.form.token_norm == "none":
            return y
        scale = self._scale if x is None else self._normalised(x)[1]
        if scale is None or scale.factor.shape[:-1] != f.shape[:-1]:
            raise CodesError(
                f"codes of shape {list(f.shape)} are not those of the rows encoded last; this SAE takes the norm of "
                "every token (normalize_activations), so expected codes of the same rows; call decode(f, x)"
            )
        return y * scale.factor + scale.offset

    def forward(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows M"]:
        """Output from raw activations, the skip connection included."""
        y = self.decode(self.encode(x), x)
        return y if self.W_skip is None else y + x @ self.W_skip

    def training_forward(self, *_: Any, **__: Any) -> Any:
        """Imported dictionaries are not trained.

        Raises:
            CodesError: always.
        """
        raise CodesError(f"{self.architecture} dictionaries from elsewhere can be used but not trained; train a topk")

    def _normalised(self, x: Tensor) -> tuple[Tensor, TokenScale | None]:
        x = self.require_activations(x)
        if self.form.token_norm == "constant_norm_rescale":
            factor = x.norm(dim=-1, keepdim=True) / self.d_in**0.5
            return x / factor, TokenScale(factor, 0.0)
        if self.form.token_norm == "layer_norm":
            mean = x.mean(-1, keepdim=True)
            deviation = (x - mean).std(-1, keepdim=True)
            return (x - mean) / (deviation + LAYER_NORM_EPSILON), TokenScale(deviation, mean)
        return x, None

    def _preactivations(self, z: Tensor) -> Tensor:
        if self.form.subtracts_b_dec:
            z = z - self.b_dec
        pre = nn.functional.linear(z, self.encoder_ND, self.b_enc)
        return pre if self.glu_ND is None else pre * nn.functional.linear(z, self.glu_ND, self.b_glu).sigmoid()

    def _matching_pursuit(self, z: Tensor) -> Tensor:
        """Greedy steps: the feature closest to what is left explains its share of it."""
        residual = (z - self.b_dec).reshape(-1, self.d_in)
        f = residual.new_zeros(len(residual), self.n_features)
        going = torch.ones(len(residual), dtype=torch.bool, device=z.device)
        for _ in range(self.form.max_iterations or self.d_in):
            if not going.any():
                break
            value, feature = (residual @ self.W_dec.T).max(-1, keepdim=True)
            value = value.relu() * going.unsqueeze(1)
            known = f.gather(1, feature) != 0
            f.scatter_add_(1, feature, value)
            residual = residual - value * self.W_dec[feature.squeeze(1)]
            if self.form.stop_on_duplicate_support:
                going = going & ~(known | (value == 0)).squeeze(1)
            going = going & (residual.norm(dim=-1) >= self.form.residual_threshold)
        return f.reshape(*z.shape[:-1], self.n_features)


def _relu(_: ImportedSAE, pre: Tensor) -> Tensor:
    return pre.relu()


def _jumprelu(sae: ImportedSAE, pre: Tensor) -> Tensor:
    return pre.relu() * (pre > sae.threshold)


def _topk(sae: ImportedSAE, pre: Tensor) -> Tensor:
    ranked = pre if sae.selection is None else pre * sae.selection
    chosen = ranked.topk(sae.form.k, dim=-1, sorted=False).indices  # pyright: ignore[reportArgumentType]
    return torch.zeros_like(pre).scatter(-1, chosen, pre.gather(-1, chosen).relu())


def _abstopk(sae: ImportedSAE, pre: Tensor) -> Tensor:
    chosen = pre.abs().topk(sae.form.k, dim=-1, sorted=False).indices  # pyright: ignore[reportArgumentType]
    return torch.zeros_like(pre).scatter(-1, chosen, pre.gather(-1, chosen))


def _groupmax(sae: ImportedSAE, pre: Tensor) -> Tensor:
    """The largest of each of k runs of consecutive features."""
    grouped = pre.relu().unflatten(-1, (sae.form.k, -1))  # pyright: ignore[reportArgumentType]
    values, places = grouped.max(-1, keepdim=True)
    return torch.zeros_like(grouped).scatter(-1, places, values).flatten(-2)


def _gated(sae: ImportedSAE, pre: Tensor) -> Tensor:
    return (pre * sae.r_mag.exp() + sae.b_mag).relu() * (pre > -sae.b_gate)  # pyright: ignore


ACTIVATIONS: dict[str, Callable[[ImportedSAE, Tensor], Tensor]] = {
    "relu": _relu,
    "jumprelu": _jumprelu,
    "topk": _topk,
    "abstopk": _abstopk,
    "groupmax": _groupmax,
    "gated": _gated,
}
