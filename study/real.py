"""The real model: SAEs on SmolLM2-135M, each method beside a twin without a penalty, on the same cached activations.

    python study/real.py harvest                   # once: the model's activations into study/cache
    python study/real.py train                     # every run of the plan that is not complete
    python study/real.py judge                     # one line an SAE into study/results/real.jsonl
    python study/real.py cost                      # what a step of each method takes: results/real-cost.jsonl

Layers, tokens and widths are those two CPU cores could pay for; `--tokens 2000000` makes it longer. A run holds all
methods of one architecture, k, layer and seed; an interrupted one is resumed to the same bytes.
"""

import argparse
import json
import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from trials import RESULTS, append, read

import unbraid
from unbraid.activations.cache import CachedActivations
from unbraid.activations.rows import RowFilter
from unbraid.config import EvaluationConfig, RunConfig, SAEConfig
from unbraid.evaluation.geometry import composition_rate, max_cosines, seed_agreement
from unbraid.evaluation.suites import run_suites
from unbraid.randomness import generator
from unbraid.recipes import smollm2
from unbraid.run import fill_cache
from unbraid.training.normalisation import Normalisation
from unbraid.training.sae_trainer import new_trainer, train_step

HERE = Path(__file__).parent
CACHE, RUNS = HERE / "cache", HERE / "runs"
SUITES_EVERYWHERE: list[Any] = ["core", "correlation"]
SUITES_OF_HEADLINE: list[Any] = ["probing", "absorption"]
DECODER: dict[str, Any] = {"space": "decoder", "refresh": 16}
RARER: dict[str, Any] = {"floor": 0.1, "push": "rarer"}
METHODS: dict[str, dict[str, Any]] = {
    "none": {"method": "none"},
    "codes": {"lambda2": 0.1},
    "decoder": {**DECODER, "fraction": 0.01, "lambda2": 0.1, "neighbours": 64},
    "decoder-strong": {**DECODER, "lambda2": 0.64},
    "rarer": {**DECODER, "fraction": 0.01, "lambda2": 0.1, "neighbours": 64, **RARER},
    "rarer-strong": {**DECODER, "lambda2": 0.64, **RARER},
    "ortsae": {"method": "orthogonal", "lambda2": 0.25, "interval": 5},
}
"""What is compared: no penalty, the paper's form, decoder rows with the known world's weight and share of pairs, fewer
of them pushed harder, both also by the rarer row of a pair (tau no lower than 0.6 of chance level, as on the known
world), and OrtSAE every fifth step (its paper's cheap form, as good there as every step)."""
WARM_STEPS, TIMED_STEPS, TIMED_ON = 40, 80, 65_536
HEADLINE = 14
"""The layer with three seeds, probing and absorption."""


@dataclass(frozen=True)
class Cell:
    """One run: an architecture at one k, layer and seed."""

    architecture: str
    k: int
    layer: int
    seed: int

    @property
    def name(self) -> str:
        """Its run folder."""
        return f"{self.architecture}-k{self.k}-layer{self.layer}-s{self.seed}"


KINDS = ["batch_topk", "matryoshka"]
PLAN = [
    *(Cell(kind, 32, HEADLINE, seed) for seed in range(3) for kind in KINDS),
    *(Cell(kind, 32, layer, 0) for kind in KINDS for layer in (6, 22)),
    *(Cell("batch_topk", k, HEADLINE, 0) for k in (16, 64)),
]
"""In the order of worth."""


