"""What the commands do: they read words, call the library and print what happened.

Each has its line in the table of `unbraid.cli`, which imports this module only when a command runs. Settings are parsed
from the very models of `config`, so every setting has a flag and a help text.
"""

import dataclasses
import difflib
import shlex
import sys
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from unbraid.config import EvaluationConfig, RunConfig, Section, SynthConfig, overridden, read_settings, require_trust
from unbraid.config.overrides import merged
from unbraid.distributed.launch import Launch, execute
from unbraid.errors import ConfigError
from unbraid.flags import TRUST, Trust, help_of, read_flags
from unbraid.presets import with_preset
from unbraid.recipes import RECIPES
from unbraid.training.changes import MAY_CHANGE, words_of_resume

console = Console(soft_wrap=True, emoji=False)


class _TrainOptions(Section):
    run: str | None = None
    """Run folder to make; runs/<recipe> by default."""
    preset: str | None = None
    """The method: paper, apart or best; `unbraid presets` says what each is."""
    dry_run: bool = False
    """Print the plan after all of its checks, and stop there."""


def train(arguments: list[str]) -> None:
    """Train SAEs, measure them, draw Figure 1."""
    config, own = _run_settings("train", arguments, _TrainOptions)
    from unbraid import run

    path = _path_given(own.get("run"), "--run")
    if own.get("dry_run"):
        from unbraid.training.run_folder import default_run_folder

        console.print(str(run.plan(config, path)), highlight=False, markup=False)
        if path is None and default_run_folder(config).exists():
            console.print(
                f"{str(default_run_folder(config))!r} exists already: a run needs another --run", markup=False
            )
        return
    run.train(config, path, console=console)


def harvest(arguments: list[str]) -> None:
    """Store the activations a run needs on disk."""
    config, _ = _run_settings("harvest", arguments, Section)
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
        chosen = with_preset(merged(RunConfig, base, {}, recipe)[0], given.own["preset"], by_hand | given.settings)
        base = chosen.model_dump(exclude_unset=True)
    config, dropped = merged(RunConfig, base, by_hand | given.settings, f"{command} {recipe}")
    if given.wants_help:
        print(
            help_of(
                f"unbraid {command} {recipe}: settings, with their values in {recipe}", config, own, given.everything
            )
        )
        sys.exit(0)
    origin = recipe if given.own.get("preset") is None else f"{recipe} with the preset {given.own['preset']}"
    for setting in dropped:
        console.print(f"dropped from {origin}: {setting}", highlight=False, markup=False)
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


def _is_trust(word: str) -> bool:
    return word.replace("-", "_") == TRUST.replace("-", "_")


@dataclasses.dataclass
class _Resume:
    run: tyro.conf.Positional[Path]
    """A run folder."""
    trust_remote_code: Trust = False


def resume(arguments: list[str]) -> None:
    """Continue an interrupted run exactly from its last checkpoint; only settings in `MAY_CHANGE` may differ."""
    trusted = [word for word in arguments if _is_trust(word)]
    folder, changes = words_of_resume([word for word in arguments if word not in trusted])
    settings = ", ".join(f"--{path.replace('_', '-')}" for path in MAY_CHANGE)
    options = tyro.cli(
        _Resume,
        args=[*folder, *trusted],
        prog="unbraid resume",
        description=f"Continue an interrupted run, or train a finished one on more tokens. May change: {settings}.",
    )
    from unbraid import run

    run.resume(options.run, changes=changes, trust_remote_code=options.trust_remote_code, console=console)


