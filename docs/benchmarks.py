"""Write docs/benchmarks.md from the measurements in benchmarks/results: every table, so that none is typed by hand.

python docs/benchmarks.py          rewrites docs/benchmarks.md
python docs/benchmarks.py --check  fails when it is out of date
"""

import json
from pathlib import Path
from typing import Any

from generated import write_or_check

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
HEAD = """# Benchmarks

How fast unbraid is, beside other libraries and on other machines, and how to measure yours. Written by
`docs/benchmarks.py` from the JSON files in `benchmarks/results`.

## Measure your machine

    unbraid bench step                                   # a training step of six architectures
    unbraid bench step --shapes 768x24576x4096 --k 64    # D x N x B, any shape
    unbraid bench step --decorrelation none best         # the same with and without a penalty
    unbraid bench harvest demo                           # the model alone, from text to rows
    unbraid bench pipeline demo                          # from text to trained SAEs
    unbraid bench synth full                             # samples with known features, alone and learnt from

All contenders take turns, so that whatever else the machine does falls on all of them. Times are medians over turns
with quartiles; CPU time stands beside wall time, because on a shared machine only that can be compared. *Products* is
the wall time of a step over that of one bare encoder product of the same shape, which no step can leave out.

**To add your machine to this page**: run the command with `--out benchmarks/results/machines/NAME-step.json`, then
`python docs/benchmarks.py`, and send both files. The file names processor or GPU, cores, threads, memory, versions and
load; nothing in it names you.
"""
KINDS = {
    "step": ("A training step", "one step of the architectures and penalties named, none of them logged"),
    "harvest": ("The model alone", "one model batch from text to filtered rows"),
    "pipeline": ("From text to trained SAEs", "one refill of the buffer and the steps that use it up"),
    "synth": ("Samples with known features", "drawn alone, and learnt from by an SAE a quarter as wide as the world"),
}
CONTENDERS = {
    "unbraid": "unbraid",
    "unbraid, 1/16 dead": "unbraid, 1/16 of the features dead",
    "product, reused memory": "bare product",
    "sae-lens": "sae-lens",
    "dictionary-learning": "dictionary_learning",
    "eai-sparsify": "eai-sparsify",
}
PIPELINES = {
    "three sites, no penalty": "unbraid",
    "sae-lens, one pass": "sae-lens, one pass",
    "sae-lens, three runs": "sae-lens, three runs",
}
GPU = """## On a GPU

Nothing here has been timed on a GPU yet; `make gpu-report` measures a table in under nine minutes where there is one.

A step queues its work and does not wait for it. What the host waits for in one step, counted on a CPU that is taken for
an accelerator (numbers read, results whose shape depends on the data, numbers sent);
`tests/training/test_synchronisations.py` keeps it so:

| step | before | now |
|---|---|---|
| TopK | 6 | 0 |
| BatchTopK | 12 | 0 |
| Matryoshka, levels by index or by frequency | 13, 14 | 0 |
| TopK with dead features | 7 | 1: which ones |
| ReLU, JumpReLU, gated, most features active | 6 | 1: how many are |
| ReLU, JumpReLU, gated, few features active | 8, 11, 9 | 2: how many, and where |
| TopK, logged | 16 | 1: the line of metrics |
| TopK, penalty in decoder space | 32 | 11 |
| the same between two penalties (`interval`) | 12 | 1 |
| TopK, penalty in code space on every batch | 35 | 27 |
| the same between two penalties | 18 | 4 |

The buffer's rows lie on the GPU when they take at most half of what is free beside the SAEs' own memory; else they stay
on the host, and a batch is gathered into pinned memory and copied without waiting. On a CPU losses and weights are the
same to the byte either way, but where two entries at the cut of a BatchTopK are equal. A step whose loss or gradient is
not finite changes no weight either way; on a GPU it is told of at the next logged step or checkpoint.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *beside_peers(), GPU, *machines()])


def read(path: Path) -> dict[str, Any]:
    """A file of figures."""
    return json.loads(path.read_text(encoding="utf-8"))


def beside_peers() -> list[str]:
    """Steps and pipelines of the contenders that took turns in `benchmarks/step.py` and `benchmarks/pipeline.py`."""
    lines = ["## Beside other libraries", ""]
    lines += ["`python benchmarks/step.py`: wall / CPU milliseconds of a step, two threads."]
    cells = read(RESULTS / "step.json")
    for shape in ("large", "small"):
        here = {cell["architecture"]: cell for cell in cells.values() if cell["shape"] == shape}
        some = next(iter(here.values()))["settings"]
        lines += ["", f"**{some['d_in']} x {some['n_features']}, B = {some['batch']}**", ""]
        names = [name for name in CONTENDERS if any(name in cell["results"] for cell in here.values())]
        lines += [f"| | {' | '.join(CONTENDERS[name] for name in names)} |", "|---" * (len(names) + 1) + "|"]
        for architecture, cell in here.items():
            lines.append(f"| {architecture} | {' | '.join(_pair(cell['results'].get(name)) for name in names)} |")
    found = read(RESULTS / "pipeline_sae-lens_topk.json")
    what = "SmolLM2-135M read at three layers, a TopK SAE at each"
    lines += ["", f"`python benchmarks/pipeline.py --architecture topk`: {what}.", ""]
    lines += ["| | wall ms a step | CPU ms | the model's share, ms |", "|---|---|---|---|"]
    for name, title in PIPELINES.items():
        row = found["results"][name]
        lines.append(f"| {title} | {row['wall_ms']:.0f} | {row['cpu_ms']:.0f} | {row['model_ms']:.0f} |")
    return [*lines, ""]


def _pair(result: dict[str, Any] | None) -> str:
    return f"{result['wall_ms'][0]:.0f} / {result['cpu_ms'][0]:.0f}" if result else ""


def machines() -> list[str]:
    """What `unbraid bench` found on each machine, by kind."""
    files = [read(path) for path in sorted((RESULTS / "machines").glob("*.json"))]
    lines = []
    for kind, (title, what) in KINDS.items():
        found = [file for file in files if file["kind"] == kind]
        lines += [f"## {title}", "", f"Times are of {what}.", ""] if found else []
        for file in found:
            lines += [*_machine(file), *_rows(file), ""]
    return lines


def _machine(file: dict[str, Any]) -> list[str]:
    machine, command = file["machine"], file["command"].split(" --out ")[0]
    name = machine["device_name"] or machine["processor"]
    memory = machine["device_gib"] or machine["memory_gib"]
    where = f"**{name}**, {machine['threads']} of {machine['cores']} cores, {memory} GiB, torch {machine['torch']}"
    return [f"{where}, load {machine['load']} before ({machine['date']}, `{command}`)", ""]


def _rows(file: dict[str, Any]) -> list[str]:
    speed = next(name for name in file["rows"][0] if name.endswith("_per_second"))
    products = ["products"] if "products" in file["rows"][0] else []
    head = ["", "wall ms (quartiles)", "CPU ms", speed.replace("_", " "), *products]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in file["rows"]:
        low, high = row["wall_ms_quartiles"]
        cells = [_what(row), f"{row['wall_ms']:.1f} ({low:.1f}-{high:.1f})", f"{row['cpu_ms']:.1f}", f"{row[speed]:,}"]
        cells += [f"{row['products']:.2f}"] if products else []
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _what(row: dict[str, Any]) -> str:
    name = row["what"] if row.get("penalty", "none") == "none" else f"{row['what']} + {row['penalty']}"
    if "shape" in row:
        return "{name}, {d_in} x {n_features}, B = {batch}".format(name=name, **row["shape"])
    if "sites" not in row:
        return name
    return f"{name}, {row['sites']} sites" + (f", {row['saes']} SAEs" if row["saes"] else "")


if __name__ == "__main__":
    write_or_check("benchmarks.md", page())
