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
from typing import Annotated, Any

import tyro
from pydantic import ValidationError
from rich.console import Console

from unbraid import __version__
from unbraid.config import EvaluationConfig, RunConfig, Section, SynthConfig, overridden, read_settings, require_trust
from unbraid.config.checks import complaints
from unbraid.config.overrides import merged
from unbraid.distributed.launch import Launch, execute
from unbraid.errors import ConfigError, UnbraidError
from unbraid.feature_model import commands as features
from unbraid.flags import help_of, read_flags
from unbraid.plugins import load_plugin
from unbraid.presets import listed, with_preset
from unbraid.recipes import RECIPES
from unbraid.reporting.commands import compare, dashboard, export, search
from unbraid.training.changes import words_of_resume

console = Console(soft_wrap=True)
PLACES_THAT_CANNOT_BE_WRITTEN = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "ENOTDIR", "EISDIR", "ENAMETOOLONG", "ELOOP")
    if hasattr(errno, name)
}


class _TrainOptions(Section):
    run: str | None = None
    """Run folder to make; runs/<recipe> by default."""
    preset: str | None = None
    """The method: paper, apart or best; `unbraid presets` says what each is."""
    dry_run: bool = False
    """Print the plan after all of its checks, and stop there."""


def train(arguments: list[str]) -> None:
    """train RECIPE|config.json [--run DIR] [--any.setting VALUE]: train SAEs, measure them, draw Figure 1."""
    config, own = _run_settings("train", arguments, _TrainOptions)
    from unbraid import run

    path = _path_given(own.get("run"), "--run")
    if own.get("dry_run"):
        console.print(str(run.plan(config, path)), highlight=False, markup=False)
        return
    run.train(config, path, console=console)


class _HarvestOptions(Section):
    pass


def harvest(arguments: list[str]) -> None:
    """harvest RECIPE|config.json --cache DIR [--any.setting VALUE]: store the activations a run needs on disk."""
    config, _ = _run_settings("harvest", arguments, _HarvestOptions)
    if config.cache is None:
        raise ConfigError("harvest needs --cache DIR: the folder to write activations into")
    from unbraid import run

    run.fill_cache(config, config.cache, console=console)


def _run_settings(command: str, arguments: list[str], own: type[Section]) -> tuple[RunConfig, dict[str, Any]]:
    """The settings a command line asks for, and the command's own flags; settings that were dropped are listed."""
    given = read_flags(arguments, RunConfig, own)
    if not given.words and not given.wants_help:
        raise ConfigError(
            f"{command} needs a recipe or a settings file first; recipes: {', '.join(RECIPES)}; "
            f"such as `unbraid {command} tiny`"
        )
    recipe = given.words[0] if given.words else "demo"
    if len(given.words) > 1:
        raise ConfigError(
            f"{command} takes one recipe or settings file; found {' '.join(given.words)!r}; drop the rest"
        )
    base, by_hand = _recipe(recipe)
    if recipe.endswith(".json"):
        require_trust(merged(RunConfig, base, by_hand, recipe)[0], TRUST.removeprefix("--") in given.settings, recipe)
    if given.own.get("preset") is not None:
        base = with_preset(merged(RunConfig, base, {}, recipe)[0], given.own["preset"]).model_dump(exclude_unset=True)
    config, dropped = merged(RunConfig, base, by_hand | given.settings, f"{command} {recipe}")
    if given.wants_help:
        print(
            help_of(
                f"unbraid {command} {recipe}: settings, with their values in {recipe}", config, own, given.everything
            )
        )
        sys.exit(0)
    for setting in dropped:
        console.print(f"dropped from {recipe}: {setting}", highlight=False, markup=False)
    return config, given.own


def _path_given(path: str | None, flag: str) -> Path | None:
    if path is not None and (not path or "\0" in path):
        raise ConfigError(f"{flag} = {path!r} is no path; expected the name of a folder")
    return None if path is None else Path(path)


