"""Tokens per second from text to trained SAEs: one site, three sites x two variants, from a cache; beside sae-lens.

    make peers                                # once: sae-lens, in an environment of its own
    python benchmarks/pipeline.py --prepare   # once: trains until codes are about as sparse as they stay
    python benchmarks/pipeline.py             # measures; about ten minutes on two quiet cores

The run is `BASE`: SmolLM2-135M read at layers 2, 5 and 8, ReLU SAEs (or TopK ones, by `--architecture topk`), N =
2304, B = 512, a buffer of 72 contexts. sae-lens gets the same model, documents, buffer, batch, width and loss (it has
no penalty), and does the three-site job in both ways it can: in three runs, and with its trainer of several SAEs on
one model pass. Contenders take turns in processes of their own, 24 steps each, which is four model passes. Reported
are medians over turns, CPU time beside wall time; times of three runs are added up.
"""

import argparse
import json
import platform
import shutil
import statistics
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch
from peers.turns import Contender

from unbraid.activations.packaged_model import packaged_model_folder
from unbraid.config import (
    BufferConfig,
    ModelConfig,
    OptimiserConfig,
    RunConfig,
    SAEConfig,
    TrainingConfig,
    overridden,
)
from unbraid.text import open_source

HERE = Path(__file__).parent
ROOT = HERE.parent
UNBRAID, SAE_LENS = HERE / "peers" / "unbraid_pipeline.py", HERE / "peers" / "sae_lens_pipeline.py"
BASE = RunConfig(
    name="benchmark",
    model=ModelConfig(sites=["resid_post.2", "resid_post.5", "resid_post.8"]),
    buffer=BufferConfig(contexts=72),
    sae=SAEConfig(n_features=2304, lambda1=0.05, decoder_init_norm=1.0, dead_after_tokens=100_000),
    optimiser=OptimiserConfig(lr=1e-3, warmup_steps=50, sparsity_warmup_steps=20),
    training=TrainingConfig(
        tokens=160_000, batch_tokens=512, log_every=5, checkpoint_every=100, held_out_tokens=16_384
    ),
    variants={"decorrelated": {}, "twin": {"decorrelation.lambda2": 0.0}},
)
WHOLE = "three sites x 2"
CACHED = f"{WHOLE}, from a cache"
CUT_FROM_IT = ["deepest site x 1", WHOLE, "three sites, no penalty"]
DECORRELATED, TWIN = ({name: BASE.variants[name]} for name in ("decorrelated", "twin"))
CASES = {
    "deepest site x 1": {"sites": ["resid_post.8"], "variants": DECORRELATED},
    WHOLE: {},
    CACHED: {"cached": True},
    "three sites, no penalty": {"variants": TWIN},
    "sae-lens, layer 2": {"layers": [2]},
    "sae-lens, layer 5": {"layers": [5]},
    "sae-lens, layer 8": {"layers": [8]},
    "sae-lens, one pass": {"layers": [2, 5, 8]},
}
"""Ours are changes to `BASE`; sae-lens's are the layers it reads."""
COMPARISONS = {
    "sharing": ["deepest site x 1", WHOLE, CACHED],
    "sae-lens": [name for name in CASES if "sae-lens" in name or name == "three sites, no penalty"],
}
THREE_RUNS = [f"sae-lens, layer {layer}" for layer in (2, 5, 8)]
TURN, WARM_UP = 24, 6
D_MODEL = 576
TEXT_CHARACTERS = 4_000_000


def config_of(name: str, architecture: str, cache: Path | None, checkpoint_every: int = 0) -> RunConfig:
    """`BASE` as the case changes it."""
    changes = {
        "sae.architecture": architecture,
        "model.sites": CASES[name].get("sites", BASE.model.sites),
        "variants": CASES[name].get("variants", BASE.variants),
        "cache": str(cache) if cache else None,
        "training.checkpoint_every": checkpoint_every,
    }
    return overridden(BASE, changes, "benchmark")[0]


