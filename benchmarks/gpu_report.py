"""Everything worth knowing of a GPU in one sitting of nine minutes: does it compute the same, and how fast.

    make gpu-report                                  # on the first GPU; writes report.json and report.md
    python benchmarks/gpu_report.py --toy            # the same on a CPU at toy sizes, in a minute
    python benchmarks/gpu_report.py --parts tests "steps 16k"

Each part is a process of its own with a limit of its own, and what is left of the whole at most: one that fails, hangs
or runs out of memory is recorded with its last words, and the next one begins. The file and the page, in
benchmarks/results/gpu, are written after each part, so that whatever ends the sitting, what was found stays.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from unbraid.bench.machine import describe
from unbraid.bench.steps import Shape, measure_steps, settings_of
from unbraid.bench.whole import measure_recipes, measure_world
from unbraid.config import OptimiserConfig
from unbraid.device import pick_device
from unbraid.files import write_whole
from unbraid.recipes import RECIPES
from unbraid.run import open_activations

HERE = Path(__file__).parent
ROOT = HERE.parent
MINUTES = 9.0
LAST_WORDS = 1500
ARCHITECTURES = ("topk", "batch_topk", "matryoshka", "jumprelu")


class Sizes(NamedTuple):
    """What is measured."""

    d_in: int
    batch: int
    k: int
    widths: tuple[int, int, int]
    rounds: int
    steps: int
    world: str
    world_batch: int
    recipe: str


FULL = Sizes(2304, 4096, 64, (16_384, 65_536, 262_144), 5, 4, "full", 8192, "demo")
TOY = Sizes(16, 32, 4, (64, 128, 256), 1, 1, "unit", 32, "tiny")
TRITON = "tests/kernels/test_triton_products.py"

Rows = list[dict[str, Any]]


Measure = Callable[[Sizes, torch.device], Iterator[Rows]]
"""A part: its rows, some at a time, so that those before the limit are kept."""


def steps_of_width(number: int) -> Measure:
    """Steps of each architecture at one width, one after the other, because together they may not fit."""

    def measure(sizes: Sizes, device: torch.device) -> Iterator[Rows]:
        shape, how = Shape(sizes.d_in, sizes.widths[number], sizes.batch), (sizes.k, device, sizes.rounds, sizes.steps)
        for name in ARCHITECTURES:
            yield each(name, lambda name=name: measure_steps(shape, [name], ["none"], *how))

    return measure


def decorrelation(sizes: Sizes, device: torch.device) -> Iterator[Rows]:
    """Steps with and without the penalties of the presets."""
    how = sizes.k, device, sizes.rounds, sizes.steps
    for width in sizes.widths[:2]:
        shape = Shape(sizes.d_in, width, sizes.batch)
        for preset in ("best", "paper"):
            asked = shape, ["batch_topk"], ["none", preset]
            yield each(f"{preset}, {width}", lambda asked=asked: measure_steps(*asked, *how))


def bfloat16(sizes: Sizes, device: torch.device) -> Iterator[Rows]:
    """Steps with the encoder's product in bfloat16."""
    shape = Shape(sizes.d_in, sizes.widths[0], sizes.batch)
    how = sizes.k, device, sizes.rounds, sizes.steps, "bfloat16"
    yield each("bfloat16", lambda: measure_steps(shape, ["topk", "batch_topk"], ["none"], *how))


