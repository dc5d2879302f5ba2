"""Which method a recipe trains with: architecture, sparsity and penalty chosen together, in one table.

A recipe says which model, text and size; a preset says the method, so any recipe takes any preset (`unbraid train demo
--preset best`). The table changes when docs/study.md does.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from unbraid.errors import ConfigError

if TYPE_CHECKING:
    from unbraid.config import RunConfig

PRESET_K = 32
FEATURES_PER_K = 16
"""A dictionary narrower than this many features per active one takes a smaller k: with more, most features fire on
most tokens and nothing is sparse."""

ROWS_APART = {
    # Overlap of decoder rows is what a user meets; the code space of the paper hurts (docs/study.md).
    "decorrelation.space": "decoder",
    # Half of the pilots' pairs overlap no more than chance would have it; the top 0.1 % are the ones that stand out.
    "decorrelation.fraction": 1e-3,
    # The common feature of a pair must not be bent by the rare one; both rows moving lost features on the full world.
    "decorrelation.push": "rarer",
    # Below this, random directions overlap as much: 0.2 on the study's world.
    "decorrelation.floor": "0.6 chance",
    # The study's weight.
    "decorrelation.lambda2": 0.1,
}


class Preset(NamedTuple):
    """A method."""

    summary: str
    settings: Mapping[str, Any]


PRESETS: dict[str, Preset] = {
    "paper": Preset(
        "the paper's form: ReLU and L1, the most correlated codes of each batch pushed apart; hurts, by our study",
        {"sae.architecture": "relu", "decorrelation.method": "selective", "decorrelation.space": "codes"},
    ),
    "apart": Preset(
        "BatchTopK, the rarer decoder row of the most overlapping 0.1 % of pairs pushed away, down to 0.6 of chance",
        {"sae.architecture": "batch_topk", "sae.k": PRESET_K, "decorrelation.method": "selective", **ROWS_APART},
    ),
    "best": Preset(
        "Matryoshka with the penalty of apart: what the study recommends so far",
        {"sae.architecture": "matryoshka", "sae.k": PRESET_K, "decorrelation.method": "selective", **ROWS_APART},
    ),
}


def with_preset(config: "RunConfig", name: str) -> "RunConfig":
    """`config` with the method of a preset; what the method does not read is gone.

        >>> from unbraid import recipes
        >>> with_preset(recipes.tiny(), "best").sae.architecture
        'matryoshka'

    Raises:
        ConfigError: there is no such preset.
    """
    from unbraid.config import overridden  # `unbraid --help` lists presets without loading settings
    from unbraid.recipes import WITH_TWIN

    if name not in PRESETS:
        raise ConfigError(f"preset = {name[:80]!r} is unknown; expected one of {', '.join(PRESETS)}")
    settings = dict(PRESETS[name].settings)
    if "sae.k" in settings:
        settings["sae.k"] = max(1, min(PRESET_K, config.sae.n_features // FEATURES_PER_K))
    # Variants of a recipe compare methods; a preset is one method, beside its twin.
    return overridden(config, settings | {"variants": WITH_TWIN}, f"preset {name}")[0]


def listed() -> str:
    """A line for each preset."""
    return "\n".join(f"  {name:6} {preset.summary}" for name, preset in PRESETS.items())


def presets(arguments: list[str]) -> None:
    """The command `unbraid presets`: print that list."""
    if arguments in (["--help"], ["-h"]):
        print("unbraid presets: the methods that `--preset NAME` chooses from\n")
    elif arguments:
        raise ConfigError(f"presets takes nothing; found {' '.join(arguments)[:80]!r}; drop it")
    print(listed())
