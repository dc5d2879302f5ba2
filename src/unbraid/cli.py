"""The command line: reads words, calls the library, prints what happened.

Errors a user can cause end in one message and a non-zero exit code; `--debug` shows the traceback as well. Settings
are parsed from the very models of `config`, so every setting has a flag and a help text.
"""

import dataclasses
import difflib
import errno
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import ValidationError
from rich.console import Console

from unbraid.config import EvaluationConfig, RunConfig, SynthConfig, load_config, require_trust, validated
from unbraid.config.checks import complaints
from unbraid.distributed.launch import Launch, execute
from unbraid.errors import ConfigError, UnbraidError
from unbraid.feature_model import commands as features
from unbraid.recipes import RECIPES
from unbraid.reporting.commands import compare, dashboard, export, search
from unbraid.training.changes import words_of_resume

console = Console(soft_wrap=True)
PLACES_THAT_CANNOT_BE_WRITTEN = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "ENOTDIR", "EISDIR", "ENAMETOOLONG", "ELOOP")
    if hasattr(errno, name)
}


@dataclasses.dataclass
class _Train:
    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    run: Path | None = None
    """Run folder to make; runs/<recipe> by default."""
    dry_run: bool = False
    """Print the plan after all of its checks, and stop there."""


def train(arguments: list[str]) -> None:
    """train RECIPE|config.json [--run DIR] [--any.setting VALUE]: train SAEs, measure them, draw Figure 1."""
    recipe, rest = _recipe_first(arguments, "train")
    options = tyro.cli(_Train, default=_Train(_recipe(recipe, rest)), args=rest, prog=f"unbraid train {recipe}")
    from unbraid import run

    if options.dry_run:
        console.print(str(run.plan(options.config, options.run)), highlight=False, markup=False)
        return
    run.train(options.config, options.run, console=console)


@dataclasses.dataclass
class _Harvest:
    config: Annotated[RunConfig, tyro.conf.arg(name="")]


def harvest(arguments: list[str]) -> None:
    """harvest RECIPE|config.json --cache DIR [--any.setting VALUE]: store the activations a run needs on disk."""
    recipe, rest = _recipe_first(arguments, "harvest")
    options = tyro.cli(_Harvest, default=_Harvest(_recipe(recipe, rest)), args=rest, prog=f"unbraid harvest {recipe}")
    if options.config.cache is None:
        raise ConfigError("harvest needs --cache DIR: the folder to write activations into")
    from unbraid import run

    run.fill_cache(options.config, options.config.cache, console=console)


def _recipe_first(arguments: list[str], command: str) -> tuple[str, list[str]]:
    """The recipe and what follows it; a bare --help lists the options with the demo's defaults."""
    if arguments and arguments[0] in ("-h", "--help"):
        return "demo", arguments
    if not arguments or arguments[0].startswith("-"):
        raise ConfigError(
            f"{command} needs a recipe or a settings file first; recipes: {', '.join(RECIPES)}; "
            f"such as `unbraid {command} tiny`"
        )
    return arguments[0], arguments[1:]