def synthetic(sizes: Sizes, device: torch.device) -> Iterator[Rows]:
    """Samples per second of the world of SynthSAEBench, drawn and learnt from."""
    saes = [settings_of(name, 2 * sizes.d_in, sizes.k // 2, "none") for name in ("topk", "batch_topk")]
    saes = [sae.model_copy(update={"optimiser": OptimiserConfig(lr=1e-3)}) for sae in saes]
    how = sizes.world_batch, device, sizes.rounds, sizes.steps
    yield each(sizes.world, lambda: measure_world(sizes.world, saes, *how))


def whole(sizes: Sizes, device: torch.device) -> Iterator[Rows]:
    """Tokens per second of the model alone and from text to trained SAEs."""
    asked = [(sizes.recipe, RECIPES[sizes.recipe]())]
    for kind in ("harvest", "pipeline"):
        found = each(kind, lambda kind=kind: measure_recipes(kind, asked, open_activations, device, 2))
        yield [row | {"what": f"{kind}: {row['what']}"} for row in found]


def each(what: str, measure: Callable[[], Rows]) -> Rows:
    """The rows of a measurement, or one row that says why there are none."""
    try:
        return measure()
    except Exception as error:
        return [{"what": what, "error": f"{type(error).__name__}: {str(error)[:300]}"}]
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class Part(NamedTuple):
    """A part of the report: what it is called, its limit in seconds, and what it does, if not a command."""

    name: str
    seconds: int
    measure: Measure | None = None


PARTS = (
    Part("tests", 120),
    Part("kernels", 60),
    Part("steps 16k", 60, steps_of_width(0)),
    Part("synthetic samples", 60, synthetic),
    Part("steps 65k", 80, steps_of_width(1)),
    Part("decorrelation", 90, decorrelation),
    Part("bfloat16", 40, bfloat16),
    Part("tokens", 90, whole),
    Part("steps 262k", 120, steps_of_width(2)),
    Part("peers", 120),
)
"""The most useful first: what does not fit into the time is the end of this list."""


def command_of(part: Part, asked: argparse.Namespace, out: Path) -> list[str] | str:
    """The command line of a part; a string says why there is none."""
    if part.name in ("tests", "kernels"):
        of_part = ["-m", "gpu"] if part.name == "tests" else [TRITON]
        chosen = [TRITON, "-k", "1024"] if asked.toy else of_part
        plain = ["-q", "-p", "no:cacheprovider", "--override-ini=addopts=", "--import-mode=importlib"]
        return [sys.executable, "-m", "pytest", *plain, *chosen]
    if part.name == "peers":
        python = ROOT / ".venv-peers" / "bin" / "python"
        if not python.exists():
            return "the other libraries are not installed; `make peers` installs them"
        device = "cpu" if asked.toy else "cuda"
        how = ["--architectures", "topk", "batch_topk", "--rounds", "2", "--steps", "2", "--device", device]
        shape = ["--shapes", "tiny" if asked.toy else "gpu", "--out", str(out)]
        return [sys.executable, str(HERE / "step.py"), *how, *shape, "--without", "unbraid, dense", "product"]
    how = ["--only", part.name, "--device", asked.device, *(["--toy"] if asked.toy else [])]
    return [sys.executable, str(Path(__file__)), *how, "--out", str(out)]


Run = Callable[[list[str], float], tuple[int | None, str]]
"""Runs a command with a limit in seconds: its exit status (none: the limit), and what it said."""


def run_command(command: list[str], seconds: float) -> tuple[int | None, str]:
    """See `Run`."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, timeout=seconds, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    except subprocess.TimeoutExpired as error:
        said = error.stdout or b""
        return None, said.decode(errors="replace") if isinstance(said, bytes) else said
    return done.returncode, done.stdout


def take(part: Part, asked: argparse.Namespace, left: float, run: Run) -> dict[str, Any]:
    """What came of a part: `state` (done, failed, out of time, left out), `seconds`, `rows` or `said`."""
    if left < 10:
        return {"state": "left out", "seconds": 0.0, "said": "no time was left"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "part.json"
        command = command_of(part, asked, out)
        if isinstance(command, str):
            return {"state": "left out", "seconds": 0.0, "said": command}
        began = time.monotonic()
        status, said = run(command, min(part.seconds, left))
        state = "out of time" if status is None else "done" if status == 0 else "failed"
        found: dict[str, Any] = {"state": state, "seconds": round(time.monotonic() - began, 1)}
        if out.is_file():
            found["rows"] = rows_of(json.loads(out.read_text(encoding="utf-8")))
        if "rows" not in found or state != "done":
            found["said"] = said[-LAST_WORDS:]
        return found


def rows_of(found: Any) -> Rows:
    """Rows as they are, and the cells of `benchmarks/step.py` as rows."""
    if isinstance(found, list):
        return found
    return [
        {
            "what": f"{cell['architecture']}: {name}",
            "shape": {key: cell["settings"][key] for key in ("d_in", "n_features", "batch", "k")},
            "wall_ms": result["wall_ms"][0],
            "wall_ms_quartiles": result["wall_ms"][1:],
            "cpu_ms": result["cpu_ms"][0],
            "rows_per_second": result["rows_per_second"],
        }
        for cell in found.values()
        for name, result in cell["results"].items()
    ]


def page_of(report: dict[str, Any]) -> str:
    """The report as markdown."""
    machine = report["machine"]
    name = machine["device_name"] or machine["processor"]
    lines = [
        f"# {name}",
        "",
        f"{machine['date']}, torch {machine['torch']}, unbraid {machine['unbraid']}, load {machine['load']}",
    ]
    lines += [f"before; {report['seconds']:.0f} s in all.", "", "| part | came to | seconds |", "|---|---|---|"]
    lines += [f"| {part} | {found['state']} | {found['seconds']:.0f} |" for part, found in report["parts"].items()]
    for part, found in report["parts"].items():
        lines += ["", f"## {part}", ""]
        if rows := found.get("rows"):
            lines += ["| | shape | wall ms (quartiles) | peak MiB | a second | products |", "|---|---|---|---|---|---|"]
            lines += [line_of(row) for row in rows]
        if said := found.get("said"):
            lines += ["", *(f"    {line}" for line in said.strip().splitlines()[-12:])]
    return "\n".join(lines) + "\n"


def line_of(row: dict[str, Any]) -> str:
    """A row of a table."""
    if "error" in row:
        return f"| {row['what']} | | {row['error'].replace('|', '/').splitlines()[0]} | | | |"
    what = row["what"] if row.get("penalty", "none") == "none" else f"{row['what']} + {row['penalty']}"
    shape = "{d_in} x {n_features}, B = {batch}".format(**row["shape"]) if "shape" in row else ""
    low, high = row["wall_ms_quartiles"]
    speed = next(
        (f"{row[name]:,} {name.split('_')[0]}" for name in row if name.endswith("_per_second") and row[name]), ""
    )
    times = f"{row['wall_ms']:.2f} ({low:.2f}-{high:.2f})"
    return f"| {what} | {shape} | {times} | {row.get('peak_mib') or ''} | {speed} | {row.get('products', '')} |"


def report_on(asked: argparse.Namespace, run: Run = run_command) -> dict[str, Any]:
    """Take the parts that were asked for, one after the other; write what is known after each."""
    began, device = time.monotonic(), pick_device(asked.device)
    asked.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": describe(device), "toy": asked.toy, "seconds": 0.0, "parts": {}}
    for part in PARTS:
        if asked.parts and part.name not in asked.parts:
            continue
        print(f"{part.name} ...", flush=True)
        found = take(part, asked, asked.minutes * 60 - (time.monotonic() - began), run)
        print(f"    {found['state']}, {found['seconds']:.0f} s", flush=True)
        report["parts"][part.name] = found
        report["seconds"] = round(time.monotonic() - began, 1)
        (asked.out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (asked.out / "report.md").write_text(page_of(report), encoding="utf-8")
    print(f"written to {asked.out / 'report.json'} and {asked.out / 'report.md'}")
    return report


def measure_part(name: str, asked: argparse.Namespace) -> None:
    """The rows of one part, in this process."""
    part = next(part for part in PARTS if part.name == name)
    assert part.measure is not None
    rows: Rows = []
    for found in part.measure(TOY if asked.toy else FULL, pick_device(asked.device)):
        rows += found
        text = json.dumps(rows)
        write_whole(asked.out, lambda partial, text=text: partial.write_text(text, encoding="utf-8"))


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=[part.name for part in PARTS], help="some of them; all by default"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts together")
    parser.add_argument("--toy", action="store_true", help="sizes at which it ends on a CPU")
    parser.add_argument(
        "--out", type=Path, default=HERE / "results" / "gpu", help="folder of report.json and report.md"
    )
    parser.add_argument("--only", help=argparse.SUPPRESS)
    asked = parser.parse_args(words)
    if asked.only is not None:
        measure_part(asked.only, asked)
        return
    if not asked.toy and pick_device(asked.device).type == "cpu":
        parser.error("there is no GPU here, and at full size a CPU needs hours; expected --toy, or --device cuda")
    report_on(asked)


if __name__ == "__main__":
    main()
