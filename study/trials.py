"""One trial: an SAE trained on a synthetic world and judged against its truth; one JSON line in `study/results`.

A line is found again by its settings, so a table that was interrupted goes on where it stopped, and a line that is
deleted comes back the same. Trials that share seed, steps and learning rate are trained together on the same samples
from the same first directions, so differences between them are paired.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unbraid.config import DecorrelationConfig, OptimiserConfig, SAEConfig, VariantConfig
from unbraid.evaluation.controls import controls_of
from unbraid.evaluation.correlation import correlation_summary
from unbraid.evaluation.geometry import max_cosines
from unbraid.evaluation.ground_truth import evaluate_ground_truth
from unbraid.randomness import generator
from unbraid.synthetic import World, build_world
from unbraid.synthetic.learning import train_on_world

RESULTS = Path(__file__).parent / "results"
SHAPES = {"small": (128, 5), "medium": (512, 11)}
"""World -> width and k of its SAEs."""
BATCH, STEPS = 1024, 2500
FIRST_REVIVAL = {"dead_after_tokens": 100 * BATCH, "aux_weight": 1 / 32}
"""Of every table before `recipe`, which has the library's: the one that lets features die."""
JUDGED_SAMPLES, CODE_SAMPLES = 65_536, 16_384
TOGETHER = 16
"""Trials trained in one pass at most."""
NONE = {"method": "none", "lambda2": 0.0}


@dataclass(frozen=True)
class Trial:
    """Settings of one SAE on a world; `method` names what `decorrelation` and `sae` change from their defaults."""

    architecture: str
    method: str
    decorrelation: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    steps: int = STEPS
    lr: float = 2e-3
    lambda1: float = 0.0
    world: str = "small"
    sae: dict[str, Any] | None = None

    @property
    def key(self) -> str:
        """What the trial's line is found by."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def settings(self) -> VariantConfig:
        """What it trains with."""
        width, k = SHAPES[self.world]
        sparsity = {"lambda1": self.lambda1} if self.lambda1 else {"k": k}
        rising = {"sparsity_warmup_steps": self.steps // 5} if self.lambda1 else {}
        penalty = {"method": "none"} if self.decorrelation == NONE else self.decorrelation
        return VariantConfig(
            seed=self.seed,
            sae=SAEConfig.model_validate(
                {"architecture": self.architecture, "n_features": width}
                | sparsity
                | (FIRST_REVIVAL if self.sae is None else self.sae)
            ),
            decorrelation=DecorrelationConfig.model_validate(penalty),
            optimiser=OptimiserConfig(lr=self.lr, warmup_steps=self.steps // 20, **rising),
        )


def run(
    trials: Iterable[Trial], table: str, penalty_of: Callable[[Trial], nn.Module | None] = lambda trial: None
) -> None:
    """Train and judge the trials whose lines `table` does not hold yet, and add them.

    `penalty_of` gives the penalty of a trial whose settings do not describe it.
    """
    path = RESULTS / f"{table}.jsonl"
    done = {Trial(**line["trial"]).key for line in read(table)}
    for group in groups(trial for trial in trials if trial.key not in done):
        world = build_world(group[0].world)
        print(f"{table}: {', '.join(f'{t.architecture}/{t.method}' for t in group)}; seed {group[0].seed}", flush=True)
        samples = group[0].steps * BATCH
        penalties = [penalty_of(trial) for trial in group]
        saes = train_on_world(world, [t.settings for t in group], samples, BATCH, penalties=penalties)
        for trial, sae in zip(group, saes, strict=True):
            append(path, {"trial": asdict(trial), "metrics": judge(sae, world)})


def groups(trials: Iterable[Trial]) -> Iterator[list[Trial]]:
    """Trials that can share their samples, in the order they were asked for."""
    together: dict[Any, list[Trial]] = {}
    for trial in trials:
        together.setdefault((trial.world, trial.seed, trial.steps), []).append(trial)
    for members in together.values():
        for start in range(0, len(members), TOGETHER):
            yield members[start : start + TOGETHER]


def judge(sae: Any, world: World) -> dict[str, float | None]:
    """Ground truth, decoder overlap and the tail of the code correlations, on the same samples for every SAE."""
    x_BD, _ = world.sample(CODE_SAMPLES, generator(1, "study", device=world.device))
    f_BN = sae.encode(x_BD)
    return evaluate_ground_truth(sae, world, JUDGED_SAMPLES).to_dict() | {
        "mean_max_decoder_cosine": float(max_cosines(sae.W_dec).double().mean()),
        "correlation_top": correlation_summary([f_BN], f_BN.shape[1]).top,
    }


def controls(seed: int, table: str) -> None:
    """Lines of what has learned nothing: a random SAE of the same width and L0, and PCA with as many components."""
    if any(line["trial"]["seed"] == seed and line["trial"]["architecture"] == "control" for line in read(table)):
        return
    world = build_world("small")
    x_BD, _ = world.sample(CODE_SAMPLES, generator(seed, "study controls"))
    like = train_on_world(world, [Trial("batch_topk", "none", NONE, seed).settings], 100 * BATCH, BATCH)[0]
    for name, control in controls_of(like, x_BD, generator(seed, "study controls")).items():
        if name != "permuted":
            trial = Trial("control", name, {}, seed)
            append(RESULTS / f"{table}.jsonl", {"trial": asdict(trial), "metrics": judge(control, world)})


def read(table: str) -> list[dict[str, Any]]:
    """The lines of a table."""
    path = RESULTS / f"{table}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def append(path: Path, line: dict[str, Any]) -> None:
    """One more line, in one write, so that several processes can add to a table."""
    rounded = {name: round(v, 6) if isinstance(v, float) else v for name, v in line["metrics"].items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**line, "metrics": rounded}) + "\n")


torch.set_num_threads(1)