def settings(cell: Cell, asked: argparse.Namespace) -> RunConfig:
    """The run of one cell: every method a variant, nothing else differs."""
    base = smollm2()
    changes: dict[str, Any] = {
        "name": cell.name,
        "seed": cell.seed,
        "cache": str(CACHE),
        "model": base.model.model_copy(update={"sites": [f"resid_post.{cell.layer}"]}),
        "buffer": base.buffer.model_copy(update={"norm_limit": 10.0}),  # What the table was made with.
        "sae": SAEConfig.model_validate(
            {
                "architecture": cell.architecture,
                "k": cell.k,
                "n_features": asked.width,
                "dead_after_tokens": 200_000,
                "aux_weight": 1 / 32,  # What the table was made with.
            }
        ),
        "optimiser": base.optimiser.model_copy(update={"lr": 1e-3, "warmup_steps": 50, "sparsity_warmup_steps": 0}),
        "training": base.training.model_copy(
            update={
                "tokens": asked.tokens,
                "batch_tokens": 1024,
                "threads": 1,
                "log_every": 50,
                "checkpoint_every": 400,
            }
        ),
        "variants": {
            method: {f"decorrelation.{name}": value for name, value in form.items()} for method, form in METHODS.items()
        },
    }
    return RunConfig.model_validate(base.model_copy(update=changes).model_dump())


def harvest(asked: argparse.Namespace) -> None:
    """The activations of every layer from one pass of the model."""
    config = settings(PLAN[0], asked)
    sites = [f"resid_post.{layer}" for layer in sorted({cell.layer for cell in PLAN})]
    model = config.model.model_copy(update={"sites": sites})
    fill_cache(RunConfig.model_validate(config.model_copy(update={"model": model}).model_dump()), CACHE)


def train(cells: list[Cell], asked: argparse.Namespace) -> None:
    """Every run that is not complete."""
    for cell in cells:
        folder = RUNS / cell.name
        if (folder / "config.json").is_file():
            unbraid.resume(folder)
        else:
            unbraid.train(settings(cell, asked), folder)
        print(f"trained {cell.name}", flush=True)


def judge(cells: list[Cell]) -> None:
    """`unbraid eval` of every complete run, and what compares seeds: one line an SAE."""
    path = RESULTS / "real.jsonl"
    done = {line["run"] for line in read(path.stem)}
    for cell in cells:
        folder = RUNS / cell.name
        if cell.name in done or not (folder / "summary.json").is_file():
            continue
        measured = EvaluationConfig(
            suites=SUITES_EVERYWHERE + (SUITES_OF_HEADLINE if cell.layer == HEADLINE else []),
            replicates=2,
            splice_contexts=8,
            controls=cell.seed == 0 and cell.k == 32,
        )
        report = run_suites(folder, measured)
        summary = json.loads((folder / "summary.json").read_text())["saes"]
        for name, found in [*report["saes"].items(), *report["controls"].items()]:
            sae = unbraid.load(folder / "saes" / name) if name in summary else None
            append(path, {"run": cell.name, "sae": name, "metrics": dict(numbers(found, summary.get(name), sae))})
        print(f"judged {cell.name}", flush=True)


def numbers(found: dict[str, Any], summary: dict[str, Any] | None, sae: Any) -> Iterator[tuple[str, float | None]]:
    """What the tables show of one SAE or control; decoder rows are looked at only where they were learned."""
    core, codes = found["core"], found.get("correlation", {})
    yield "l0", core["sparsity"]["l0"]
    yield "r2", core["reconstruction_quality"]["r2"]
    yield "ce_score", core["model_performance_preservation"]["ce_loss_score"]
    yield "alive", core["misc_metrics"]["frac_alive"]
    yield "correlation_top", codes.get("cosine", {}).get("top")
    yield "correlation_top_supported", codes.get("cosine_supported", {}).get("top")
    if "probing" in found:
        for k in (1, 5):
            yield f"probe_top_{k}", found["probing"]["sae"][f"sae_top_{k}_test_accuracy"]
    if "absorption" in found:
        for name in ("absorption_fraction", "full_absorption"):
            yield name, found["absorption"]["mean"][f"mean_{name}_score"]
    if sae is not None and summary is not None:
        W_dec = sae.W_dec.detach().float()
        yield "dead", summary["dead_fraction"]
        yield "mean_max_decoder_cosine", float(max_cosines(W_dec).double().mean())
        yield "composition", composition_rate(W_dec, 200)