def _recipe(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a recipe or a settings file says, and what of it was given by hand."""
    if name.endswith(".json"):
        return read_settings(Path(name))
    key = name.replace("_", "-")
    if key not in RECIPES:
        close = difflib.get_close_matches(key, RECIPES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"recipes: {', '.join(RECIPES)}"
        raise ConfigError(f"no recipe {name[:80]!r}; expected a recipe or a path ending in .json; {hint}")
    return RECIPES[key]().model_dump(exclude_unset=True), {}


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


def resume(arguments: list[str]) -> None:
    """resume DIR [--training.tokens N] [--optimiser.lr X] ...: go on with an interrupted run, exactly where its last
    checkpoint stands; only what makes no other run of it may change."""
    trusted = [word for word in arguments if _is_trust(word)]
    folder, changes = words_of_resume([word for word in arguments if word not in trusted])
    options = tyro.cli(_Resume, args=[*folder, *trusted], prog="unbraid resume")
    from unbraid import run

    run.resume(options.run, changes=changes, trust_remote_code=options.trust_remote_code, console=console)


@dataclasses.dataclass
class _Figure:
    run: tyro.conf.Positional[Path]
    """A run folder."""
    paper: bool = False
    """Draw the paper's four panels, into figures/figure1-paper.png and .svg."""


def figure(arguments: list[str]) -> None:
    """figure DIR [--paper]: draw Figure 1 of a run from its metrics."""
    options = tyro.cli(_Figure, args=arguments, prog="unbraid figure")
    from unbraid.reporting.figures import draw_training

    for path in draw_training(options.run, paper=options.paper):
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


class _EvaluateOptions(Section):
    pass


def evaluate(arguments: list[str]) -> None:
    """eval DIR|SAE_DIR|NAME [--suite core,geometry,...]: measure SAEs beside their controls into evaluation.json."""
    trusted = any(map(_is_trust, arguments))
    arguments = [word for word in arguments if not _is_trust(word)]
    given = read_flags(arguments, EvaluationConfig, _EvaluateOptions, {"suite": "suites"})
    config = overridden(EvaluationConfig(), given.settings, "eval")[0]
    if given.wants_help:
        print(help_of("unbraid eval DIR|SAE_DIR|NAME", config, _EvaluateOptions, given.everything))
        return
    if len(given.words) != 1:
        raise ConfigError(
            f"eval takes one run, SAE folder or published name; found {' '.join(given.words) or 'none'!r}"
        )
    from unbraid.evaluation.suites import run_suites

    _path_given(given.words[0], "the folder")
    run_suites(given.words[0], config, trust_remote_code=trusted, console=console)


class _SynthOptions(Section):
    out: str | None = None
    """JSON file for the numbers."""
    resume: str | None = None
    """Folder for checkpoints; the same command goes on from what it finds there."""


def synth(arguments: list[str]) -> None:
    """synth [WORLD]: train SAEs on a world with known features and judge them against the truth."""
    given = read_flags(arguments, SynthConfig, _SynthOptions)
    if len(given.words) > 1 or (given.words and "world" in given.settings):
        raise ConfigError(f"synth takes one world; found {' '.join(given.words)!r}")
    world = {"world": given.words[0]} if given.words else {}
    config = overridden(SynthConfig(), given.settings | world, "synth")[0]
    if given.wants_help:
        print(help_of("unbraid synth [WORLD]", config, _SynthOptions, given.everything))
        return
    from unbraid.evaluation.synth import run_synth

    out, checkpoints = (_path_given(given.own.get(name), f"--{name}") for name in ("out", "resume"))
    run_synth(config, console=console, out=out, resume=checkpoints)


def doctor(arguments: list[str]) -> None:
    """doctor: what is installed, which model, text and device were found, and what is missing."""
    tyro.cli(dict, args=arguments, prog="unbraid doctor")
    from unbraid.doctor import report

    if not report(console):
        sys.exit(1)


def presets(arguments: list[str]) -> None:
    """presets: the methods `--preset` chooses from."""
    if arguments:
        raise ConfigError(f"presets takes nothing; found {' '.join(arguments)[:80]!r}")
    print(listed())


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
    "presets": presets,
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
        "presets (--preset NAME chooses the method of any recipe):",
        listed(),
        "`unbraid COMMAND --help` lists a command's options; --debug shows tracebacks; --plugin MODULE or --plugin",
        "file.py imports code of yours first, so that architectures and penalties it registers can be named.",
    ]
    return "\n".join(lines)


def _load_plugins(arguments: list[str]) -> None:
    """Import what `--plugin MODULE` names, and take the flag out of the arguments."""
    while "--plugin" in arguments:
        at = arguments.index("--plugin")
        name = arguments[at + 1] if at + 1 < len(arguments) else ""
        del arguments[at : at + 2]
        load_plugin(name)


def _show_warning(message: Warning | str, *_: object) -> None:
    print(f"unbraid: warning: {message}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `unbraid` and `python -m unbraid`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if arguments[:1] == ["help"] and len(arguments) > 1:
        arguments = [*arguments[1:], "--help"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return
    if arguments[0] == "--version":
        print(f"unbraid {__version__}")
        return
    warnings.showwarning = _show_warning
    name, *rest = arguments
    try:
        _load_plugins(rest)
        if name not in COMMANDS:
            close = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"commands: {', '.join(COMMANDS)}"
            if name.startswith("-"):
                raise ConfigError(f"unknown flag {name[:80]!r}; expected --help, --version or a command first; {hint}")
            raise ConfigError(f"no command {name[:80]!r}; {hint}")
        try:
            COMMANDS[name](rest)
        except ValidationError as error:
            raise ConfigError(f"{name}: {complaints(error, RunConfig)}") from error
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
        print(
            f"unbraid: {error}; free some space, or name a folder that can be written, then run the command again",
            file=sys.stderr,
        )
        sys.exit(1)