def prepare(folder: Path, architecture: str, steps: int, threads: int) -> None:
    """Train `BASE` to a checkpoint after `steps` steps, from a cache of its activations, and cut our cases from it.

    A variant trained beside others is the same as one trained alone, so each case takes its SAEs and its sites' rows.
    """
    from unbraid.run import fill_cache
    from unbraid.training.checkpoint import list_checkpoints, read_checkpoint, write_checkpoint
    from unbraid.training.run_folder import RunFolder

    fill_cache(BASE, folder / "cache")
    write_text(folder / "text.parquet")
    whole = config_of(CACHED, architecture, folder / "cache", steps)
    shutil.rmtree(folder / CACHED, ignore_errors=True)
    contender = ours(CACHED, folder / CACHED, whole, threads)
    contender.train(steps + 1)
    contender.dismiss()
    tensors, state = read_checkpoint(list_checkpoints(folder / CACHED / "checkpoints")[-1])
    for name in CUT_FROM_IT:
        config = config_of(name, architecture, None)
        shutil.rmtree(folder / name, ignore_errors=True)
        run = RunFolder.create(folder / name, config)
        places = {f"rows.{place}": whole.sites.index(site) for place, site in enumerate(config.sites)}
        buffer = {key: tensors["buffer"][key] for key in ("unread", "generator")}
        buffer |= {key: tensors["buffer"][f"rows.{place}"] for key, place in places.items()}
        limits = [state["buffer"]["filter"]["limits"][place] for place in places.values()]
        names = [config.sae_name(site, variant) for site in config.sites for variant in config.variants]
        kept = {"buffer": buffer} | {f"sae-{name}": tensors[f"sae-{name}"] for name in names}
        filtered = state["buffer"] | {"filter": state["buffer"]["filter"] | {"limits": limits}}
        read_live = {part: state["run"]["source"][part] for part in ("model", "text")}
        own = {"buffer": filtered, "run": {"settings": run.first_settings, "source": read_live}}
        write_checkpoint(run.checkpoints, steps, kept, state | {"metrics_offset": 0} | own, keep=1)


def write_text(path: Path) -> None:
    """The documents of `BASE` in its order, for libraries that read parquet."""
    import pyarrow
    import pyarrow.parquet

    texts, characters = [], 0
    for document in open_source(BASE.text).documents():
        texts.append(document.text)
        characters += len(document.text)
        if characters > TEXT_CHARACTERS:
            break
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)


def ours(name: str, run: Path, config: RunConfig, threads: int) -> Contender:
    """A process that trains `config` in the folder `run`, from its checkpoint if it has one."""
    settings = {"config": config.model_dump(mode="json"), "run": str(run), "threads": threads}
    return Contender(name, Path(sys.executable), UNBRAID, settings)


def start(name: str, folder: Path, scratch: Path, arguments: argparse.Namespace) -> Contender:
    """A process for one case, ready for its first turn."""
    case = CASES[name]
    if "layers" not in case:
        run = Path(shutil.copytree(folder / name, scratch / name))
        config = config_of(name, arguments.architecture, folder / "cache" if "cached" in case else None)
        return ours(name, run, config, arguments.threads)
    settings = {
        "layers": case["layers"],
        "model": str(packaged_model_folder("smollm2")),
        "text": str(folder / "text.parquet"),
        "d_in": D_MODEL,
        "n_features": BASE.sae.n_features,
        "architecture": arguments.architecture,
        "k": SAEConfig(architecture="topk").k,
        "lambda1": BASE.sae.sparsity_weight,
        "lr": BASE.optimiser.lr,
        "batch": BASE.training.batch_tokens,
        "buffer_contexts": BASE.buffer.contexts,
        "batch_contexts": BASE.model.batch_contexts,
        "context_length": BASE.text.context_length,
        "threads": arguments.threads,
    }
    return Contender(name, arguments.peers_python, SAE_LENS, settings)


