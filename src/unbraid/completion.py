"""`unbraid completion bash|zsh|fish`: a script that completes commands, flags and values.

The script is made from the same tables as the command line itself and runs no Python, so Tab answers at once. Flags of
settings come from the settings' classes, flags of the other commands from their option classes. Where nothing is
listed, such as for a run folder, the shell completes file names.
"""

import dataclasses
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from unbraid import commands
from unbraid.bundled import BUNDLED
from unbraid.config import EvaluationConfig, RunConfig, Section, SynthConfig
from unbraid.config.checks import group_of, setting_paths
from unbraid.config.kinds import Kinds
from unbraid.config.measuring import BUILT_IN
from unbraid.errors import ConfigError
from unbraid.flags import annotation_of, fields
from unbraid.presets import PRESETS
from unbraid.recipes import RECIPES
from unbraid.training.changes import MAY_CHANGE

SHELLS = ("bash", "zsh", "fish")
EVERYWHERE = ("--help", "--debug", "--plugin")


class Flag(NamedTuple):
    """A flag: its values where they can be listed, and what it is for."""

    name: str
    values: tuple[str, ...] = ()
    what: str = ""


class Words(NamedTuple):
    """What may follow a command: words that are no flag, and flags."""

    words: tuple[str, ...] = ()
    flags: tuple[Flag, ...] = ()


def completion(arguments: list[str]) -> None:
    """Print the script for a shell."""
    if arguments in (["--help"], ["-h"]):
        print(HOW_TO)
        return
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        found = " ".join(arguments)[:80] or "nothing"
        raise ConfigError(f"completion takes the name of a shell; found {found!r}; expected one of {', '.join(SHELLS)}")
    sys.stdout.write(_SCRIPTS[arguments[0]]())


def command_words() -> dict[str, Words]:
    """Command -> what may follow it."""
    from unbraid.bench import commands as bench
    from unbraid.cli import COMMANDS
    from unbraid.feature_model import commands as features
    from unbraid.feature_model.attribution import METHODS
    from unbraid.formats import WRITABLE
    from unbraid.reporting import commands as reporting

    recipes, named = tuple(RECIPES), tuple(BUNDLED)
    run = _settings(RunConfig)
    own = {"preset": tuple(PRESETS)}
    changes = tuple(flag for flag in run if flag.name.removeprefix("--").replace("-", "_") in MAY_CHANGE)
    found = {
        "train": Words(recipes, (*_settings(commands._TrainOptions, own), *run)),
        "harvest": Words(recipes, run),
        "resume": Words((), (*_options(commands._Resume), *changes)),
        "launch": Words(("train", "resume"), _options(commands.Launch)),
        "eval": Words(
            named, (Flag("--suite", BUILT_IN, "Suites to run."), *_settings(EvaluationConfig, {"suites": BUILT_IN}))
        ),
        "finetune": Words(named, _options(commands._Finetune)),
        "figure": Words((), _options(commands._Figure)),
        "compare": Words(named, _options(reporting._Compare)),
        "export": Words(named, _options(reporting._Export, {"to": tuple(WRITABLE)})),
        "search": Words((), _options(reporting._Search)),
        "dashboard": Words((), _options(reporting._Dashboard)),
        "read": Words(named, _options(features._Read)),
        "feature": Words(named, _options(features._Feature)),
        "steer": Words(named, _options(features._Steer)),
        "attribute": Words(named, _options(features._Attribute, {"method": METHODS})),
        "live": Words(named, _options(features._Live)),
        "synth": Words(_worlds(), (*_settings(commands._SynthOptions), *_settings(SynthConfig))),
        "bench": Words(bench.KINDS, _options(bench.Bench)),
        "doctor": Words(),
        "presets": Words(),
        "completion": Words(SHELLS),
        "help": Words(tuple(COMMANDS)),
    }
    with_settings = ("train", "harvest", "eval", "synth")
    return {
        name: Words(
            words.words,
            (*words.flags, *map(Flag, EVERYWHERE), *([Flag("--help-all")] if name in with_settings else [])),
        )
        for name, words in found.items()
    }


def _settings(model: type[Section], values: Mapping[str, tuple[str, ...]] | None = None) -> tuple[Flag, ...]:
    """A flag for every setting of `model`, of every kind."""
    flags = []
    for path in setting_paths(model):
        found = fields(model, path)[0]
        listed = (values or {}).get(path) or _kinds(model, path) or _choices(annotation_of(found))
        flags.append(Flag(_flag(path), listed, _first_sentence(found.description or "")))
    return tuple(flags)


def _kinds(model: type[Section], path: str) -> tuple[str, ...]:
    """The kinds a setting chooses from, if it is the one that names the kind of its group."""
    group, _, name = path.rpartition(".")
    at: type[Section] | None = model
    for part in group.split(".") if group else []:
        at = None if at is None else group_of(at.model_fields[part].annotation)
    return tuple(at.kinds()) if at is not None and issubclass(at, Kinds) and at.names_kind == name else ()


