"""Ground truth: every method on several architectures, on a small world whose features are known.

    python study/worlds.py budget       # are 2500 steps at lr 2e-3 what 6000 at 1e-3 are?
    python study/worlds.py grid         # architectures x methods
    python study/worlds.py sweep        # lambda2, fraction, floor
    python study/worlds.py grid --only batch_topk/codes --seeds 1 --into again     # one cell once more

A table goes on where it stopped: a trial whose line is in `study/results/TABLE.jsonl` is not trained again.
"""

import argparse
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from trials import NONE, Trial, controls, run

Form = dict[str, Any]
DECODER: Form = {"space": "decoder", "path": "tiled"}
"""128 rows are compared with each other faster than lists of neighbours are kept."""


FORMS: dict[str, Form] = {
    "none": NONE,
    "codes": {"lambda2": 0.1},
    "decoder": {**DECODER, "fraction": 0.01, "lambda2": 0.1},
    "decoder-floor": {**DECODER, "fraction": 0.01, "lambda2": 0.1, "floor": 0.25},
    "ortsae": {"method": "orthogonal", "lambda2": 0.25},
    "rarer": {**DECODER, "fraction": 0.01, "lambda2": 0.1, "floor": 0.2, "push": "rarer"},
    "co-active": {"space": "co-active", "window": 16, "min_support": 4, "fraction": 0.01, "lambda2": 0.1},
    "window": {"window": 16, "min_support": 4, "lambda2": 0.1},
    "random": {"method": "random_pairs", "lambda2": 0.1},
    "static": {"method": "static_groups", "groups": 8, "lambda2": 0.1},
    "global": {"method": "global", "lambda2": 1.0, "interval": 4},
}
"""The methods compared. Weights are those of earlier pilots on other seeds (0.1; OrtSAE its paper's 0.25), not chosen
on the seeds of the table; `global` divides by all pairs and not by the few of S, so it gets ten times as much."""
ARCHITECTURES = ["batch_topk", "matryoshka", "topk"]
WEIGHTED = {"relu": (0.12, 0.2, 0.32), "jumprelu": (0.006, 0.012, 0.02)}
"""lambda1 around L0 = 5, at which these architectures are compared by interpolation between its neighbours."""
WEIGHTED_FORMS = [name for name in FORMS if name != "decoder-floor"]


HEADLINE = ["none", "decoder", "decoder-floor", "rarer", "ortsae"]
"""Methods whose differences are small, on the two architectures that start best: eight seeds instead of three."""


def grid(seed: int) -> list[Trial]:
    """Every method on every architecture with a k; those without one at several lambda1."""
    if seed > 2:
        return [Trial(kind, name, FORMS[name], seed) for kind in ("batch_topk", "matryoshka") for name in HEADLINE]
    trials = [Trial(kind, name, form, seed) for kind in ARCHITECTURES for name, form in FORMS.items()]
    return trials + [
        Trial(kind, name, FORMS[name], seed, lambda1=weight)
        for kind, weights in WEIGHTED.items()
        for name in WEIGHTED_FORMS
        for weight in weights
    ]


def sweep(seed: int) -> list[Trial]:
    """How much, on how many pairs, down to which floor; what the grid has already is not repeated."""
    codes = [("codes", {"lambda2": weight}) for weight in (0.01, 0.03, 0.3)]
    decoder = [("decoder", {**FORMS["decoder"], "lambda2": weight}) for weight in (0.03, 0.3)]
    decoder += [("decoder", {**FORMS["decoder"], "fraction": share}) for share in (0.001, 0.1)]
    floored = [("decoder-floor", {**FORMS["decoder-floor"], "floor": floor}) for floor in (0.15, "chance")]
    floored += [("decoder-floor", {**FORMS["decoder-floor"], "lambda2": 0.3})]
    trials = [Trial("batch_topk", name, form, seed) for name, form in [*codes, *decoder, *floored]]
    weak = ("decoder", {**FORMS["decoder"], "lambda2": 0.03})
    return trials + [Trial("matryoshka", name, form, seed) for name, form in [weak, *floored]]


def budget(seed: int) -> list[Trial]:
    """Three methods at two lengths."""
    forms = [
        ("none", NONE),
        ("ortsae", {"method": "orthogonal", "lambda2": 0.25}),
        ("decoder", {**DECODER, "fraction": 0.01, "lambda2": 0.1}),
    ]
    trials = [Trial("batch_topk", name, form, seed) for name, form in forms]
    trials += [Trial("matryoshka", "none", NONE, seed)]
    return [replace(trial, steps=steps, lr=lr) for steps, lr in ((2500, 2e-3), (6000, 1e-3)) for trial in trials]


TABLES: dict[str, tuple[list[int], Callable[[int], list[Trial]]]] = {
    "grid": (list(range(8)), grid),
    "sweep": ([0, 1, 2], sweep),
    "budget": ([10], budget),
}


def main() -> None:
    """Bring a table up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--only", default="", help="trials whose ARCHITECTURE/METHOD matches this pattern")
    parser.add_argument("--seeds", type=int, nargs="+", default=None)
    parser.add_argument("--into", default=None, help="another file of results, to see whether a line repeats")
    asked = parser.parse_args()
    seeds, trials = TABLES[asked.table]
    for seed in asked.seeds or seeds:
        chosen = [trial for trial in trials(seed) if re.match(asked.only, f"{trial.architecture}/{trial.method}")]
        run(chosen, asked.into or asked.table)
        if asked.table == "grid" and seed < 3 and asked.into is None:
            controls(seed, asked.table)


if __name__ == "__main__":
    main()
