"""Base class of every architecture: weights, encode/decode interface and training forward pass.

An architecture is one small class that says how pre-activations become codes, once for inference (`encode`: each row
independently, any leading dimensions) and once for training, where a whole batch is known. Training makes one big
product, the pre-activations, without a graph, and then goes one of two ways to the same weights: *sparse*, touching
active entries only, or *dense*, which is faster while a large share of the features is active. The encoder is stored
as rows, one per feature, like the decoder, so that both gradients are built feature by feature by the same code.

In training an SAE may be split by features over ranks: each holds a slice and gets the same batch, the parts of the
reconstruction and of the losses are summed, and every gradient but b_dec's is complete where its feature lives.
"""

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from unbraid.config import SAEConfig, WithKConfig
from unbraid.distributed.ranks import summed
from unbraid.distributed.shard import Shard
from unbraid.errors import ActivationError, CodesError
from unbraid.kernels import workspace
from unbraid.kernels.autograd import active_entries, decode
from unbraid.kernels.codes import Codes
from unbraid.kernels.dense import SlabGradient, dense_autoencode
from unbraid.kernels.host import WithHostBuffers
from unbraid.sae.dead import pull_to_threshold

Path = Literal["dense", "sparse"]

SPARSE_BELOW = {"cpu": 0.05, "cuda": 0.01}
"""Share of active entries below which the sparse path is faster: measured on a CPU, an estimate for GPUs."""
ROWS_DRAWN = 1 << 16
"""Rows of first weights drawn at a time, so that a rank never holds those of the others."""


@dataclass
class Forward:
    """What a training step needs from one pass over a batch.

    Attributes:
        x_hat_BD: reconstruction.
        codes: `Codes` on the sparse path, a dense `[B, N]` tensor on the dense one; carries gradients.
        reconstruction: mean over tokens of ||x - x_hat||^2.
        sparsity: to be weighted by lambda1; zero where sparsity is structural (top-k family).
        auxiliary: further losses, already weighted.
        path: which of the two equivalent computations ran.
        revived: dead features that the auxiliary loss looked at, on this rank.
    """

    x_hat_BD: Tensor
    codes: Codes | Tensor
    reconstruction: Tensor
    sparsity: Tensor
    auxiliary: Tensor
    path: Path
    revived: int = 0


class Encoded(NamedTuple):
    """What an architecture makes of a batch's pre-activations.

    Attributes:
        codes: sparse or dense, with a graph.
        parts_BGD: each feature group's share of the reconstruction, without b_dec.
        sparsity: to be weighted by lambda1.
        extra: a loss of the architecture's own, or zero.
    """

    codes: Codes | Tensor
    parts_BGD: Tensor
    sparsity: Tensor
    extra: Tensor