def measure(names: list[str], folder: Path, arguments: argparse.Namespace) -> dict[str, dict]:
    """Medians over turns of every contender, in milliseconds a step."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        contenders = [start(name, folder, Path(scratch), arguments) for name in names]
        turns: dict[str, list[dict]] = {name: [] for name in names}
        for contender in contenders:
            contender.train(WARM_UP)
        for number in range(arguments.rounds):
            for contender in contenders:
                turns[contender.name].append(contender.train(TURN))
            print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
        for contender in contenders:
            contender.dismiss()
    return {name: summary(taken) for name, taken in turns.items()}


def summary(turns: list[dict]) -> dict:
    """One contender's turns: medians, and quartiles of the wall time."""

    def a_step(totals: list[float]) -> list[float]:
        return [round(total / TURN, 1) for total in totals]

    wall, cpu = (a_step([sum(turn[kind]) for turn in turns]) for kind in ("wall_ms", "cpu_ms"))
    model, feed = (a_step([turn["parts_ms"].get(part, 0.0) for turn in turns]) for part in ("model", "feed"))
    buffer = [both - alone for both, alone in zip(feed, model, strict=True)]
    found = {
        "wall_ms": statistics.median(wall),
        "wall_ms_of_each_turn": wall,
        "cpu_ms": statistics.median(cpu),
        "model_ms": statistics.median(model),
        "buffer_ms": round(statistics.median(buffer), 1),
        "peak_mib": round(max(turn["peak_mib"] for turn in turns)),
    }
    found["sae_ms"] = round(found["wall_ms"] - found["model_ms"] - found["buffer_ms"], 1)
    return found | ({"l0": round(turns[-1]["l0"], 1)} if "l0" in turns[-1] else {})


def added_up(runs: list[dict]) -> dict:
    """Runs made one after another: times add up, memory does not."""
    total = {key: round(sum(run[key] for run in runs), 1) for key in runs[0] if key.endswith("_ms")}
    return total | {"peak_mib": max(run["peak_mib"] for run in runs)}


def show(results: dict[str, dict]) -> None:
    """A table in Markdown."""
    print("| | tokens/s | ms a step | CPU ms | model | buffer | SAEs | peak MiB | L0 |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, found in results.items():
        shares = " | ".join(f"{found[part] / found['wall_ms']:.0%}" for part in ("model_ms", "buffer_ms", "sae_ms"))
        rate = BASE.training.batch_tokens / found["wall_ms"] * 1e3
        print(
            f"| {name} | {rate:,.0f} | {found['wall_ms']:,.0f} | {found['cpu_ms']:,.0f} | {shares} | "
            f"{found['peak_mib']:,} | {found.get('l0', '')} |"
        )


def ratios(results: dict[str, dict]) -> dict[str, dict[str, float]]:
    """What the comparison is made for, by wall and by CPU time."""
    asked = {
        "three sites x 2 over deepest site x 1": (WHOLE, "deepest site x 1"),
        "sae-lens in three runs over ours": ("sae-lens, three runs", "three sites, no penalty"),
        "sae-lens in one pass over ours": ("sae-lens, one pass", "three sites, no penalty"),
    }
    return {
        words: {kind: round(results[over][f"{kind}_ms"] / results[under][f"{kind}_ms"], 2) for kind in ("wall", "cpu")}
        for words, (over, under) in asked.items()
        if over in results and under in results
    }


def main() -> None:
    """Prepare, or measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", action="store_true", help="harvest and train the starting points")
    parser.add_argument("--compare", nargs="+", choices=COMPARISONS, default=list(COMPARISONS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trained-steps", type=int, default=60, help="steps of the starting points")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--architecture", choices=["relu", "topk"], default="relu")
    parser.add_argument("--folder", type=Path, help="default: cache/benchmark-pipeline-ARCHITECTURE")
    parser.add_argument("--peers-python", type=Path, default=ROOT / ".venv-peers" / "bin" / "python")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.folder = arguments.folder or ROOT / "cache" / f"benchmark-pipeline-{arguments.architecture}"
    if arguments.prepare or not (arguments.folder / "text.parquet").exists():
        prepare(arguments.folder, arguments.architecture, arguments.trained_steps, arguments.threads)
    if arguments.prepare:
        return
    for comparison in arguments.compare:
        results = measure(COMPARISONS[comparison], arguments.folder, arguments)
        if THREE_RUNS[0] in results:
            results["sae-lens, three runs"] = added_up([results[name] for name in THREE_RUNS])
        show(results)
        print(json.dumps(ratios(results), indent=1))
        machine = {
            "cpu": cpu_name(),
            "threads": arguments.threads,
            "torch": torch.__version__,
            "date": str(date.today()),
        }
        report = {"machine": machine, "rounds": arguments.rounds, "ratios": ratios(results), "results": results}
        target = HERE / "results" / f"pipeline_{comparison}_{arguments.architecture}.json"
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(report, indent=1) + "\n")


def cpu_name() -> str:
    """Model name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
