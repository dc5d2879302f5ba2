"""The command line: which commands there are, and how they fail.

Nothing heavy is imported before a command runs, so that `unbraid --help` and a mistyped command answer at once. Errors
a user can cause end in one message and a non-zero exit code; `--debug` shows the traceback as well.
"""

import errno
import importlib
import sys
import warnings
from collections.abc import Callable
from typing import NamedTuple

from unbraid import __version__
from unbraid.errors import ConfigError, UnbraidError

PLACES_THAT_CANNOT_BE_WRITTEN = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "ENOTDIR", "EISDIR", "ENAMETOOLONG", "ELOOP")
    if hasattr(errno, name)
}


class Command(NamedTuple):
    """A command of the command line.

    Attributes:
        function: `module:name` of the function that takes the words after the command.
        form: what follows the command's name.
        what: what it does, in a line.
    """

    function: str
    form: str
    what: str

    def __call__(self, words: list[str]) -> None:
        """Import the function and run it."""
        module, _, name = self.function.partition(":")
        getattr(importlib.import_module(module), name)(words)


_OWN, _REPORTING, _FEATURES = "unbraid.commands", "unbraid.reporting.commands", "unbraid.feature_model.commands"

COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": Command(
        f"{_OWN}:train",
        "RECIPE|config.json [--run DIR] [--preset NAME] [--any.setting VALUE]",
        "train SAEs, measure them, draw Figure 1; --dry-run prints the plan only",
    ),
    "resume": Command(
        f"{_OWN}:resume",
        "DIR [--training.tokens N] [--optimiser.lr X]",
        "continue an interrupted run exactly from its last checkpoint, or a finished one with more tokens",
    ),
    "launch": Command(
        f"{_OWN}:launch",
        "[--ranks N] [--nodes N] [--max-restarts N] [--run] train|resume ...",
        "train on several processes: prints the torchrun line, or executes it with --run",
    ),
    "harvest": Command(
        f"{_OWN}:harvest",
        "RECIPE|config.json --cache DIR [--any.setting VALUE]",
        "store the activations that a run needs on disk, so that it trains without the model",
    ),
    "eval": Command(
        f"{_OWN}:evaluate",
        "DIR|SAE_DIR|NAME [--suite core,geometry,...]",
        "measure SAEs beside control SAEs; writes evaluation.json",
    ),
    "finetune": Command(
        f"{_OWN}:finetune",
        "SAE_DIR|NAME --out DIR [--loss kl|ce] [--tokens N]",
        "fine-tune one SAE or transcoder for what the language model makes of it",
    ),
    "figure": Command(
        f"{_OWN}:figure", "DIR [--paper]", "draw Figure 1 of a run from its metrics; --paper draws the paper's panels"
    ),
    "compare": Command(
        f"{_REPORTING}:compare",
        "RUN... | SAE_A SAE_B [--json]",
        "runs: metrics of each setting at its L0, seeds as intervals; two SAEs: which features they share",
    ),
    "export": Command(
        f"{_REPORTING}:export",
        "DIR --to FORMAT --out DIR",
        "write a run's SAEs in the folder layout of another library",
    ),
    "search": Command(
        f"{_REPORTING}:search",
        '"WORDS" [--limit N] [--refresh]',
        "published dictionaries whose name has every word, for `unbraid.load(name)`",
    ),
    "dashboard": Command(
        f"{_REPORTING}:dashboard",
        "DIR_OR_NAME [--model M] [--site S] [--text T] [--out DIR] [--serve]",
        "write web pages of features and the most correlated pairs, of a run or any SAE; any browser opens them",
    ),
    "read": Command(
        f"{_FEATURES}:read", "RUN PROMPT [--sae NAME] [--k N] [--json]", "which features fire on each token of a prompt"
    ),
    "feature": Command(
        f"{_FEATURES}:feature",
        "RUN NAME/index [--alone-from NAME/index] [--json]",
        "where a feature fires, and which features fire with it",
    ),
    "steer": Command(
        f"{_FEATURES}:steer",
        "RUN PROMPT NAME/index=+2 ... [--without NAME/index] [--json]",
        "generate text with and without edits of features",
    ),
    "attribute": Command(
        f"{_FEATURES}:attribute",
        "RUN PROMPT [--metric TOKEN] [--json]",
        "which features raise or lower the logit of a token",
    ),
    "live": Command(
        f"{_FEATURES}:live",
        "RUN [--port N]",
        "a page to read and steer features of a run, which only this machine and this user can open",
    ),
    "synth": Command(
        f"{_OWN}:synth", "[WORLD]", "train SAEs on synthetic data with known features and score them against the truth"
    ),
    "bench": Command(
        "unbraid.bench.commands:bench",
        "step | pipeline | harvest | synth [NAME...] [--rounds N] [--out FILE]",
        "how fast this machine is: training steps, whole pipelines, model passes, synthetic samples",
    ),
    "doctor": Command(f"{_OWN}:doctor", "", "what is installed, which model, text and device were found"),
    "presets": Command("unbraid.presets:presets", "", "the methods that `--preset` chooses from"),
    "completion": Command(
        "unbraid.completion:completion",
        "bash|zsh|fish",
        "print a script that completes commands, flags and values with the Tab key",
    ),
}
RECIPES = {
    "tiny": "a random two-layer model on generated text: seconds, to try things out",
    "demo": "SmolLM2-135M at layer 3, three forms of one SAE: for two CPU cores",
    "transcoder-demo": "SmolLM2-135M, the MLP of block 3: transcoders with a skip connection and without",
    "smollm2": "SmolLM2-135M at layers 6, 14, 22, with the paper's constants",
    "gemma-3-270m": "Gemma 3 270M at layers 3, 8, 13; `make gemma` installs the model",
    "gemma-2-2b": "the paper's own configuration; downloads Gemma 2 2B and the Pile",
}
"""A line for each recipe of `unbraid.recipes`."""


