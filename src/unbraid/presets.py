"""Which method a recipe trains with: architecture, sparsity and penalty chosen together, in one table.

A recipe says which model, text and size; a preset says the method, so any recipe takes any preset (`unbraid train demo
--preset best`). The table changes when docs/study.md does.
"""

from collections.abc import Callable, Mapping, Sequence
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
    # The common feature of a pair must not be bent by the rare one; both rows moving lost features on the full world.
    "decorrelation.push": "rarer",
    # Below this, random directions overlap as much: 0.2 on the study's world.
    "decorrelation.floor": "0.6 chance",
    # The study's weight.
    "decorrelation.lambda2": 0.1,
}
PAIRS_PER_FEATURE, MOST_PAIRS = 2.0, 0.01
"""How many pairs stand out from the others; in a small dictionary this share of them at most."""


LEVELS = (128, 32, 8, 4, 2, 1)
"""The strongest recipe's levels hold N over each of these: 32, 128, 512, 1024, 2048 and 4096 of 4,096 features, as its
authors published them for the full SynthSAEBench world."""
SMALLEST_LEVEL = 4
K_START = 3.2
"""k begins at this multiple of itself, 80 for 25, and falls linearly over all steps, as published. In half of them it
gained F1 on the small world and lost far more on the full one (docs/study.md)."""
INNER_WEIGHT = 0.5
REORDERED_FROM, REORDERED_EVERY = 25, 50
"""Features are first ordered after a 25th of the steps and then every 50th."""
ROBUST = 1.0
"""Badly reconstructed tokens teach decoder rows less (docs/method.md)."""


def recipe_of(n_features: int, k: int, steps: int) -> dict[str, Any]:
    """Settings of the strongest recipe known, of a Matryoshka SAE of this width and k: what `best` trains with.

    Levels hold the most frequent features and are detached, so that no feature is bent by rarer ones; k falls; decoder
    rows are robust.

        >>> recipe_of(512, 11, 2500)["sae.matryoshka_widths"]
        [4, 16, 64, 128, 256, 512]
    """
    widths = sorted({n_features // share for share in LEVELS if n_features // share >= SMALLEST_LEVEL or share == 1})
    return {
        "sae.k_start": max(k, min(n_features, round(K_START * k))),
        "sae.matryoshka_widths": widths,
        "sae.matryoshka_order": "frequency",
        "sae.reorder_from": max(1, steps // REORDERED_FROM),
        "sae.reorder_every": max(1, steps // REORDERED_EVERY),
        "sae.matryoshka_detach": True,
        "sae.matryoshka_weights": INNER_WEIGHT,
        "sae.robust": ROBUST,
    }


def pairs_of(n_features: int, k: int, steps: int) -> dict[str, Any]:
    """How many pairs are pushed apart, of a dictionary of this width.

    >>> pairs_of(4096, 25, 5000)
    {'decorrelation.fraction': 0.000977}
    """
    share = 2 * PAIRS_PER_FEATURE / (n_features - 1)
    return {"decorrelation.fraction": float(f"{min(MOST_PAIRS, share):.3g}")}


class Preset(NamedTuple):
    """A method: its settings, and those that follow from the width, k and the number of steps."""

    summary: str
    settings: Mapping[str, Any]
    scaled: Sequence[Callable[[int, int, int], Mapping[str, Any]]] = ()


PRESETS: dict[str, Preset] = {
    "paper": Preset(
        "the paper's form: ReLU and L1, the most correlated codes of each batch pushed apart; hurts, by our study",
        {"sae.architecture": "relu", "decorrelation.method": "selective", "decorrelation.space": "codes"},
    ),
    "apart": Preset(
        "BatchTopK, the rarer decoder row of the most overlapping pairs pushed away, down to 0.6 of chance",
        {"sae.architecture": "batch_topk", "decorrelation.method": "selective", **ROWS_APART},
        [pairs_of],
    ),
    "best": Preset(
        "Matryoshka with levels by firing frequency, falling k, robust decoder rows, and the penalty of apart",
        {"sae.architecture": "matryoshka", "decorrelation.method": "selective", **ROWS_APART},
        [recipe_of, pairs_of],
    ),
}
SIZES = ("sae.n_features", "sae.k", "training.tokens", "training.batch_tokens")
"""Settings that a preset's own follow from."""


def with_preset(config: "RunConfig", name: str, given: Mapping[str, Any] | None = None) -> "RunConfig":
    """`config` with the method of a preset; what the method does not read is gone.

        >>> from unbraid import recipes
        >>> with_preset(recipes.tiny(), "best").sae.architecture
        'matryoshka'

    Args:
        config: a recipe.
        name: of the preset.
        given: settings that will be given by hand over the preset's, by their dotted paths; those among `SIZES` decide
            others of the preset.

    Raises:
        ConfigError: there is no such preset.
    """
    from unbraid.config import SAEConfig, WithKConfig, overridden  # `unbraid --help` lists presets without settings
    from unbraid.recipes import WITH_TWIN

    if name not in PRESETS:
        raise ConfigError(f"preset = {name[:80]!r} is unknown; expected one of {', '.join(PRESETS)}")
    preset, where = PRESETS[name], f"preset {name}"
    settings = {path: value for path, value in (given or {}).items() if path in SIZES} | dict(preset.settings)
    settings["variants"] = WITH_TWIN  # Variants of a recipe compare methods; a preset is one method, beside its twin.
    if issubclass(SAEConfig.kinds()[settings["sae.architecture"]], WithKConfig):
        n_features = settings.get("sae.n_features", config.sae.n_features)
        settings.setdefault("sae.k", max(1, min(PRESET_K, n_features // FEATURES_PER_K)))
    config = overridden(config, settings, where)[0]
    for scaled in preset.scaled:
        assert isinstance(config.sae, WithKConfig)
        config = overridden(config, scaled(config.sae.n_features, config.sae.k, config.steps), where)[0]
    return config


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