def _options(options: Any, values: Mapping[str, tuple[str, ...]] | None = None) -> tuple[Flag, ...]:
    """A flag for every option of a command's dataclass; positional words are left out."""
    hints = typing.get_type_hints(options, include_extras=True)
    flags = []
    for one in dataclasses.fields(options):
        metadata = getattr(hints[one.name], "__metadata__", ())
        if any("Positional" in repr(item) or "POSITIONAL" in repr(item) for item in metadata):
            continue
        name = next((item.name for item in metadata if getattr(item, "name", None)), one.name)
        bare = typing.get_args(hints[one.name])[0] if metadata else hints[one.name]
        flags.append(Flag(_flag(name), (values or {}).get(one.name) or (() if bare is bool else _choices(bare))))
    return tuple(flags)


def _choices(annotation: Any) -> tuple[str, ...]:
    """What a type's values are, where they can be listed."""
    if typing.get_origin(annotation) is typing.Literal:
        return tuple(map(str, typing.get_args(annotation)))
    if annotation is bool:
        return ("true", "false")
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list, typing.Annotated):
        return tuple(dict.fromkeys(value for one in typing.get_args(annotation)[:9] for value in _choices(one)))
    return ()


def _worlds() -> tuple[str, ...]:
    from unbraid.synthetic.worlds import WORLDS

    return tuple(WORLDS)


def _flag(path: str) -> str:
    return f"--{path.replace('_', '-')}"


def _first_sentence(text: str) -> str:
    return " ".join(text.split()).split(". ")[0].split("; ")[0].rstrip(".")[:90]


HOW_TO = """unbraid completion bash|zsh|fish: print a script that completes commands, flags and values

  bash   unbraid completion bash > ~/.local/share/bash-completion/completions/unbraid
  zsh    unbraid completion zsh > ~/.unbraid-completion.zsh; echo 'source ~/.unbraid-completion.zsh' >> ~/.zshrc
  fish   unbraid completion fish > ~/.config/fish/completions/unbraid.fish

or for this shell alone: source <(unbraid completion bash)"""


def _bash() -> str:
    table = command_words()
    names = " ".join(table)
    return "\n".join(
        [
            "# completion of unbraid for bash; made by `unbraid completion bash`",
            "_unbraid() {",
            '    local word="${COMP_WORDS[COMP_CWORD]}" before="" command="${COMP_WORDS[1]}" words="" place',
            '    (( COMP_CWORD > 0 )) && before="${COMP_WORDS[COMP_CWORD-1]}"',
            "    # readline splits --flag=value into three words",
            '    if [[ $word == "=" ]]; then word=""',
            '    elif [[ $before == "=" ]]; then before="${COMP_WORDS[COMP_CWORD-2]}"; fi',
            "    if (( COMP_CWORD == 1 )); then",
            f'        COMPREPLY=($(compgen -W "{names} --help --version" -- "$word")); return',
            "    fi",
            "    if [[ $command == launch ]]; then  # the command after it counts",
            "        for (( place = 2; place < COMP_CWORD; place++ )); do",
            '            case "${COMP_WORDS[place]}" in train|resume) command="${COMP_WORDS[place]}"; break ;; esac',
            "        done",
            "    fi",
            '    case "$command $before" in',
            *(f'        {case}) words="{values}" ;;' for case, values in _bash_values(table)),
            "    esac",
            "    if [[ -z $words && $word == -* ]]; then",
            '        case "$command" in',
            *(
                f'            {name}) words="{" ".join(flag.name for flag in found.flags)}" ;;'
                for name, found in table.items()
            ),
            "        esac",
            "    elif [[ -z $words && $before != --* ]]; then",
            '        case "$command" in',
            *(
                f'            {name}) words="{" ".join(found.words)}" ;;'
                for name, found in table.items()
                if found.words
            ),
            "        esac",
            "    fi",
            '    COMPREPLY=($(compgen -W "$words" -- "$word"))',
            "}",
            "complete -o bashdefault -o default -F _unbraid unbraid",
            "",
        ]
    )


def _bash_values(table: Mapping[str, Words]) -> Iterator[tuple[str, str]]:
    """Patterns of command and flag, and the values of that flag."""
    commands_of: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name, found in table.items():
        for flag in found.flags:
            if flag.values:
                commands_of.setdefault((flag.name, flag.values), []).append(name)
    for (flag, values), names in commands_of.items():
        yield "|".join(f'"{name} {flag}"' for name in names), " ".join(values)


def _zsh() -> str:
    return (
        "# completion of unbraid for zsh; made by `unbraid completion zsh`\n"
        "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n" + _bash()
    )


def _fish() -> str:
    table = command_words()
    lines = [
        "# completion of unbraid for fish; made by `unbraid completion fish`",
        f"complete -c unbraid -n __fish_use_subcommand -f -a '{' '.join(table)}'",
    ]
    for name, found in table.items():
        under = f"complete -c unbraid -n '__fish_seen_subcommand_from {name}'"
        if found.words:
            lines.append(f"{under} -a '{' '.join(found.words)}'")
        for flag in found.flags:
            values = f" -x -a '{' '.join(flag.values)}'" if flag.values else ""
            what = f" -d {_quoted(flag.what)}" if flag.what else ""
            lines.append(f"{under} -l {flag.name.removeprefix('--')}{values}{what}")
    return "\n".join([*lines, ""])


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


_SCRIPTS: dict[str, Callable[[], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
