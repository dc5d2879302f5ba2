"""The real model: SAEs on SmolLM2-135M, each method beside a twin without a penalty, on the same cached activations.

    python study/real.py harvest                   # once: the model's activations into study/cache
    python study/real.py train                     # every run of the plan that is not complete
    python study/real.py judge                     # one line an SAE into study/results/real.jsonl

This is the issue's experiment at the size two CPU cores could pay for: one layer of three and 0.4 M tokens. The whole
one is the same with `--layers 6 14 22 --tokens 2000000`. A run holds all methods of one architecture, k and seed; an
interrupted one is resumed to the same bytes.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trials import RESULTS, append

import unbraid
from unbraid.config import EvaluationConfig, RunConfig
from unbraid.evaluation.geometry import composition_rate, max_cosines, seed_agreement
from unbraid.evaluation.suites import run_suites
from unbraid.recipes import smollm2
from unbraid.run import fill_cache

HERE = Path(__file__).parent
CACHE, RUNS = HERE / "cache", HERE / "runs"
METHODS: dict[str, dict[str, Any]] = {
    "none": {"method": "none", "lambda2": 0.0},
    "codes": {"lambda2": 0.1},
    "decoder-floor": {"space": "decoder", "lambda2": 0.3, "floor": "chance", "refresh": 16},
    "ortsae": {"method": "orthogonal", "lambda2": 0.25, "interval": 5},
}
"""What is compared: no penalty, the paper's form, decoder space above chance level, and OrtSAE every fifth step (its
paper's cheap form, as good there as every step)."""


@dataclass(frozen=True)
class Cell:
    """One run: an architecture at one k and seed."""

    architecture: str
    k: int
    seed: int

    @property
    def name(self) -> str:
        """Its run folder."""
        return f"{self.architecture}-k{self.k}-s{self.seed}"


PLAN = [
    Cell("batch_topk", 32, 0),
    Cell("batch_topk", 32, 1),
    Cell("matryoshka", 32, 0),
    Cell("batch_topk", 32, 2),
    Cell("matryoshka", 32, 1),
    Cell("batch_topk", 64, 0),
    Cell("batch_topk", 16, 0),
    Cell("matryoshka", 32, 2),
]
"""In the order of worth."""


def settings(cell: Cell, asked: argparse.Namespace) -> RunConfig:
    """The run of one cell: every method a variant, nothing else differs."""
    base = smollm2()
    changes: dict[str, Any] = {
        "name": cell.name,
        "seed": cell.seed,
        "cache": str(CACHE),
        "model": base.model.model_copy(update={"sites": [f"resid_post.{layer}" for layer in asked.layers]}),
        "sae": base.sae.model_copy(
            update={
                "architecture": cell.architecture,
                "k": cell.k,
                "n_features": asked.width,
                "dead_after_tokens": 200_000,
            }
        ),
        "optimiser": base.optimiser.model_copy(update={"lr": 1e-3, "warmup_steps": 50, "sparsity_warmup_steps": 0}),
        "training": base.training.model_copy(
            update={
                "tokens": asked.tokens,
                "batch_tokens": 1024,
                "threads": 1,
                "log_every": 50,
                "checkpoint_every": 200,
            }
        ),
        "variants": {
            method: {f"decorrelation.{name}": value for name, value in form.items()} for method, form in METHODS.items()
        },
    }
    return RunConfig.model_validate(base.model_copy(update=changes).model_dump())


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
    done = {line["run"] for line in read(path)}
    for cell in cells:
        folder = RUNS / cell.name
        if cell.name in done or not (folder / "summary.json").is_file():
            continue
        measured = EvaluationConfig(
            suites=["core", "correlation"], replicates=2, splice_contexts=4, controls=cell.seed == 0
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
    if sae is not None and summary is not None:
        W_dec = sae.W_dec.detach().float()
        yield "dead", summary["dead_fraction"]
        yield "mean_max_decoder_cosine", float(max_cosines(W_dec).double().mean())
        yield "composition", composition_rate(W_dec, 300)


def agreement(cells: list[Cell]) -> None:
    """How alike the decoders of two seeds of one method are: a line for each pair of seeds."""
    path = RESULTS / "real-agreement.jsonl"
    done = {line["pair"] for line in read(path)}
    for first in cells:
        for second in cells:
            alike = (first.architecture, first.k) == (second.architecture, second.k) and first.seed < second.seed
            pair = f"{first.name} {second.name}"
            complete = all((RUNS / cell.name / "summary.json").is_file() for cell in (first, second))
            if not alike or pair in done or not complete:
                continue
            folders = [RUNS / cell.name / "saes" for cell in (first, second)]
            for one in sorted(folders[0].iterdir()):
                rows = [unbraid.load(folder / one.name).W_dec.detach() for folder in folders]
                append(path, {"pair": pair, "sae": one.name, "metrics": {"agreement": seed_agreement(*rows)}})


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a table."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def main() -> None:
    """One step of the experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["harvest", "train", "judge"])
    parser.add_argument("--layers", type=int, nargs="+", default=[6])
    parser.add_argument("--tokens", type=int, default=409_600)
    parser.add_argument("--width", type=int, default=2304)
    parser.add_argument("--only", default="", help="runs whose name holds this")
    asked = parser.parse_args()
    cells = [cell for cell in PLAN if asked.only in cell.name]
    if asked.step == "harvest":
        fill_cache(settings(PLAN[0], asked), CACHE)
    elif asked.step == "train":
        train(cells, asked)
    else:
        judge(cells)
        agreement(cells)


if __name__ == "__main__":
    main()
