"""The settings of decorrelation: of a run, of a variant, and of the penalty in a training loop of one's own."""

from typing import Literal

from pydantic import Field, model_validator

from unbraid.config.checks import Section
from unbraid.errors import ConfigError

Floor = float | Literal["chance"] | None


class DecorrelationConfig(Section):
    """Selective feature decorrelation (Eq. 2-4) and what it is compared with."""

    method: Literal["none", "selective", "global", "static_groups", "orthogonal", "random_pairs"] = "selective"
    """selective: the paper's idea; the others are comparators under the same interface."""
    lambda2: float = Field(default=0.1, ge=0.0)
    """Weight of the penalty R(tau); 0 measures without penalising."""
    fraction: float = Field(default=1e-3, gt=0.0, le=1.0)
    """Share of live pairs selected."""
    measure: Literal["cosine", "pearson"] = "cosine"
    """Correlation of two features over a batch; cosine is the paper's Eq. 2."""
    space: Literal["codes", "decoder", "co-active"] = "codes"
    """codes: the paper's; decoder: overlap of decoder rows; co-active: pairs chosen by codes, penalised by decoder."""
    push: Literal["both", "rarer"] = "both"
    """space=decoder and co-active: both rows of a pair move, or only the one of the feature that fires more seldom."""
    window: int = Field(default=1, ge=1)
    """Select on the codes of the last M batches, every M steps; 1 is the paper's per-batch form."""
    min_support: int = Field(default=1, ge=1)
    """Features that fired fewer times in the window are left out of the selection."""
    refresh: int | None = Field(default=None, ge=1)
    """Re-select every so many steps; none does so every `window` steps."""
    interval: int = Field(default=1, ge=1)
    """Penalise every T-th step with weight T."""
    threshold: Literal["batch", "running", "fixed"] = "batch"
    """tau: mu + sigma of this selection, its running mean, or `tau`."""
    tau: float = Field(default=0.2, ge=0.0, le=1.0)
    """The fixed threshold, for threshold=fixed."""
    threshold_decay: float = Field(default=0.99, ge=0.0, lt=1.0)
    """Decay of the running mean, for threshold=running."""
    floor: Floor = None
    """tau never falls below this; chance = sqrt(2 ln N / D) in decoder space."""
    max_pairs_per_feature: int | None = Field(default=None, ge=1)
    """Caps |S| at this many pairs per live feature, which makes it linear in N."""
    groups: int = Field(default=64, ge=1)
    """static_groups: number of fixed subsets."""
    chunk: int = Field(default=8192, ge=2)
    """orthogonal (OrtSAE): features per random chunk."""
    block: int = Field(default=512, ge=2)
    """Features per random block when codes are too dense for the exact path."""
    pair_budget: int = Field(default=64_000_000, ge=1)
    """Most co-activations W of a batch the exact path enumerates before blocks take over."""
    path: Literal["auto", "coactive", "blocks", "tiled"] = "auto"
    """How pairs are found. Of codes: coactive is exact, blocks samples dense codes, auto is coactive within
    pair_budget. space=decoder: auto keeps lists of neighbours, tiled compares all rows at each selection."""
    scan_rows: int = Field(default=256, ge=1)
    """space=decoder: rows compared with all others at each penalised step; S is first chosen when all have been."""
    neighbours: int = Field(default=16, ge=1)
    """space=decoder: nearest rows remembered per feature."""

    @model_validator(mode="after")
    def _rows_can_be_pushed(self) -> "DecorrelationConfig":
        if self.push == "rarer" and (self.space == "codes" or self.method not in ("selective", "random_pairs")):
            raise ConfigError(
                f"decorrelation.push is 'rarer' with method {self.method!r} and space {self.space!r}; expected "
                "selective pairs of decoder rows; set decorrelation.space to decoder or co-active, or push to both"
            )
        return self
