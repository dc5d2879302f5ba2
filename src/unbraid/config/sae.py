"""The settings every sparse autoencoder has; each architecture adds its own where it is defined, in `unbraid.sae`."""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from unbraid.config.checks import GIVEN, Common, Condition, above, active_when, wrong
from unbraid.config.kinds import Kinds, Registry
from unbraid.sites import has_layers, is_transcoder, predicts_several

if TYPE_CHECKING:
    from unbraid.sae.base import SAE

MOST_FEATURES = 1 << 26
SEVERAL_PREDICTED = Condition(lambda sites: any(map(predicts_several, sites)), "a list in which several are predicted")
LAYERS = Condition(
    lambda sites: any(map(has_layers, sites)),
    "a list with as many sites read as predicted, in the order of their layers, as in A + B -> C + D",
)
DRAWN = Condition(lambda start: start is None, "none")
A_TRANSCODER = Condition(lambda sites: any(map(is_transcoder, sites)), "a list with a transcoder, A -> B")


class SAEConfig(Kinds):
    """One sparse autoencoder: its architecture, width and sparsity.

    Calling it gives the class of the architecture named, with the settings that architecture reads:

        >>> SAEConfig(architecture="topk", k=8, n_features=64)
        TopKConfig(architecture='topk', n_features=64, ..., k=8, ...)
    """

    group = "sae"
    names_kind = "architecture"
    default_kind = "relu"
    registry: ClassVar["Registry[type[SAE]]"] = Registry("sae.architecture", "unbraid.sae")

    if TYPE_CHECKING:  # any kind's settings

        def __init__(self, **settings: Any) -> None: ...

    architecture: Annotated[str, Common] = "relu"
    """Which encoder and sparsity loss."""
    n_features: Annotated[int, Common] = Field(default=16384, ge=2, le=MOST_FEATURES)
    """Width N: number of features."""
    dead_after_tokens: int | None = Field(default=None, ge=1)
    """A feature that has not fired for this many training tokens counts as dead; none takes 1,000,000, and with a k
    50 N / k, in which the mean feature fires 50 times, or a thousandth of the run if that is more."""
    decoder_init_norm: Annotated[float | None, active_when(start_from=DRAWN)] = Field(default=None, gt=0.0, le=1.0)
    """Encoder columns start as this multiple of the unit decoder rows; none takes the one that reconstructs best.
    Those of a transcoder are drawn apart and start with this norm; none takes 0.1."""
    aux_weight: float | None = Field(default=None, ge=0.0)
    """Weight of the loss that revives dead features (topk family: explaining the residual; others: being pulled up to
    their threshold); none takes 1 for the topk family and 1/32 for the others, 0 turns it off."""
    skip: Annotated[bool, active_when(model__sites=A_TRANSCODER)] = False
    """Transcoders also predict by a matrix of their own, x W_skip, beside their features (arXiv 2501.18823)."""
    cross_layer: Annotated[bool, active_when(model__sites=LAYERS)] = False
    """With several sites read and as many predicted, features come in blocks: each block reads one site and writes into
    its output and later ones, as in a cross-layer transcoder."""
    row_norm: Annotated[
        Literal["joint", "sum"],
        active_when(model__sites=SEVERAL_PREDICTED, frozen=("none", "decoder", "encoder", "both")),
    ] = "joint"
    """Of dictionaries that predict several sites: decoder rows have norm 1 over all sites together, or norms by site
    that sum to 1, by which sparsity counts every site, as published for crosscoders."""
    start_from: Annotated[str | None, Common] = None
    """A folder or name of a dictionary, in any layout, whose weights are the first ones; none draws them."""
    frozen: Literal["none", "decoder", "near", "encoder", "both"] = "none"
    """What stays as it began, for controls that have learned less (arXiv 2602.14111) and for fine-tuning: decoder
    rows; near: decoder rows but for a turn of at most 37 degrees (cosine 0.8); encoder: encoder rows; both: encoder
    and decoder rows, so that biases and thresholds are learned."""

    robust: Annotated[float, active_when(frozen=("none", "near", "encoder"))] = Field(default=0.0, ge=0.0, le=4.0)
    """Power with which tokens of large error teach decoder rows less; 0 counts all alike."""
    robust_from: Annotated[float, active_when(robust=above(0))] = Field(default=0.4, ge=0.0, le=1.0)
    """Share of the steps after which that power begins to rise."""
    robust_until: Annotated[float, active_when(robust=above(0))] = Field(default=0.8, ge=0.0, le=1.0)
    """Share of the steps at which it is whole; not before `robust_from`."""

    @model_validator(mode="after")
    def _robust_in_order(self) -> "SAEConfig":
        if self.robust_until < self.robust_from:
            raise wrong(
                f"sae.robust_until is {self.robust_until} but sae.robust_from {self.robust_from}; expected at least as "
                "much, because the power rises from one to the other; change one of them"
            )
        return self

    def without_layers(self) -> "SAEConfig":
        """For a site that has no layers, in a run where another has."""
        return self.model_copy(update={"cross_layer": False}) if self.cross_layer else self

    @property
    def revival_weight(self) -> float:
        """`aux_weight`, or its default for this architecture."""
        if self.aux_weight is not None:
            return self.aux_weight
        return 1.0 if self.has_k else 1 / 32

    @property
    def has_k(self) -> bool:
        """Whether k says how sparse the codes are, and not lambda1."""
        return isinstance(self, WithKConfig)

    @property
    def sparsity_weight(self) -> float:
        """lambda1 of Eq. 1; zero where sparsity is structural."""
        return self.lambda1 if isinstance(self, WeightedSAEConfig) else 0.0

    @property
    def sparsity_setting(self) -> tuple[str, float | int]:
        """The setting that says how sparse codes are, and its value."""
        return ("sae.k", self.k) if isinstance(self, WithKConfig) else ("sae.lambda1", self.sparsity_weight)


