"""`unbraid bench`: reads words, measures, prints a table, and writes JSON that docs/benchmarks.md is made from."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console

from unbraid.errors import ConfigError
from unbraid.owned_files import check_owned_json, write_owned_json
from unbraid.recipes import RECIPES

KINDS = ("step", "pipeline", "harvest", "synth")
FILE = "bench result"
ARCHITECTURES = ("topk", "batch_topk", "matryoshka", "jumprelu", "relu", "gated")
SHAPES = ("512x8192x2048", "256x4096x1024")
READ_BY = {
    "names": ("pipeline", "harvest", "synth"),
    "architectures": ("step", "synth"),
    "shapes": ("step",),
    "k": ("step", "synth"),
    "decorrelation": ("step",),
    "precision": ("step",),
    "steps": ("step", "synth"),
    "batch": ("synth",),
}
"""Options that not every kind reads."""

console = Console(soft_wrap=True, emoji=False)


@dataclasses.dataclass
class Bench:
    """What is measured, and how long."""

    kind: tyro.conf.Positional[Literal["step", "pipeline", "harvest", "synth"]]
    """What to time."""
    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Recipes (pipeline, harvest; tiny by default) or one world (synth; small by default)."""
    architectures: tuple[str, ...] | None = None
    """Of the SAEs (step: six of them; synth: batch_topk)."""
    shapes: tuple[str, ...] | None = None
    """Shapes of a step, D x N x B; 512x8192x2048 and 256x4096x1024 by default."""
    k: int | None = None
    """Active features a row; 32 by default, also of architectures that learn how many."""
    decorrelation: tuple[str, ...] | None = None
    """Penalties of a step: none, or a preset's (paper, apart, best); none by default."""
    precision: Literal["float32", "bfloat16"] | None = None
    """Of the encoder's product in a step; float32 by default."""
    batch: int | None = None
    """Samples in a step of synth; 1024 by default."""
    rounds: int = 5
    """Turns of each contender."""
    steps: int | None = None
    """Steps in a turn; 4 by default."""
    threads: int | None = None
    """CPU threads; torch's own number by default."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    out: Path | None = None
    """JSON file for the figures: a new one, or an earlier bench result, which is replaced."""


def bench(arguments: list[str]) -> None:
    """Time what was asked for, in turns; print the table; write the file."""
    options = tyro.cli(Bench, args=arguments, prog="unbraid bench", description=__doc__)
    result = measure(options, shlex.join(arguments))
    console.print(table_of(result), highlight=False, markup=False)
    if options.out is not None:
        write_owned_json(options.out, result, FILE, error=ConfigError)
        console.print(f"written to {options.out}", highlight=False, markup=False)


def measure(options: Bench, words: str) -> dict[str, Any]:
    """The figures of a benchmark: `kind`, `command`, `machine`, `rounds`, `rows`.

    Raises:
        ConfigError: an option cannot be used, or the kind does not read it.
    """
    from unbraid.bench.machine import describe
    from unbraid.device import pick_device

    for name, kinds in READ_BY.items():
        if getattr(options, name) not in (None, ()) and options.kind not in kinds:
            flag = "what follows it" if name == "names" else f"--{name}"
            raise ConfigError(f"bench {options.kind} does not read {flag}; it is for {' and '.join(kinds)}; drop it")
    for name in ("rounds", "steps", "threads", "batch", "k"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} = {value}; expected at least 1")
    if options.out is not None:
        check_owned_json(options.out, FILE, error=ConfigError)
    device, threads = pick_device(options.device), torch.get_num_threads()
    torch.set_num_threads(options.threads or threads)
    try:
        machine = describe(device)
        rows = {"step": _steps, "synth": _world}.get(options.kind, _recipes)(options, device)
    finally:
        torch.set_num_threads(threads)
    command = f"unbraid bench {words}"
    return {"kind": options.kind, "command": command, "machine": machine, "rounds": options.rounds, "rows": rows}


def _say(what: str) -> None:
    console.print(f"  {what}", style="dim", highlight=False, markup=False)


def _steps(options: Bench, device: torch.device) -> list[dict[str, Any]]:
    from unbraid.bench.steps import Shape, measure_steps, settings_of

    shapes = [Shape.parse(words) for words in options.shapes or SHAPES]
    asked = options.architectures or ARCHITECTURES, options.decorrelation or ("none",), options.k or 32
    for architecture in asked[0]:
        for penalty in asked[1]:
            settings_of(architecture, 1024, 8, penalty)
    how = options.rounds, options.steps or 4, options.precision or "float32", _say
    return [row for shape in shapes for row in measure_steps(shape, *asked, device, *how)]


def _recipes(options: Bench, device: torch.device) -> list[dict[str, Any]]:
    from unbraid.bench.whole import measure_recipes
    from unbraid.run import open_activations

    for name in options.names:
        if name not in RECIPES:
            raise ConfigError(f"no recipe {name[:80]!r}; expected some of {', '.join(RECIPES)}")
    configs = [(name, RECIPES[name]()) for name in options.names or ("tiny",)]
    return measure_recipes(options.kind, configs, open_activations, device, options.rounds, _say)


def _world(options: Bench, device: torch.device) -> list[dict[str, Any]]:
    from unbraid.bench.steps import settings_of
    from unbraid.bench.whole import measure_world
    from unbraid.config import OptimiserConfig
    from unbraid.synthetic import WORLDS

    if len(options.names) > 1 or not {*options.names} <= {*WORLDS}:
        raise ConfigError(f"synth takes one world; found {' '.join(options.names)[:80]!r}; one of {', '.join(WORLDS)}")
    name = options.names[0] if options.names else "small"
    width = max(2, WORLDS[name].n_features // 4)
    k = min(options.k or 32, width - 1)
    saes = [settings_of(architecture, width, k, "none") for architecture in options.architectures or ("batch_topk",)]
    saes = [sae.model_copy(update={"optimiser": OptimiserConfig(lr=1e-3)}) for sae in saes]
    return measure_world(name, saes, options.batch or 1024, device, options.rounds, options.steps or 4, _say)


def table_of(result: dict[str, Any]) -> str:
    """The figures as lines for a terminal."""
    machine = result["machine"]
    lines = [
        f"{machine['device_name'] or machine['processor']}, {machine['threads']} of {machine['cores']} cores, "
        f"torch {machine['torch']}, load {machine['load']}"
    ]
    for row in result["rows"]:
        low, high = row["wall_ms_quartiles"]
        speed = next(f"{row[name]:,} {name.split('_')[0]}/s" for name in row if name.endswith("_per_second"))
        name = row["what"] if row.get("penalty", "none") == "none" else f"{row['what']} + {row['penalty']}"
        shape = "{d_in}x{n_features}x{batch}".format(**row["shape"]) if "shape" in row else ""
        products = f"  {row['products']:.2f} products" if "products" in row else ""
        lines.append(
            f"{name:24} {shape:16} {row['wall_ms']:9.2f} ms ({low:.2f}-{high:.2f})  CPU {row['cpu_ms']:9.2f} ms  "
            f"{speed}{products}"
        )
    return "\n".join(lines)