def usage() -> str:
    """Commands, recipes and presets, as `unbraid --help` lists them."""
    from unbraid.presets import listed

    lines = ["unbraid: train and study sparse autoencoders (SAEs) with feature decorrelation", "", "commands:"]
    for name, command in COMMANDS.items():
        if isinstance(command, Command):
            lines += [f"  unbraid {name} {command.form}".rstrip(), f"      {command.what}"]
    lines += ["", "recipes (what `train` and `harvest` take):"]
    lines += [f"  {name:15} {what}" for name, what in RECIPES.items()]
    lines += [
        "",
        "presets (`--preset NAME` chooses the method of any recipe):",
        listed(),
        "",
        "start with `unbraid train tiny`; `unbraid COMMAND --help` lists the flags of a command.",
        "every command takes --debug (show tracebacks) and --plugin MODULE|file.py (first import code of yours that",
        "registers architectures or penalties).",
    ]
    return "\n".join(lines)


def _load_plugins(arguments: list[str]) -> None:
    """Import what `--plugin MODULE` names, and take the flag out of the arguments."""
    while "--plugin" in arguments:
        from unbraid.plugins import load_plugin

        at = arguments.index("--plugin")
        name = arguments[at + 1] if at + 1 < len(arguments) else ""
        del arguments[at : at + 2]
        load_plugin(name)


def _show_warning(message: Warning | str, *_: object) -> None:
    print(f"unbraid: warning: {message}", file=sys.stderr)


def _unknown(name: str) -> ConfigError:
    import difflib

    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"commands: {', '.join(COMMANDS)}"
    if name.startswith("-"):
        return ConfigError(f"unknown flag {name[:80]!r}; expected --help, --version or a command first; {hint}")
    return ConfigError(f"no command {name[:80]!r}; {hint}")


def _run(name: str, words: list[str]) -> None:
    _load_plugins(words)
    if name not in COMMANDS:
        raise _unknown(name)
    try:
        COMMANDS[name](words)
    except ValueError as error:
        from pydantic import ValidationError

        if not isinstance(error, ValidationError):
            raise
        from unbraid.config import RunConfig
        from unbraid.config.checks import complaints

        raise ConfigError(f"{name}: {complaints(error, RunConfig)}") from error


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
    try:
        _run(arguments[0], arguments[1:])
    except UnbraidError as error:
        if debug:
            raise
        if not error.silent:
            print(f"unbraid: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 1))
    except KeyboardInterrupt:
        if debug:
            raise
        print("unbraid: interrupted; everything up to the last checkpoint is saved", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if debug or error.errno not in PLACES_THAT_CANNOT_BE_WRITTEN:
            raise
        print(
            f"unbraid: {error}; free some space, or name a folder that can be written, then run the command again",
            file=sys.stderr,
        )
        sys.exit(1)
