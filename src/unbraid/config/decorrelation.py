"""The settings every penalty on features has; each method adds its own where it is defined, in `unbraid.decorrelation`.

How tau is kept from falling (`Floor`) is shared by several methods and stands here.
"""

import re
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import AfterValidator, Field

from unbraid.config.checks import Common, wrong
from unbraid.config.kinds import Kinds, Registry

if TYPE_CHECKING:
    from unbraid.decorrelation.base import Penalty

CHANCE = re.compile(r"(?:(\d+(?:\.\d+)?)\s*\*?\s*)?chance")


def chance_share(floor: str) -> float | None:
    """`"0.6 chance"` -> 0.6, `"chance"` -> 1.0; None for any other text."""
    match = CHANCE.fullmatch(floor.strip())
    return None if match is None else float(match[1] or 1.0)


def _checked_floor(floor: float | str | None) -> float | str | None:
    share = chance_share(floor) if isinstance(floor, str) else floor
    if floor is not None and (share is None or not (0 <= share <= 1 if isinstance(floor, str) else 0 <= share < 1)):
        raise wrong(
            f"decorrelation.floor = {floor!r}; expected a cosine of at least 0 and below 1, or a share of chance level "
            "such as '0.6 chance', at most 1"
        )
    return floor


Floor = Annotated[float | str | None, AfterValidator(_checked_floor)]


class DecorrelationConfig(Kinds):
    """Selective feature decorrelation (Eq. 2-4) and what it is compared with.

    Calling it gives the class of the method named, with the settings that method reads.

    Example:
        >>> DecorrelationConfig(space="decoder", floor="0.6 chance", lambda2=0.1).method
        'selective'
    """

    group = "decorrelation"
    names_kind = "method"
    default_kind = "selective"
    registry: ClassVar["Registry[type[Penalty]]"] = Registry(
        "decorrelation.method", "unbraid.decorrelation.comparators"
    )
    selects: ClassVar[bool] = False
    """Whether the method chooses pairs by their correlation."""

    @property
    def can_be_split(self) -> bool:
        """Whether the SAE's features may be divided among ranks."""
        return True

    if TYPE_CHECKING:  # any kind's settings

        def __init__(self, **settings: Any) -> None: ...

    method: Annotated[str, Common] = "selective"
    """selective: the paper's idea; the others are comparators under the same interface."""
    fraction: Annotated[float, Common] = Field(default=1e-3, gt=0.0, le=1.0)
    """Share of live pairs selected, and counted as the top of the correlations in summaries."""

    @property
    def weight(self) -> float:
        """lambda2 of Eq. 1; zero for a method without a penalty."""
        return self.lambda2 if isinstance(self, PenaltyConfig) else 0.0

    def problem_with_width(self, n_features: int) -> str | None:
        """What is wrong with these settings for an SAE of that many features."""
        return None

    def first_penalised_step(self, n_features: int) -> int:
        """The first step, counted from one, on which the penalty can act."""
        return 1


class PenaltyConfig(DecorrelationConfig):
    """Methods that add something to the loss."""

    lambda2: Annotated[float, Common] = Field(default=0.1, ge=0.0)
    """Weight of the penalty; 0 measures without penalising."""
    interval: int = Field(default=1, ge=1)
    """Penalise every T-th step with weight T."""
