"""Base class of every architecture: weights, encode/decode interface and training forward pass.

An architecture is one small class that says how pre-activations become codes, once for inference (`encode`: each row
independently, any leading dimensions) and once for training, where a whole batch is known. Training makes one big
product, the pre-activations, without a graph, and then goes one of two ways to the same weights: *sparse*, touching
active entries only, or *dense*, which is faster while a large share of the features is active. The encoder is stored
as rows, one per feature, like the decoder, so that both gradients are built feature by feature by the same code.

A transcoder predicts y, of width M, from x. Its b_dec belongs to y, so its encoder takes nothing off x, and it may have
an affine skip connection, x W_skip. A crosscoder is an SAE of activations that stand side by side, D = D1 + D2 + ...: a
decoder row is one of each site, of unit norm together, and `by_site` takes them apart. In training an SAE may be split
by features over ranks: each holds a slice and gets the same batch, the parts of the reconstruction and of the losses
are summed, and every gradient but b_dec's is complete where its feature lives.
"""

from typing import Any, ClassVar, Literal

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
from unbraid.sae.cross_layer import CrossLayer
from unbraid.sae.dead import pull_to_threshold
from unbraid.sae.first_weights import TRANSCODER_START, closest_norm, random_unit_rows
from unbraid.sae.folding import fold_into
from unbraid.sae.forward import Encoded, Forward, squared_error
from unbraid.sae.robust import RobustRows

SPARSE_BELOW = {"cpu": 0.05, "cuda": 0.01}
"""Share of active entries below which the sparse path is faster: measured on a CPU, an estimate for GPUs."""