def _recipe(name: str, arguments: list[str]) -> RunConfig:
    if name.endswith(".json"):
        return require_trust(load_config(Path(name)), any(map(_is_trust, arguments)), name)
    key = name.replace("_", "-")
    if key not in RECIPES:
        close = difflib.get_close_matches(key, RECIPES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"recipes: {', '.join(RECIPES)}"
        raise ConfigError(f"no recipe {name!r}; expected a recipe or a path ending in .json; {hint}")
    return RECIPES[key]()


TRUST = "--model.trust_remote_code"
Trust = Annotated[
    bool,
    tyro.conf.arg(name=TRUST.removeprefix("--"), help="Run code shipped with the model, if the settings ask for it."),
]


def _is_trust(word: str) -> bool:
    return word.replace("-", "_") == TRUST.replace("-", "_")


@dataclasses.dataclass
class _Resume:
    run: tyro.conf.Positional[Path]
    """A run folder."""
    trust_remote_code: Trust = False


@dataclasses.dataclass
class _RunFolder:
    run: tyro.conf.Positional[Path]
    """A run folder."""


def resume(arguments: list[str]) -> None:
    """resume DIR [--training.tokens N] [--optimiser.lr X] ...: go on with an interrupted run, exactly where its last
    checkpoint stands; only what makes no other run of it may change."""
    trusted = [word for word in arguments if _is_trust(word)]
    folder, changes = words_of_resume([word for word in arguments if word not in trusted])
    options = tyro.cli(_Resume, args=[*folder, *trusted], prog="unbraid resume")
    from unbraid import run

    run.resume(options.run, changes=changes, trust_remote_code=options.trust_remote_code, console=console)


def figure(arguments: list[str]) -> None:
    """figure DIR: draw Figure 1 of a run from its metrics."""
    options = tyro.cli(_RunFolder, args=arguments, prog="unbraid figure")
    from unbraid.reporting.figures import draw_training

    for path in draw_training(options.run):
        console.print(str(path), highlight=False)


def launch(arguments: list[str]) -> None:
    """launch [--ranks N] [--nodes N] [--max-restarts N] [--run] train|resume ...: the same on many processes; prints
    the torchrun line, or executes it with --run."""
    at = next((place for place, word in enumerate(arguments) if word in ("train", "resume")), len(arguments))
    options = tyro.cli(Launch, args=arguments[:at], prog="unbraid launch")
    if at == len(arguments):
        raise ConfigError("launch needs a command; such as `unbraid launch --ranks 4 train tiny --run runs/tiny`")
    words = options.torchrun(arguments[at:])
    if options.run:
        execute(words)
    print(shlex.join(words))


@dataclasses.dataclass
class _Evaluate:
    path: tyro.conf.Positional[Path]
    """A run folder, or an SAE folder in any known layout."""
    config: Annotated[EvaluationConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=EvaluationConfig)
    trust_remote_code: Trust = False


def evaluate(arguments: list[str]) -> None:
    """eval DIR|SAE_DIR [--suite core,geometry,...]: measure SAEs beside their controls into evaluation.json."""
    options = tyro.cli(_Evaluate, args=arguments, prog="unbraid eval")
    from unbraid.evaluation.suites import run_suites

    run_suites(options.path, options.config, trust_remote_code=options.trust_remote_code, console=console)


@dataclasses.dataclass
class _Synth:
    config: Annotated[SynthConfig, tyro.conf.arg(name="")]
    out: Path | None = None
    """JSON file for the numbers."""
    resume: Path | None = None
    """Folder for checkpoints; the same command goes on from what it finds there."""


def synth(arguments: list[str]) -> None:
    """synth [WORLD]: train SAEs on a world with known features and judge them against the truth."""
    default = SynthConfig()
    if arguments and not arguments[0].startswith("-"):
        default = validated(SynthConfig, {"world": arguments[0]}, "synth")
        arguments = arguments[1:]
    options = tyro.cli(_Synth, default=_Synth(default), args=arguments, prog="unbraid synth")
    from unbraid.evaluation.synth import run_synth

    run_synth(options.config, console=console, out=options.out, resume=options.resume)


def doctor(arguments: list[str]) -> None:
    """doctor: what is installed, which model, text and device were found, and what is missing."""
    tyro.cli(dict, args=arguments, prog="unbraid doctor")
    from unbraid.doctor import report

    if not report(console):
        sys.exit(1)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train,
    "resume": resume,
    "launch": launch,
    "harvest": harvest,
    "eval": evaluate,
    "figure": figure,
    "compare": compare,
    "export": export,
    "search": search,
    "dashboard": dashboard,
    "read": features.read,
    "feature": features.feature,
    "steer": features.steer,
    "attribute": features.attribute,
    "live": features.live,
    "synth": synth,
    "doctor": doctor,
}


def usage() -> str:
    """The list of commands, from their docstrings."""
    lines = ["unbraid: train sparse autoencoders whose features come apart", ""]
    for command in COMMANDS.values():
        form, _, what = (command.__doc__ or "").partition(": ")
        lines += [f"  unbraid {form}", f"      {what}"]
    lines += [
        "",
        f"recipes: {', '.join(RECIPES)}",
        "`unbraid COMMAND --help` lists a command's options; --debug shows tracebacks.",
    ]
    return "\n".join(lines)


def _show_warning(message: Warning | str, *_: object) -> None:
    print(f"unbraid: warning: {message}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `unbraid` and `python -m unbraid`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return
    warnings.showwarning = _show_warning
    name, *rest = arguments
    try:
        if name not in COMMANDS:
            close = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"commands: {', '.join(COMMANDS)}"
            raise ConfigError(f"no command {name!r}; {hint}")
        try:
            COMMANDS[name](rest)
        except ValidationError as error:
            raise ConfigError(f"{name}: {complaints(error, [])}") from error
    except UnbraidError as error:
        if debug:
            raise
        if not error.silent:
            print(f"unbraid: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 1))
    except KeyboardInterrupt:
        if debug:
            raise
        print("unbraid: interrupted; whatever was checkpointed is whole", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if debug or error.errno not in PLACES_THAT_CANNOT_BE_WRITTEN:
            raise
        print(f"unbraid: {error}; free some room, or name a place that can be written, then go on", file=sys.stderr)
        sys.exit(1)
