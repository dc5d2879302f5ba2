"""Time a training step of every architecture against one bare encoder product, our own dense path, and the peers.

    make peers                                # once: the other libraries, in an environment of their own
    python benchmarks/step.py                 # everything; about half an hour on two cores
    python benchmarks/step.py --architectures topk --shapes large --rounds 10
    python benchmarks/step.py --losses        # no timing: 500 steps each on fresh batches of the tiny shape

Every contender lives in a process of its own, trains on the same batches and is timed from one request for a batch to
the next. Contenders take turns, a few steps each, so that whatever else the machine does falls on all of them; reported
are medians over all rounds with the spread between quartiles, CPU time beside wall time (on a busy machine compare by
CPU), and the held-out loss after equal steps, so that no speed is bought with a worse step.
"""

import argparse
import json
import os
import platform
import statistics
import sys
from datetime import date
from pathlib import Path

from peers.turns import Contender

HERE = Path(__file__).parent
ROOT = HERE.parent
SHAPES = {
    "large": {"d_in": 512, "n_features": 8192, "batch": 2048, "k": 32},
    "small": {"d_in": 256, "n_features": 4096, "batch": 1024, "k": 32},
    "gpu": {"d_in": 768, "n_features": 16384, "batch": 4096, "k": 64},
    "tiny": {"d_in": 128, "n_features": 2048, "batch": 512, "k": 16},
}
LOSSES = {"shapes": ["tiny"], "rounds": 1, "steps": 500, "warmup": 1, "distinct_batches": 501, "lr": 1e-3}
# l0: what the ReLU-like architectures are timed at, since that is what a trained one has: their encoder biases are set
# so, and the learning rate is too small to leave it. Their losses come from `--losses`, which trains them from scratch.
HELD = {"l0": 60, "lr": 1e-7}
ARCHITECTURES = {
    "topk": {},
    "batch_topk": {},
    "relu": HELD | {"lambda1": 0.05},
    "jumprelu": HELD | {"lambda1": 1e-4, "sae": {"initial_threshold": 0.001, "bandwidth": 0.01}},
    "gated": HELD | {"lambda1": 0.05},
    "matryoshka": {},
}
PEERS = {
    "sae-lens": set(ARCHITECTURES),
    "dictionary-learning": set(ARCHITECTURES),
    "eai-sparsify": {"topk"},
}
DRIVERS = {
    "unbraid": "unbraid_steps.py",
    "unbraid, dense": "unbraid_steps.py",
    "unbraid, 1/16 dead": "unbraid_steps.py",
    "product": "product_steps.py",
    "product, reused memory": "product_steps.py",
    "sae-lens": "sae_lens_steps.py",
    "dictionary-learning": "dictionary_learning_steps.py",
    "eai-sparsify": "sparsify_steps.py",
}


def start(name: str, settings: dict, peers_python: Path) -> Contender:
    """A process that trains in the way of contender `name`."""
    python = peers_python if name in PEERS else Path(sys.executable)
    own = {"path": "dense" if name == "unbraid, dense" else "auto", "reuse": "reused" in name}
    own["dead"] = settings["n_features"] // 16 if name == "unbraid, 1/16 dead" else 0
    return Contender(name, python, HERE / "peers" / DRIVERS[name], settings | own)