class SAE(WithHostBuffers):
    """Base of every architecture: x -> f = encode(x) -> x_hat = f W_dec + b_dec.

    Attributes:
        encoder_ND: encoder, one row per feature; `W_enc` is its transpose.
        b_enc: `[N]` (gated has b_gate and b_mag instead).
        W_dec: `[N, D]`, rows of unit L2 norm.
        b_dec: `[D]`, subtracted before the encoder, added after the decoder.
        shard: the features held here; `n_features` counts these, `config.n_features` all.
        metadata: what the folder it was loaded from knows, under SAELens' names: model_name, hook_name, ...
    """

    settings: ClassVar[type[SAEConfig]]
    """The settings this architecture reads."""
    config: SAEConfig
    threshold_kind: ClassVar[Literal["none", "shared", "per_feature"]] = "none"
    """Whether inference compares pre-activations with `threshold`: one for all features, or one each."""
    can_be_split: ClassVar[bool] = True
    """Whether its features may be divided among ranks."""
    written_as: ClassVar[dict[str, str]] = {"sae_lens": "standard", "dictionary_learning": "AutoEncoder"}
    """Layout -> the architecture of that layout which has this one's inference form; others cannot hold it."""
    shared: ClassVar[tuple[str, ...]] = ("b_dec",)
    """Parameters every rank of a split SAE holds; their gradients are summed over the ranks."""
    training_buffers: ClassVar[tuple[str, ...]] = ()
    """Buffers that training goes on from and a trained SAE has no use for; `state_dict` leaves them out."""
    scaled_with_input: ClassVar[tuple[str, ...]] = ("b_enc",)
    """Parameters and buffers in units of pre-activations, which `fold` divides."""

    def __init__(self, config: SAEConfig, d_in: int, generator: torch.Generator, shard: Shard):
        super().__init__()
        self.config = config
        self.metadata: dict[str, Any] = {}
        self.d_in = d_in
        self.shard = shard
        self.n_features = shard.width
        W_dec = random_unit_rows(shard, d_in, generator)
        self.encoder_ND = nn.Parameter(W_dec * (config.decoder_init_norm or self.initial_encoder_norm()))
        self.W_dec = nn.Parameter(W_dec)
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.add_biases()

    def initial_share(self) -> float:
        """Share of the features that are active on a row before the first step: those with a positive product."""
        return 0.5

    def initial_encoder_norm(self) -> float:
        """The multiple c of random unit rows with which c * sum_n f_n w_n comes closest to x.

        With f from unit rows, E<x, x_hat> = s ||x||^2 and E||x_hat||^2 = (s + s^2) ||x||^2 for s = E||f||^2 / ||x||^2,
        so c = 1 / (1 + s). On random rows pre-activations are normal with variance ||x||^2 / D, and a share p of N, the
        largest, is active: E[z^2 | z > t] = 1 + t pdf(t) / p with P(z > t) = p.
        """
        share, normal = self.initial_share(), NormalDist()
        cut = normal.inv_cdf(1 - share)
        s = self.config.n_features * (share + cut * normal.pdf(cut)) / self.d_in
        return 1 / (1 + s)

    @property
    def d_out(self) -> int:
        """Width of what is predicted: that of what is read, but for imported transcoders."""
        return self.d_in

    @property
    def k(self) -> int | None:
        """Active features per token, where the architecture fixes them."""
        return self.config.k if isinstance(self.config, WithKConfig) else None

    def __repr__(self) -> str:
        """Architecture, widths and k, and what is known of the model, the site and the training."""
        reads = self.metadata.get("hook_name")
        writes = self.metadata.get("hook_name_out")
        known = {
            "N": self.n_features,
            "D": self.d_in,
            "M": self.d_out if self.d_out != self.d_in else None,
            "k": self.k,
            "site": f"{reads} -> {writes}" if writes else reads,
            "model": self.metadata.get("model_name"),
            "trained_tokens": self.metadata.get("training_tokens"),
        }
        shown = ", ".join(f"{name}={value}" for name, value in known.items() if value is not None)
        return f"{type(self).__name__}({self.architecture}, {shown})"

    def add_biases(self) -> None:
        """Register what stands between the product and the codes."""
        self.b_enc = nn.Parameter(torch.zeros(self.n_features))

    @property
    def architecture(self) -> str:
        """The name it is registered under."""
        return self.config.kind

    @property
    def W_enc(self) -> Float[Tensor, "D N"]:
        """The encoder as [D, N], the orientation SAELens uses."""
        return self.encoder_ND.T

    def preactivations(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows N"]:
        """(x - b_dec) W_enc + b_enc."""
        return F.linear(self.centred(x), self.encoder_ND, self.b_enc)

    def centred(self, x: Tensor) -> Tensor:
        """x - b_dec, in the weights' dtype."""
        return self.require_activations(x).to(self.b_dec.dtype) - self.b_dec

    def require_activations(self, x: Tensor) -> Tensor:
        """`x`; raises `ActivationError` unless it is `[..., D]`."""
        if x.ndim == 0 or x.shape[-1] != self.d_in:
            raise ActivationError(
                f"activations have shape {tuple(x.shape)}; expected [..., {self.d_in}], as wide as the SAE reads; "
                "check the site they come from"
            )
        return x

    def require_codes(self, f: Tensor) -> Tensor:
        """`f`; raises `CodesError` unless it is `[..., N]`."""
        if f.ndim == 0 or f.shape[-1] != self.n_features:
            raise CodesError(
                f"codes have shape {tuple(f.shape)}; expected [..., {self.n_features}], a number for each feature; "
                "pass what this SAE's encode returned"
            )
        return f

    def encode(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows N"]:
        """Codes of raw activations, in inference form: each row independent of the others."""
        return self.preactivations(x).relu()

    def decode(self, f: Float[Tensor, "*rows N"]) -> Float[Tensor, "*rows D"]:
        """Reconstruction from codes.

        Raises:
            CodesError: they are not N wide.
        """
        return self.require_codes(f) @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
        """Reconstruction of raw activations, in inference form."""
        return self.decode(self.encode(x))

    def training_forward(
        self,
        x_BD: Tensor,
        dead_N: Bool[Tensor, " N"] | None = None,
        generator: torch.Generator | None = None,
        path: Literal["auto", "dense", "sparse"] = "auto",
    ) -> Forward:
        """One training pass over a batch.

        Args:
            x_BD: `[B, D]`, activations without their mean, scaled so that E||x||^2 = 1.
            dead_N: features that have not fired for long, to be revived by the auxiliary loss.
            generator: chance for architectures that use it (denoising).
            path: force one of the two computations; auto takes the faster one at this batch's density.

        Raises:
            ActivationError: the batch is empty or not `[B, D]`.
        """
        if x_BD.ndim != 2 or x_BD.shape[1] != self.d_in or len(x_BD) == 0:
            raise ActivationError(
                f"a training batch has shape {tuple(x_BD.shape)}; expected [B, {self.d_in}] with B >= 1; check the site"
            )
        seen_BD = self.corrupted(x_BD, generator)
        centred_BD, pre_BN = self.product(seen_BD)
        if path == "auto":
            path = "sparse" if self.density(pre_BN) < SPARSE_BELOW.get(x_BD.device.type, 0.0) else "dense"
        with torch.autocast(x_BD.device.type, enabled=False):
            encode = self.encode_sparse if path == "sparse" else self.encode_dense
            encoded = encode(x_BD, seen_BD, centred_BD, pre_BN)
            del pre_BN
            parts_BGD = summed(encoded.parts_BGD, self.shard.ranks)
            # Every rank adds b_dec to the sum, so its gradient must come from one of them.
            b_dec = self.b_dec if self.shard.ranks.first else self.b_dec.detach()
            x_hat_BD, inner = self.reconstructions(parts_BGD, b_dec)
            reconstruction = squared_error(x_BD, x_hat_BD)
            inner_losses = [weight * squared_error(x_BD, inner_BD) for weight, inner_BD in inner]
        auxiliary = encoded.extra + sum(inner_losses)
        revived = 0
        if dead_N is not None and self.config.revival_weight > 0:
            dead = dead_N.nonzero().squeeze(1)
            revived = len(dead)
            if self.shard.ranks.any(revived > 0):
                auxiliary = auxiliary + self.revival(seen_BD, (x_BD - x_hat_BD).detach(), dead)
        sparsity = summed(encoded.sparsity, self.shard.ranks)
        return Forward(x_hat_BD, encoded.codes, reconstruction, sparsity, auxiliary, path, revived)

    def corrupted(self, x_BD: Tensor, generator: torch.Generator | None) -> Tensor:
        """What the encoder sees of a batch: the batch."""
        return x_BD

    @torch.no_grad()
    def product(self, seen_BD: Tensor) -> tuple[Tensor, Tensor]:
        """x - b_dec and the pre-activations, without a graph; on a CPU in memory to be given back to `workspace`."""
        centred_BD = seen_BD - self.b_dec
        bias_N = self.product_bias()
        if seen_BD.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return centred_BD, F.linear(centred_BD, self.encoder_ND, bias_N)
        pre_BN = workspace.take(len(seen_BD), self.n_features, self.encoder_ND.dtype)
        if bias_N is None:
            return centred_BD, torch.mm(centred_BD, self.encoder_ND.T, out=pre_BN)
        return centred_BD, torch.addmm(bias_N, centred_BD, self.encoder_ND.T, out=pre_BN)

    def product_bias(self) -> Tensor | None:
        """What is added to the product before selecting."""
        return self.b_enc

    def density(self, pre_BN: Tensor) -> float:
        """Share of entries the sparse path would touch."""
        raise TypeError(f"{type(self).__name__} is not an architecture; build one with unbraid.sae.build")

    def select(self, pre_BN: Tensor) -> Codes:
        """The active entries of a training batch, without a graph."""
        raise TypeError(f"{type(self).__name__} is not an architecture; build one with unbraid.sae.build")

    def begin_step(self, step: int, steps: int) -> None:
        """Take up what changes over training: nothing. Called before a step, counted from 0, of `steps` in all."""

    def reconstructions(self, parts_BGD: Tensor, b_dec: Tensor) -> tuple[Tensor, list[tuple[float, Tensor]]]:
        """The reconstruction, and those of inner levels with the weights of their losses: none but for Matryoshka."""
        return parts_BGD[:, 0] + b_dec, []

    def encode_sparse(self, x_BD: Tensor, seen_BD: Tensor, centred_BD: Tensor, pre_BN: Tensor) -> Encoded:
        """Codes and their parts of the reconstruction from active entries only."""
        codes = self.select(pre_BN)
        workspace.give(pre_BN)
        codes = codes.with_values(codes.values.to(self.W_dec.dtype))
        codes = active_entries(seen_BD, self.b_dec, self.encoder_ND, self.b_enc, centred_BD, codes)
        if codes.padded:
            codes = codes.with_values(codes.values.relu())
        return Encoded(codes, self.parts_of(codes), self.sparsity(codes), x_BD.new_zeros(()))

    def parts_of(self, codes: Codes) -> Tensor:
        """`[B, G, D]`, each feature group's share of the reconstruction: one group of all features."""
        return decode(codes, self.W_dec).unsqueeze(1)

    def encode_dense(self, x_BD: Tensor, seen_BD: Tensor, centred_BD: Tensor, pre_BN: Tensor) -> Encoded:
        """The same from whole matrices."""
        f_BN = self.dense_codes(pre_BN)
        penalty, penalty_gradient = self.dense_sparsity(f_BN)
        f_BN, parts_BGD, sparsity = dense_autoencode(
            seen_BD,
            self.b_dec,
            self.encoder_ND,
            self.b_enc,
            self.W_dec,
            centred_BD,
            f_BN,
            *self.feature_groups(),
            penalty=penalty,
            penalty_gradient=penalty_gradient,
        )
        return Encoded(f_BN, parts_BGD, sparsity, x_BD.new_zeros(()))

    def feature_groups(self) -> tuple[list[int], Tensor | None]:
        """Ends of the groups of features here, and the features in that order (none: as they are numbered)."""
        return [self.n_features], None

    @torch.no_grad()
    def dense_codes(self, pre_BN: Tensor) -> Tensor:
        """The codes of a training batch as a matrix, in the memory of the pre-activations."""
        codes = self.select(pre_BN)
        f_BN = pre_BN.to(self.W_dec.dtype).zero_()
        values = codes.values.relu() if codes.padded else codes.values
        return f_BN.index_put_((codes.rows(), codes.indices), values.to(f_BN.dtype))

    def sparsity(self, codes: Codes) -> Tensor:
        """The loss that lambda1 weighs: none."""
        return codes.values.new_zeros(())

    def dense_sparsity(self, f_BN: Tensor) -> tuple[Tensor | None, SlabGradient | None]:
        """The same loss on dense codes, without a graph, and its gradient slab by slab."""
        return None, None

    def revival(self, seen_BD: Tensor, residual_BD: Tensor, dead: Tensor) -> Tensor:
        """Loss that brings the features `dead` back, weighted: their pre-activations are pulled up to firing."""
        return self.config.revival_weight * pull_to_threshold(self, seen_BD, dead, self.b_enc)

    @torch.no_grad()
    def fold(self, mean_D: Tensor, scale: float) -> None:
        """Turn an SAE that acts on `(x - mean) * scale` into one that acts on raw `x`, in place.

        Decoder rows keep unit norm, so codes come out divided by `scale`, and with them every bias and threshold.
        """
        self.b_dec.copy_(mean_D.to(self.b_dec.device, torch.float64) + self.b_dec.double() / scale)
        for name in self.scaled_with_input:
            getattr(self, name).div_(scale)

    @torch.no_grad()
    def constrain(self) -> None:
        """Put weights other than the decoder back into their domain after an update."""


def random_unit_rows(shard: Shard, d_in: int, generator: torch.Generator) -> Float[Tensor, "width D"]:
    """Random directions, those of the shard's features among all N; the generator moves on by all N."""
    rows = torch.empty(shard.width, d_in)
    first = 0
    while first < shard.n_features:
        # The last draw takes in what would be left, because torch draws fewer than 16 numbers in another way.
        last = shard.n_features if shard.n_features - first < 2 * ROWS_DRAWN else first + ROWS_DRAWN
        drawn = torch.randn(last - first, d_in, generator=generator)
        start, end = max(first, shard.start), min(last, shard.end)
        if start < end:
            rows[start - shard.start : end - shard.start] = F.normalize(drawn[start - first : end - first], dim=1)
        first = last
    return rows


def squared_error(x_BD: Tensor, x_hat_BD: Tensor) -> Tensor:
    """Mean over tokens of ||x - x_hat||^2."""
    return F.mse_loss(x_hat_BD, x_BD, reduction="sum") / len(x_BD)