def agreement(cells: list[Cell]) -> None:
    """How alike the decoders of two seeds of one method are: a line for each pair of seeds."""
    path = RESULTS / "real-agreement.jsonl"
    done = {line["pair"] for line in read(path.stem)}
    for first in cells:
        for second in cells:
            alike = replace(first, seed=0) == replace(second, seed=0) and first.seed < second.seed
            pair = f"{first.name} {second.name}"
            complete = all((RUNS / cell.name / "summary.json").is_file() for cell in (first, second))
            if not alike or pair in done or not complete:
                continue
            folders = [RUNS / cell.name / "saes" for cell in (first, second)]
            for one in sorted(folders[0].iterdir()):
                rows = [unbraid.load(folder / one.name).W_dec.detach() for folder in folders]
                append(path, {"pair": pair, "sae": one.name, "metrics": {"agreement": seed_agreement(*rows)}})


def rows_of(config: RunConfig, count: int) -> torch.Tensor:
    """Activations a run trains on, `[count, D]`, shuffled, as training's batches are."""
    source = CachedActivations(config, CACHE)
    kept = RowFilter(config.buffer, config.sites, source.special_ids)
    parts: list[torch.Tensor] = []
    for chunk in source.chunks(None):
        parts.append(kept(chunk)[0])
        if sum(map(len, parts)) >= count:
            break
    x_RD = torch.cat(parts)[:count]
    return x_RD[torch.randperm(len(x_RD), generator=generator(0, "study pairs"))]


def cost(asked: argparse.Namespace) -> None:
    """Steps of every method of both architectures on the same cached batches, taking turns; one line each."""
    path = RESULTS / "real-cost.jsonl"
    path.unlink(missing_ok=True)
    torch.set_num_threads(2)
    for cell in PLAN[: len(KINDS)]:
        config = settings(cell, asked)
        rows = rows_of(config, TIMED_ON)
        normalise = Normalisation.of(rows)
        batches = normalise(rows).split(1024)
        trainers = {method: new_trainer(config, 0, method, [normalise], torch.device("cpu")) for method in METHODS}
        taken: dict[str, list[tuple[float, float]]] = {method: [] for method in METHODS}
        for step in range(WARM_STEPS + TIMED_STEPS):
            for method, trainer in trainers.items():
                wall, cpu = time.perf_counter(), time.process_time()
                train_step(trainer, batches[step % len(batches)], step, 1e-3, log=False)
                if step >= WARM_STEPS:
                    taken[method].append((time.perf_counter() - wall, time.process_time() - cpu))
        for method, times in taken.items():
            # Means of whole cycles (16 steps choose pairs once, 5 push OrtSAE's once) against the same steps of `none`.
            ratios = {
                f"{kind}_ratio": statistics.fmean(own[i] for own in times)
                / statistics.fmean(none[i] for none in taken["none"])
                for i, kind in enumerate(("wall", "cpu"))
            }
            milliseconds = {"wall_ms": 1e3 * statistics.fmean(own[0] for own in times)}
            append(path, {"architecture": cell.architecture, "method": method, "metrics": ratios | milliseconds})


def main() -> None:
    """One step of the experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["harvest", "train", "judge", "cost"])
    parser.add_argument("--tokens", type=int, default=819_200)
    parser.add_argument("--width", type=int, default=4608)
    parser.add_argument("--only", default="", help="runs whose name this pattern finds")
    asked = parser.parse_args()
    cells = [cell for cell in PLAN if re.search(asked.only, cell.name)]
    if asked.step == "harvest":
        harvest(asked)
    elif asked.step == "cost":
        cost(asked)
    elif asked.step == "train":
        train(cells, asked)
    else:
        judge(cells)
        agreement(cells)


if __name__ == "__main__":
    main()