class WeightedSAEConfig(SAEConfig):
    """Architectures that become sparse by a loss."""

    lambda1: Annotated[float, Common] = Field(default=0.04, ge=0.0)
    """Weight of the sparsity loss, with E||x - mean||^2 = 1."""


NOT_ZERO = Condition(lambda value: value != 0, "none or above 0")


class WithKConfig(SAEConfig):
    """Architectures that keep a number of entries."""

    k: Annotated[int, Common] = Field(default=64, ge=1)
    """Active features per token."""
    k_start: int | None = Field(default=None, ge=1)
    """k falls from this to `k`; none keeps it at `k`."""
    k_fall: Annotated[float, active_when(k_start=GIVEN)] = Field(default=1.0, gt=0.0, le=1.0)
    """Share of the steps over which k falls, from the first one."""
    k_shape: Annotated[Literal["linear", "geometric", "cosine"], active_when(k_start=GIVEN)] = "linear"
    """How k falls: by equal steps, by equal ratios, or slowly at both ends."""
    aux_k: Annotated[int | None, active_when(aux_weight=NOT_ZERO)] = Field(default=None, ge=0)
    """Dead features used to explain the residual; none picks D/2, 0 turns it off."""
    aux_weight: Annotated[float | None, active_when(aux_k=NOT_ZERO)] = Field(default=None, ge=0.0)
    """Weight of the loss by which dead features explain the residual; none takes 1, 0 turns it off."""

    @model_validator(mode="after")
    def _no_more_than_there_are(self) -> "WithKConfig":
        if self.k > self.n_features:
            raise wrong(f"sae.k is {self.k} but sae.n_features only {self.n_features}; lower sae.k")
        if self.k_start is not None and not self.k <= self.k_start <= self.n_features:
            raise wrong(
                f"sae.k_start is {self.k_start}; expected sae.k ({self.k}) to sae.n_features ({self.n_features}), "
                "because k falls from it; change one of them"
            )
        return self
