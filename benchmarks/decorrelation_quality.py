"""What selective decorrelation finds and changes, where that is known.

    python benchmarks/decorrelation_quality.py               # everything; about ten minutes on two cores
    python benchmarks/decorrelation_quality.py planted       # one section

Sections: `decoder` (recall of the true top pairs of decoder rows while an SAE trains, and what a step costs), `planted`
(precision on pairs that are known to belong together), `seldom` (SAEs on a known world, selected and penalised every
step or at the sparing settings).
"""

import json
import statistics
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from support.timing import Times, arguments, record
from support.training import B, N, activations, endless, step, trainer
from torch import Tensor

from unbraid.config import DecorrelationConfig, OptimiserConfig, SAEConfig, VariantConfig
from unbraid.decorrelation.penalty import SelectiveDecorrelation
from unbraid.decorrelation.selection import live_pairs
from unbraid.evaluation.geometry import max_cosines
from unbraid.evaluation.ground_truth import evaluate_ground_truth
from unbraid.recipes import SPARING, SPARING_ROWS
from unbraid.synthetic import build_world
from unbraid.synthetic.learning import train_on_world

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
from made_codes import planted_codes

SELDOM: dict[str, dict[str, Any]] = {
    "no penalty": {"lambda2": 0.0},
    "codes, every step": {"window": SPARING["window"]},
    "codes, sparing": SPARING,
    "decoder, every step": {"space": "decoder", "fraction": 0.01},
    "decoder, sparing": {"fraction": 0.01, **SPARING_ROWS},
}
"""Penalties whose selections are judged on a known world."""


def decoder(device: str, steps: int) -> dict[str, Any]:
    """Recall of the true top pairs of decoder rows while a TopK SAE trains at N = 8192, and what a step costs.

    Recall is measured at each selection and, for its age, on the last step before the next.
    """
    width = 8192
    settings = dict(SPARING_ROWS)
    plain = trainer(width, device, DecorrelationConfig(lambda2=0.0))
    pushed = trainer(width, device, DecorrelationConfig(**settings))
    penalty = pushed.decorrelate
    assert isinstance(penalty, SelectiveDecorrelation) and penalty.selection is not None
    lap = width // pushed.config.decorrelation.scan_rows
    fresh, aged, one, other = [], [], Times(), Times()
    stream = endless(activations(16, device))
    for number, x_BD in (next(stream) for _ in range(steps)):
        one.take(partial(step, plain, number, x_BD), device)
        before = pushed.sae.W_dec.detach().clone()
        other.take(partial(step, pushed, number, x_BD), device)
        age = penalty.selection.calls_since
        if number >= lap and age in (0, SPARING["refresh"] - 1):
            (aged if age else fresh).append(recall(penalty, before))
    found = {
        "settings": settings,
        "steps": steps,
        "recall_at_selection": {"lowest": min(fresh), "mean": statistics.mean(fresh), "count": len(fresh)},
        "recall_before_the_next": {"lowest": min(aged), "mean": statistics.mean(aged), "count": len(aged)},
        "ratio": round(sum(other.wall) / sum(one.wall), 4),
        "cpu_ratio": round(sum(other.cpu) / sum(one.cpu), 4),
        "plain_step": one.report(),
        "decorrelated_step": other.report(),
    }
    print(json.dumps(found, indent=1), flush=True)
    return found


def recall(penalty: SelectiveDecorrelation, decoder_ND: Tensor) -> float:
    """Share of the true top pairs of these rows that are in the S in force."""
    assert penalty.selection is not None
    exact, n_features = penalty.exact_selection(decoder_ND), len(decoder_ND)
    held = penalty.selection.first * n_features + penalty.selection.second
    return float(torch.isin(exact.first * n_features + exact.second, held).double().mean())


def planted(device: str) -> dict[str, Any]:
    """Precision at 750 on 750 true pairs among 16k rare features: mean, lowest and highest over three worlds' draws."""
    forms = {
        "one batch (the paper's)": {},
        "one batch, min_support 4": {"min_support": 4},
        "window 4": {"window": 4},
        "window 16": {"window": 16},
    }
    found = {}
    for name, settings in forms.items():
        shares = []
        for draw in range(3):
            decorrelate = SelectiveDecorrelation(750 / live_pairs(N), **settings)
            for seed in range(settings.get("window", 1)):
                made, pairs = planted_codes(B, N, 750, seed=100 * draw + seed)
                on_device = {"indices": made.indices.to(device), "values": made.values.to(device)}
                _, stats = decorrelate(codes=replace(made, offsets=made.offsets.to(device), **on_device))
            truth = set(map(tuple, pairs.tolist()))
            shares.append(sum(tuple(pair) in truth for pair in stats.pairs.tolist()) / 750)
        found[name] = {"mean": round(statistics.mean(shares), 4), "of_each": [round(share, 4) for share in shares]}
        print(f"{name}: precision@750 {found[name]['mean']:.3f}", flush=True)
    return found


def seldom(device: str, seeds: int, steps: int) -> dict[str, Any]:
    """Whether selecting and penalising seldom gives what doing so every step gives: an SAE on a world that is known."""
    world = build_world("small", device)
    found: dict[str, dict[str, list[float]]] = {}
    for seed in range(seeds):
        variants = [
            VariantConfig(
                seed=seed,
                sae=SAEConfig(architecture="batch_topk", n_features=128, k=5),
                optimiser=OptimiserConfig(lr=2e-3, warmup_steps=steps // 20),
                decorrelation=DecorrelationConfig(**changes),
            )
            for changes in SELDOM.values()
        ]
        for name, sae in zip(SELDOM, train_on_world(world, variants, steps * 1024), strict=True):
            judged = evaluate_ground_truth(sae, world, 65_536).to_dict()
            x_BD, _ = world.sample(16_384, torch.Generator(device).manual_seed(seed))
            _, stats = SelectiveDecorrelation()(sae.encode(x_BD))
            judged["correlation_top"] = stats.scalars()["mean_selected"]
            judged["decoder_cosine"] = float(max_cosines(sae.W_dec).double().mean())
            for metric in ("f1", "mcc", "r2", "correlation_top", "decoder_cosine"):
                found.setdefault(name, {}).setdefault(metric, []).append(float(judged[metric]))
            print(seed, name, {metric: round(values[-1], 4) for metric, values in found[name].items()}, flush=True)
    return {"steps": steps, "seeds": seeds, "rows": found}


def main() -> None:
    """Run and print."""
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=None, help="of `decoder` (220) and `seldom` (1000)")
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    record(
        {
            "decoder": lambda: decoder(asked.device, asked.steps or 220),
            "planted": lambda: planted(asked.device),
            "seldom": lambda: seldom(asked.device, asked.seeds, asked.steps or 1000),
        },
        asked,
        "decorrelation-quality",
    )


if __name__ == "__main__":
    main()