@dataclasses.dataclass
class _Finetune:
    source: tyro.conf.Positional[str]
    """The folder of one SAE or transcoder, in a run or in any known layout, or a published one's name."""
    out: Path
    """Folder to write."""
    tokens: int = 131_072
    """Training text, in whole contexts."""
    loss: Literal["kl", "ce"] = "kl"
    """At the end of the model: kl, the divergence from its own next-token distribution; ce, cross-entropy."""
    mse: float = 1.0
    """Share of the reconstruction error, relative to that loss; 0 leaves it out."""
    lr: float = 1e-4
    """Adam's learning rate at its highest."""
    learned: Literal["all", "decoder", "biases"] = "all"
    """What may change."""
    batch_contexts: int = 4
    """Contexts a step."""
    held_out_contexts: int = 32
    """Contexts on which it is measured before and after."""
    model: str | None = None
    """Language model, where the folder does not say (or under another name here)."""
    site: str | None = None
    """Site, where the folder does not say, such as resid_post.6."""
    text: list[str] | None = None
    """What an SAE from elsewhere is trained on: packaged (the default), files or folders, or hub:NAME."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    overwrite: bool = False
    """Replace an SAE folder that unbraid wrote."""
    trust_remote_code: Trust = False


def finetune(arguments: list[str]) -> None:
    """Fine-tune one SAE or transcoder end to end: for what the language model makes of its reconstructions."""
    options = tyro.cli(_Finetune, args=arguments, prog="unbraid finetune")
    from unbraid.finetuning import finetune, score_table

    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    tuned = finetune(**given, console=console)
    console.print(score_table(tuned))
    console.print(str(tuned.path), highlight=False, markup=False)


@dataclasses.dataclass
class _Figure:
    run: tyro.conf.Positional[Path]
    """A run folder."""
    paper: bool = False
    """Draw the paper's four panels, into figures/figure1-paper.png and .svg."""


def figure(arguments: list[str]) -> None:
    """Draw Figure 1 of a run from its metrics."""
    options = tyro.cli(_Figure, args=arguments, prog="unbraid figure")
    from unbraid.reporting.figures import draw_training

    for path in draw_training(options.run, paper=options.paper):
        console.print(str(path), highlight=False)


def launch(arguments: list[str]) -> None:
    """Print the torchrun line that runs a command on many processes, or execute it with --run."""
    at = next((place for place, word in enumerate(arguments) if word in ("train", "resume")), len(arguments))
    options = tyro.cli(Launch, args=arguments[:at], prog="unbraid launch")
    if at == len(arguments):
        raise ConfigError("launch needs a command; such as `unbraid launch --ranks 4 train tiny --run runs/tiny`")
    words = options.torchrun(arguments[at:])
    if options.run:
        execute(words)
    print(shlex.join(words))


def evaluate(arguments: list[str]) -> None:
    """Measure SAEs beside their controls into evaluation.json."""
    trusted = any(map(_is_trust, arguments))
    arguments = [word for word in arguments if not _is_trust(word)]
    given = read_flags(arguments, EvaluationConfig, Section, {"suite": "suites"})
    config = overridden(EvaluationConfig(), given.settings, "eval")[0]
    if given.wants_help:
        print(help_of("unbraid eval DIR|SAE_DIR|NAME", config, Section, given.everything))
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
    """JSON file for the numbers, a new one."""
    overwrite: bool = False
    """Replace the file of an earlier `unbraid synth` there."""
    resume: str | None = None
    """Folder for checkpoints; the same command goes on from what it finds there."""


def synth(arguments: list[str]) -> None:
    """Train SAEs on a world with known features and score them against the truth."""
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
    overwrite = given.own.get("overwrite", False)
    if overwrite and out is None:
        raise ConfigError("--overwrite is read only beside --out FILE; add --out, or drop it")
    run_synth(config, console=console, out=out, resume=checkpoints, overwrite=overwrite)


def doctor(arguments: list[str]) -> None:
    """Show what is installed, which model, text and device were found, and what is missing."""
    if arguments in (["--help"], ["-h"]):
        print("unbraid doctor: what is installed, which model, text and device were found, and what is missing")
        return
    if arguments:
        raise ConfigError(f"doctor takes nothing; found {' '.join(arguments)[:80]!r}; drop it")
    from unbraid.doctor import report

    if not report(console):
        sys.exit(1)