def spread(values: list[float]) -> list[float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return [round(value, 2) for value in (middle, low, high)]


def settings_of(architecture: str, shape: str, arguments: argparse.Namespace) -> dict:
    """What every contender on one architecture and shape is told."""
    settings = SHAPES[shape] | {"sae": {}, "lambda1": 0.0, "l0": 0, "lr": arguments.lr} | ARCHITECTURES[architecture]
    settings |= {"architecture": architecture, "threads": arguments.threads, "seed": 0, "device": arguments.device}
    settings |= {"distinct_batches": arguments.distinct_batches}
    # While steps are timed no feature dies but those a contender says are dead.
    settings |= {"dead_after_tokens": None if arguments.losses else 1_000_000}
    if arguments.losses:
        settings |= {"l0": 0, "lr": arguments.lr}
    return settings


def run_cell(architecture: str, shape: str, arguments: argparse.Namespace) -> dict:
    """All contenders on one architecture and shape."""
    settings = settings_of(architecture, shape, arguments)
    names = ["unbraid"] if arguments.losses else [name for name in DRIVERS if name not in PEERS]
    names += [name for name in PEERS if architecture in PEERS[name] and arguments.peers_python.exists()]
    contenders = [start(name, settings, arguments.peers_python) for name in names if name not in arguments.without]
    for contender in contenders:
        contender.train(arguments.warmup)
    turns: dict[str, list[dict]] = {contender.name: [] for contender in contenders}
    for _ in range(arguments.rounds):
        for contender in contenders:
            turns[contender.name].append(contender.train(arguments.steps))
    results = {}
    for contender in contenders:
        held_out = {} if contender.name.startswith("product") else contender.ask({"score": True})
        taken = turns[contender.name]
        wall, cpu = (spread([step for turn in taken for step in turn[kind]]) for kind in ("wall_ms", "cpu_ms"))
        results[contender.name] = {
            "wall_ms": wall,
            "cpu_ms": cpu,
            "rows_per_second": round(settings["batch"] / wall[0] * 1e3),
            "peak_mib": round(taken[-1]["peak_mib"]),
            "held_out": held_out,
        }
        contender.dismiss()
    return {"architecture": architecture, "shape": shape, "settings": settings, "results": results}


def show(cell: dict) -> None:
    """The cell as a markdown table."""
    settings, ours = cell["settings"], cell["results"]["unbraid"]
    print(f"\n**{cell['architecture']}, {settings['d_in']} x {settings['n_features']}, B = {settings['batch']}**\n")
    print("| | wall ms (quartiles) | CPU ms | ours is faster, wall | CPU | held-out loss | L0 | peak MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for name, result in cell["results"].items():
        wall, cpu, score = result["wall_ms"], result["cpu_ms"], result["held_out"]
        loss, l0 = (f"{score['objective']:.4f}", f"{score['l0']:.1f}") if score else ("", "")
        ratios = f"{wall[0] / ours['wall_ms'][0]:.2f} | {cpu[0] / ours['cpu_ms'][0]:.2f}"
        times = f"{wall[0]:.0f} ({wall[1]:.0f}-{wall[2]:.0f}) | {cpu[0]:.0f}"
        print(f"| {name} | {times} | {ratios} | {loss} | {l0} | {result['peak_mib']} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["large", "small"])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=4, help="steps a contender takes in each round")
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--distinct-batches", type=int, default=16)
    parser.add_argument("--losses", action="store_true", help="train longer on fresh batches, for the loss alone")
    parser.add_argument("--without", nargs="*", default=[], help="contenders to leave out")
    parser.add_argument("--peers-python", type=Path, default=ROOT / ".venv-peers" / "bin" / "python")
    parser.add_argument(
        "--out", type=Path, default=None, help="JSON file whose other cells stay; default benchmarks/results/step.json"
    )
    if parser.parse_known_args()[0].losses:
        parser.set_defaults(**LOSSES)
    arguments = parser.parse_args()
    if not arguments.peers_python.exists():
        print(f"{arguments.peers_python} is missing, so no peer is timed; `make peers` makes it")
    out = arguments.out or HERE / "results" / ("losses.json" if arguments.losses else "step.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    machine = {"machine": platform.machine(), "cpus": os.cpu_count(), "python": platform.python_version()}
    taken = {"rounds": arguments.rounds, "steps": arguments.steps, "date": str(date.today()), **machine}
    cells = json.loads(out.read_text()) if out.exists() else {}
    for shape in arguments.shapes:
        for architecture in arguments.architectures:
            cell = run_cell(architecture, shape, arguments)
            show(cell)
            cells[f"{architecture}, {shape}"] = cell | {"taken": taken}
            out.write_text(json.dumps(cells, indent=1) + "\n")


if __name__ == "__main__":
    main()
