"""`unbraid synth`: train architectures on a world whose features are known, and print what they found.

Every row of a seed is trained on the same fresh samples, by the trainer that trains on language models, and evaluated
on the same tokens; controls stand below. With several seeds a number is a mean with its standard deviation over seeds.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from unbraid.config import OptimiserConfig, SAEConfig, SynthConfig, VariantConfig
from unbraid.device import pick_device
from unbraid.errors import EvaluationError
from unbraid.evaluation.controls import controls_of
from unbraid.evaluation.geometry import max_cosines
from unbraid.evaluation.ground_truth import evaluate_ground_truth
from unbraid.evaluation.tables import ground_truth_tables
from unbraid.owned_files import check_owned_json, write_owned_json
from unbraid.progress import Stages
from unbraid.randomness import generator
from unbraid.synthetic import World, build_world
from unbraid.synthetic.learning import train_on_world

PROBE_SAMPLES = 16_384
SAMPLES_PER_FEATURE = 16_000
WIDTH_SHARE, L0_SHARE = 1 / 3, 3 / 4
WARMUP_SHARE = 20
CONTROL = "control: "
REPORT = "synth"


def run_synth(
    config: SynthConfig,
    *,
    console: Console | None = None,
    out: Path | None = None,
    resume: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train, judge, print; write the numbers to `out` (JSON) if given.

    Args:
        config: what is trained on which world.
        console: where progress and tables go.
        out: file of the numbers, a new one.
        resume: folder for the checkpoints of each seed's training, from which the same call goes on.
        overwrite: whether `out` may be the report of an earlier call, which is replaced.

    Returns:
        `rows`: name -> list of ground-truth metrics (with `mean_max_decoder_cosine`), one per seed; `world`, `true_l0`,
        `n_features`, `k`, `samples` as they were used; the settings.

    Raises:
        UnbraidError: with what was wrong, what was expected and what to change.
    """

    console = console or Console(quiet=True)
    if out is not None:
        check_owned_json(out, REPORT, error=EvaluationError, overwrite=overwrite)
    world = build_world(config.world, pick_device(config.device))
    x_BD, codes = world.sample(PROBE_SAMPLES, generator(config.seeds[0], "synth", device=world.device))
    true_l0 = float(codes.l0)
    width = config.n_features or max(2, round(world.n_features * WIDTH_SHARE))
    k = config.k or max(1, round(true_l0 * L0_SHARE))
    samples = config.samples or world.n_features * SAMPLES_PER_FEATURE
    console.print(
        f"world {config.world}: {world.n_features} features in {world.d_model} dimensions, {true_l0:.1f} active; "
        f"SAEs of {width} features, k = {k}, {samples:,} samples",
        highlight=False,
    )
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with Stages(console) as bar:
        for seed in config.seeds:
            variants = [
                _settings(config, architecture, seed, width, k, samples) for architecture in config.architectures
            ]
            task = bar.add_task(f"{len(variants)} SAEs, seed {seed}", total=samples // config.batch)
            advance = lambda done, _, task=task: bar.update(task, completed=done)  # noqa: E731
            checkpoints = None if resume is None else resume / f"seed_{seed}"
            saes = train_on_world(world, variants, samples, config.batch, advance, checkpoints=checkpoints)
            for architecture, sae in zip(config.architectures, saes, strict=True):
                rows[architecture].append(_judged(sae, world, config))
            for name, control in controls_of(saes[-1], x_BD, generator(seed, "synth control")).items():
                rows[f"{CONTROL}{name}"].append(_judged(control, world, config))
    report = {
        "world": config.world,
        "true_l0": true_l0,
        "n_features": width,
        "k": k,
        "samples": samples,
        "settings": config.model_dump(mode="json"),
        "rows": dict(rows),
    }
    summary = {name: over_seeds(found) for name, found in rows.items()}
    for part in ground_truth_tables(summary, {name for name in rows if name.startswith(CONTROL)}):
        console.print(part, highlight=False, markup=False)
    if out is not None:
        write_owned_json(out, report, REPORT, error=EvaluationError, overwrite=overwrite)
    return report


def _settings(config: SynthConfig, architecture: str, seed: int, width: int, k: int, samples: int) -> VariantConfig:
    sparsity = {"k": k} if "k" in SAEConfig.kinds()[architecture].model_fields else {"lambda1": config.lambda1}
    return VariantConfig(
        seed=seed,
        sae=SAEConfig(architecture=architecture, n_features=width, **sparsity),
        decorrelation=config.decorrelation,
        optimiser=OptimiserConfig(lr=config.lr, warmup_steps=samples // config.batch // WARMUP_SHARE),
    )


def _judged(sae: Any, world: World, config: SynthConfig) -> dict[str, Any]:
    found = evaluate_ground_truth(sae, world, config.eval_samples).to_dict()
    return found | {"mean_max_decoder_cosine": max_cosines(sae.W_dec.detach()).double().mean().item()}


def over_seeds(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Each metric as (mean, standard deviation), None for the latter with one seed; metrics no seed has are None."""
    summary: dict[str, Any] = {}
    for name in rows[0]:
        values = np.array([row[name] for row in rows if row[name] is not None], dtype=float)
        spread = float(values.std(ddof=1)) if len(values) > 1 else None
        summary[name] = (float(values.mean()), spread) if len(values) else None
    return summary