class SAE(WithHostBuffers):
    """Base of every architecture: x -> f = encode(x) -> x_hat = f W_dec + b_dec (+ x W_skip).

    Attributes:
        encoder_ND: encoder, one row per feature; `W_enc` is its transpose.
        b_enc: `[N]` (gated has b_gate and b_mag instead).
        W_dec: `[N, M]`, rows of unit L2 norm; M is D for an SAE.
        b_dec: `[M]`, added after the decoder, and of an SAE subtracted before the encoder.
        W_skip: `[D, M]`, of a transcoder with a skip connection; None without one.
        is_transcoder: whether what it predicts is not what it reads.
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
    shared: ClassVar[tuple[str, ...]] = ("b_dec", "W_skip")
    """Parameters every rank of a split SAE holds; their gradients are summed over the ranks."""
    scaled_with_input: ClassVar[tuple[str, ...]] = ("b_enc",)
    """Parameters and buffers in units of pre-activations, which `fold` divides."""
    cross_layer: CrossLayer | None = None  # set in training
    W_skip: Tensor | None
    no_input_bias: Tensor

    def __init__(
        self, config: SAEConfig, d_in: int, generator: torch.Generator, shard: Shard, d_out: int | None = None
    ):
        super().__init__()
        self.config = config
        self.metadata: dict[str, Any] = {}
        self.d_in = d_in
        self.shard = shard
        self.n_features = shard.width
        self.is_transcoder = d_out is not None
        width_out = d_in if d_out is None else d_out
        W_dec = random_unit_rows(shard, width_out, generator)
        W_enc = random_unit_rows(shard, d_in, generator) if self.is_transcoder else W_dec
        start = TRANSCODER_START if self.is_transcoder else self.initial_encoder_norm()
        self.encoder_ND = nn.Parameter(W_enc * (config.decoder_init_norm or start))
        self.W_dec = nn.Parameter(W_dec)
        self.b_dec = nn.Parameter(torch.zeros(width_out))
        has_skip = self.is_transcoder and config.skip
        self.register_parameter("W_skip", nn.Parameter(torch.zeros(d_in, width_out)) if has_skip else None)
        self.robust = RobustRows(config, self.n_features)
        self.register_buffer("no_input_bias", torch.zeros(d_in) if self.is_transcoder else None, persistent=False)
        self.add_biases()

    @property
    def training_buffers(self) -> tuple[str, ...]:
        """Buffers that training goes on from and a trained SAE has no use for; `state_dict` leaves them out."""
        return tuple(f"robust.{name}" for name, _ in self.robust.named_buffers())

    def initial_share(self) -> float:
        """Share of the features that are active on a row before the first step: those with a positive product."""
        return 0.5

    def initial_encoder_norm(self) -> float:
        """Norm of the first encoder rows with which the first reconstructions are the closest."""
        return closest_norm(self.initial_share(), self.config.n_features, self.d_in)

    @property
    def d_out(self) -> int:
        """Width M of what is predicted: D for an SAE."""
        return self.W_dec.shape[-1]

    def by_site(self, y: Float[Tensor, "*rows M"]) -> list[Float[Tensor, "*rows _"]]:
        """What belongs to each site that is predicted, of reconstructions, activations or decoder rows side by side.

        Example:
            >>> import torch, unbraid
            >>> x = torch.randn(2048, 16, generator=torch.Generator().manual_seed(0))
            >>> topk = unbraid.SAEConfig(architecture="topk", n_features=64, k=4)
            >>> crosscoder = unbraid.fit(topk, {"early + late": (x[:, :6], x[:, 6:])}, batch_tokens=256)["sae"]
            >>> tuple(rows.shape[-1] for rows in crosscoder.by_site(crosscoder.W_dec))
            (6, 10)
        """
        return list(y.split(self.metadata.get("widths_out", [self.d_out]), dim=-1))

    @property
    def input_bias(self) -> Float[Tensor, " D"]:
        """What the encoder takes off its input: b_dec; nothing of a transcoder, whose b_dec belongs to its output."""
        return self.no_input_bias if self.is_transcoder else self.b_dec

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
        """(x - b_dec) W_enc + b_enc; x W_enc + b_enc of a transcoder."""
        return F.linear(self.centred(x), self.encoder_ND, self.b_enc)

    def centred(self, x: Tensor) -> Tensor:
        """x - b_dec (x of a transcoder), in the weights' dtype."""
        return self.require_activations(x).to(self.b_dec.dtype) - self.input_bias

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

    def decode(self, f: Float[Tensor, "*rows N"]) -> Float[Tensor, "*rows M"]:
        """Reconstruction from codes, a transcoder's skip connection left out.

        Raises:
            CodesError: they are not N wide.
        """
        return self.require_codes(f) @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows M"]:
        """Reconstruction of raw activations, in inference form, a transcoder's skip connection included."""
        x_hat = self.decode(self.encode(x))
        return x_hat if self.W_skip is None else x_hat + x.to(self.W_skip.dtype) @ self.W_skip

    def training_forward(
        self,
        x_BD: Tensor,
        dead_N: Bool[Tensor, " N"] | None = None,
        generator: torch.Generator | None = None,
        path: Literal["auto", "dense", "sparse"] = "auto",
        y_BM: Tensor | None = None,
    ) -> Forward:
        """One training pass over a batch.

        Args:
            x_BD: `[B, D]`, activations without their mean, scaled so that E||x||^2 = 1.
            dead_N: features that have not fired for long, to be revived by the auxiliary loss.
            generator: chance for architectures that use it (denoising).
            path: force one of the two computations; auto takes the faster one at this batch's density.
            y_BM: `[B, M]`, what a transcoder is to predict, in units of its own; x itself without it.

        Raises:
            ActivationError: the batch is empty or not `[B, D]`, or what is to be predicted not `[B, M]`.
        """
        if x_BD.ndim != 2 or x_BD.shape[1] != self.d_in or len(x_BD) == 0:
            raise ActivationError(
                f"a training batch has shape {tuple(x_BD.shape)}; expected [B, {self.d_in}] with B >= 1; check the site"
            )
        y_BM = x_BD if y_BM is None else y_BM
        if y_BM.shape != (len(x_BD), self.d_out):
            raise ActivationError(
                f"what is to be predicted has shape {tuple(y_BM.shape)}; expected [{len(x_BD)}, {self.d_out}], a row "
                "for each row read; check the site"
            )
        centred_BD, pre_BN = self.product(seen_BD := self.corrupted(x_BD, generator))
        if path == "auto":
            path = "sparse" if self.density(pre_BN) < SPARSE_BELOW.get(x_BD.device.type, 0.0) else "dense"
        with torch.autocast(x_BD.device.type, enabled=False):
            encode = self.encode_sparse if path == "sparse" else self.encode_dense
            skip_BM = None if self.W_skip is None else seen_BD @ self._on_first_rank(self.W_skip)
            target_BM = y_BM if skip_BM is None else y_BM - skip_BM.detach()
            encoded = encode(target_BM, seen_BD, centred_BD, pre_BN)
            del pre_BN
            parts_BGD = summed(encoded.parts_BGD, self.shard.ranks)
            constant = self._on_first_rank(self.b_dec)
            constant = constant if skip_BM is None else constant + skip_BM
            x_hat_BD, inner = self.reconstructions(parts_BGD, constant)
            reconstruction = squared_error(y_BM, x_hat_BD)
            self.robust.note(encoded.codes, y_BM, x_hat_BD)
            inner_losses = [weight * squared_error(y_BM, inner_BD) for weight, inner_BD in inner]
        auxiliary = encoded.extra + sum(inner_losses)
        revived = 0
        if dead_N is not None and self.config.revival_weight > 0:
            dead = dead_N.nonzero().squeeze(1)
            revived = len(dead)
            if self.shard.ranks.any(revived > 0):
                auxiliary = auxiliary + self.revival(seen_BD, (y_BM - x_hat_BD).detach(), dead)
        sparsity = summed(encoded.sparsity, self.shard.ranks)
        return Forward(x_hat_BD, encoded.codes, reconstruction, sparsity, auxiliary, path, revived)

    def _on_first_rank(self, shared: Tensor) -> Tensor:
        """A parameter that every rank adds to the sum over ranks: its gradient must come from one of them."""
        return shared if self.shard.ranks.first else shared.detach()

    def corrupted(self, x_BD: Tensor, generator: torch.Generator | None) -> Tensor:
        """What the encoder sees of a batch: the batch."""
        return x_BD

    @torch.no_grad()
    def product(self, seen_BD: Tensor) -> tuple[Tensor, Tensor]:
        """`centred` and the pre-activations, without a graph; on a CPU in memory to be given back to `workspace`."""
        centred_BD, bias_N = seen_BD - self.input_bias, self.product_bias()
        if seen_BD.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return centred_BD, F.linear(centred_BD, self.encoder_ND, bias_N)
        pre_BN = workspace.take(len(seen_BD), self.n_features, self.encoder_ND.dtype)
        whole = (pre_BN, centred_BD, self.encoder_ND, bias_N)
        for out, x, rows, bias in [whole] if self.cross_layer is None else self.cross_layer.products(*whole):
            torch.mm(x, rows.T, out=out) if bias is None else torch.addmm(bias, x, rows.T, out=out)
        return centred_BD, pre_BN

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
        """Take up what changes over training. Called before a step, counted from 0, of `steps` in all."""
        self.robust.begin_step(step, steps)

    def reconstructions(self, parts_BGD: Tensor, constant: Tensor) -> tuple[Tensor, list[tuple[float, Tensor]]]:
        """The reconstruction, and those of inner levels with the weights of their losses: none but for Matryoshka.

        Args:
            parts_BGD: what each feature group gives.
            constant: what no feature gives, `[D]` or `[B, D]`: b_dec, and the skip connection.
        """
        return parts_BGD[:, 0] + constant, []

    def encode_sparse(self, target_BD: Tensor, seen_BD: Tensor, centred_BD: Tensor, pre_BN: Tensor) -> Encoded:
        """Codes and their parts of the reconstruction from active entries only.

        Args:
            target_BD: what features and b_dec are to give.
            seen_BD, centred_BD, pre_BN: what the encoder sees, the same `centred`, and its product.
        """
        codes = self.select(pre_BN)
        workspace.give(pre_BN)
        codes = codes.with_values(codes.values.to(self.W_dec.dtype))
        codes = active_entries(seen_BD, self.input_bias, self.encoder_ND, self.b_enc, centred_BD, codes)
        if codes.padded:
            codes = codes.with_values(codes.values.relu())
        return Encoded(codes, self.parts_of(codes), self.sparsity(codes), seen_BD.new_zeros(()))

    def parts_of(self, codes: Codes) -> Tensor:
        """`[B, G, D]`, each feature group's share of the reconstruction: one group of all features."""
        return decode(codes, self.W_dec, self.robust.entry_weights).unsqueeze(1)

    def encode_dense(self, target_BD: Tensor, seen_BD: Tensor, centred_BD: Tensor, pre_BN: Tensor) -> Encoded:
        """The same from whole matrices."""
        f_BN = self.dense_codes(pre_BN)
        penalty, penalty_gradient = self.dense_sparsity(f_BN)
        f_BN, parts_BGD, sparsity = dense_autoencode(
            seen_BD,
            self.input_bias,
            self.encoder_ND,
            self.b_enc,
            self.W_dec,
            centred_BD,
            f_BN,
            *self.feature_groups(),
            penalty=penalty,
            penalty_gradient=penalty_gradient,
            weights=self.robust.feature_weights,
        )
        return Encoded(f_BN, parts_BGD, sparsity, seen_BD.new_zeros(()))

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
    def fold(
        self,
        mean_D: Tensor,
        scale: float | Tensor,
        mean_out_M: Tensor | None = None,
        scale_out: float | Tensor | None = None,
    ) -> None:
        """Turn an SAE that acts on `(x - mean) * scale` into one that acts on raw `x`, in place.

        Codes come out divided by the scale of what is predicted, and with them every bias and threshold, so that
        decoder rows keep unit norm. Where columns have scales of their own codes are divided by one number for all,
        which keeps their order, and the rows' norms change.

        Args:
            mean_D, scale: of what is read; a scale is one number, or `[D]`.
            mean_out_M, scale_out: of what a transcoder predicts; those of what is read without them.
        """
        fold_into(self, mean_D, scale, mean_out_M, scale_out)

    def shift_input(self, shift_N: Tensor) -> None:
        """Take into the biases that the input's mean is not taken off: `shift_N` is its product with the encoder."""
        self.b_enc.copy_(self.b_enc.double() - shift_N)

    @torch.no_grad()
    def constrain(self) -> None:
        """Put weights other than the decoder back into their domain after an update."""
