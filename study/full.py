"""The full world of SynthSAEBench (16,384 features, D = 768): SAEs of 4096 latents, k = 25, on one stream of samples.

    python study/full.py [--only batch_topk matryoshka] [--samples 5000000]      # results/full.jsonl

Judged on the way at 0.5, 1, 2 and 2.5 M samples, in the middle of their schedules, and at the end. A training that is
stopped goes on from its last checkpoint (`study/runs/full-...`, every 100 steps), and a line that is there already is
not written twice, so the command may be given again until it is done. About 270 ms a step of 1024 for two SAEs on one
core. Seed 1 of the world's samples: no table of the small worlds has it.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from recipe import ALL_THREE, ROBUST, SOONER, published
from trials import RESULTS, append, read

from unbraid.config import DecorrelationConfig, OptimiserConfig, SAEConfig, VariantConfig
from unbraid.evaluation.geometry import max_cosines
from unbraid.evaluation.ground_truth import evaluate_ground_truth
from unbraid.synthetic import World, build_world
from unbraid.synthetic.learning import as_trained, train_on_world
from unbraid.training.sae_trainer import SAETrainer

RUNS = RESULTS.parent / "runs"
BATCH, JUDGED_SAMPLES = 1024, 65_536
SHAPE = {"n_features": 4096, "k": 25}
RARER = {
    "space": "decoder",
    "push": "rarer",
    "lambda2": 0.1,
    "fraction": 1e-3,
    "floor": 0.09,
    "interval": 2,
    "refresh": 16,
}
"""The rarer row moves, of pairs above .6 of what random rows reach; chosen and pushed on some steps only."""
RECIPE = {"architecture": "matryoshka", **published(4096, 25, 5000)}
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "batch_topk": ({"architecture": "batch_topk"}, {}),
    "batch_topk + rarer": ({"architecture": "batch_topk"}, RARER),
    "matryoshka": ({"architecture": "matryoshka"}, {}),
    "matryoshka + rarer": ({"architecture": "matryoshka"}, RARER),
    "recipe": (RECIPE, {}),
    "recipe + rarer": (RECIPE, RARER),
    "recipe + robust": (RECIPE | ROBUST, {}),
    "recipe, k falls sooner": (RECIPE | SOONER, {}),
    "recipe, k falls sooner, robust": (RECIPE | SOONER | ROBUST, {}),
    ALL_THREE: (RECIPE | SOONER | ROBUST, RARER),
}
"""Label -> settings of the SAE, settings of the penalty (none without any)."""
MILESTONES = (500_000, 1_000_000, 2_000_000, 2_500_000, 5_000_000, 10_000_000, 20_000_000)


def variant(label: str, steps: int, seed: int) -> VariantConfig:
    """What one SAE trains with."""
    sae, penalty = FORMS[label]
    return VariantConfig(
        seed=seed,
        sae=SAEConfig.model_validate(SHAPE | sae),
        decorrelation=DecorrelationConfig.model_validate(penalty or {"method": "none"}),
        optimiser=OptimiserConfig(lr=1e-3, warmup_steps=steps // 20),
    )


def judging(labels: list[str], world: World, steps: int, seed: int) -> Callable[[int, list[SAETrainer]], None]:
    """After a step that is a milestone, adds the lines that are not there yet."""
    milestones = {min(samples // BATCH, steps) for samples in (*MILESTONES, steps * BATCH)}

    def judge(step: int, trainers: list[SAETrainer]) -> None:
        if step % 50 == 0:
            print(f"step {step:,} of {steps:,}", flush=True)
        if step not in milestones:
            return
        for label, trainer in zip(labels, trainers, strict=True):
            trial = {"method": label, "seed": seed, "samples": step * BATCH, "planned": steps * BATCH}
            if trial in [line["trial"] for line in read("full")]:
                continue
            sae = as_trained(trainer)
            metrics = evaluate_ground_truth(sae, world, JUDGED_SAMPLES).to_dict()
            metrics["mean_max_decoder_cosine"] = float(max_cosines(sae.W_dec).double().mean())
            append(RESULTS / "full.jsonl", {"trial": trial, "metrics": metrics})

    return judge


def main() -> None:
    """Train, or go on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FORMS, default=["batch_topk", "matryoshka"])
    parser.add_argument("--samples", type=int, default=5_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    steps, world = asked.samples // BATCH, build_world("full")
    variants = [variant(label, steps, asked.seed) for label in asked.only]
    name = "-".join([*asked.only, str(asked.samples), str(asked.seed)]).replace(" + ", "+")
    judge = judging(asked.only, world, steps, asked.seed)
    train_on_world(world, variants, asked.samples, BATCH, judge, None, RUNS / f"full-{name}", 100)


if __name__ == "__main__":
    main()
