"""Settings on the command line: which flags there are, what their words mean, and the help that lists them.

The flags are the settings themselves, of every kind, so that a setting given for a kind that does not read it is
answered with what would make it be read, and not as unknown. What was given stays apart from what a recipe says.
"""

import json
import shutil
import textwrap
import types
import typing
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro
from pydantic.fields import FieldInfo

from unbraid.config.checks import Common, Section, group_of, setting_paths, suggestion
from unbraid.config.kinds import Kinds
from unbraid.errors import ConfigError
from unbraid.json_files import parse_json

NONE = ("none", "None", "null")
TRUST = "--model.trust_remote_code"
Trust = Annotated[
    bool,
    tyro.conf.arg(name=TRUST.removeprefix("--"), help="Run code shipped with the model, if its settings ask for it."),
]
BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclass
class Given:
    """What stood on a command line.

    Attributes:
        words: those that belong to no flag.
        own: flags of the command itself.
        settings: dotted path -> value.
        wants_help: whether help was asked for; `everything` with the settings few need.
    """

    words: list[str] = field(default_factory=list)
    own: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    wants_help: bool = False
    everything: bool = False


def read_flags(
    words: list[str], model: type[Section], own: type[Section], aliases: Mapping[str, str] | None = None
) -> Given:
    """Sort words into flags of `own`, settings of `model`, and the rest.

    Args:
        words: after the command.
        model: whose settings can be given.
        own: the command's own options.
        aliases: another name of a flag -> its name.

    Raises:
        ConfigError: a flag is unknown, given twice, or its words do not fit its type.
    """
    given, words = Given(), list(words)
    known = {path: fields(model, path) for path in setting_paths(model)}
    mine = {path: fields(own, path) for path in setting_paths(own)}
    while words:
        word = words.pop(0)
        if word in ("-h", "--help", "--help-all"):
            given.wants_help, given.everything = True, given.everything or word == "--help-all"
            continue
        if not word.startswith("--") or word == "--":
            given.words.append(word)
            continue
        flag, equals, value = word[2:].partition("=")
        path, negated = _path(flag, known.keys() | mine.keys(), aliases or {})
        if path not in known and path not in mine:
            listed = [f"--{name.replace('_', '-')}" for name in [*mine, *known]]
            raise ConfigError(f"unknown flag --{flag}{suggestion(f'--{flag}', listed)}")
        target = given.own if path in mine else given.settings
        if path in target:
            raise ConfigError(f"--{flag} is given twice; expected it once")
        annotation = annotation_of((mine | known)[path][0])
        taken = [value] if equals else ["false"] if negated else _words_of(annotation, words)
        target[path] = value_of(annotation, taken, f"--{flag}")
    return given


def fields(model: type[Section], path: str) -> list[FieldInfo]:
    """The setting at `path`, in each kind that has it."""
    name, _, rest = path.partition(".")
    if name not in model.model_fields:
        return []
    found = model.model_fields[name]
    group = group_of(found.annotation)
    if group is None:
        return [] if rest else [found]
    return [one for form in group.forms() for one in fields(form, rest)]


def _path(flag: str, known: Set[str], aliases: Mapping[str, str]) -> tuple[str, bool]:
    """The setting a flag names, and whether it is its `no-` form."""
    path = flag.replace("-", "_")
    path = aliases.get(path, path)
    group, _, name = path.rpartition(".")
    positive = f"{group}.{name.removeprefix('no_')}".lstrip(".")
    if path not in known and name.startswith("no_") and positive in known:
        return positive, True
    return path, False


def annotation_of(found: FieldInfo) -> Any:
    """A setting's type, without what checks it."""
    return _bare(found.annotation)


def _bare(annotation: Any) -> Any:
    while typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    return annotation


def _words_of(annotation: Any, words: list[str]) -> list[str]:
    """Take the words that belong to a flag of this type off the front of `words`."""
    taken: list[str] = []
    form = _many(annotation)
    most = len(typing.get_args(form)) if typing.get_origin(form) is tuple else 1 if form is None else None
    choices = _choices(typing.get_args(form)[0]) if form is not None else ()
    while words and not words[0].startswith("--") and (most is None or len(taken) < most):
        if annotation is bool and words[0].lower() not in BOOLEANS:
            break
        if taken and choices and not set(words[0].split(",")) <= set(choices):
            break
        taken.append(words.pop(0))
    return ["true"] if annotation is bool and not taken else taken


def _many(annotation: Any) -> Any:
    """The list or tuple among the types of a setting, if there is one."""
    for one in _alternatives(annotation):
        if typing.get_origin(one) in (list, tuple):
            return one
    return None


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(_bare(one) for one in typing.get_args(annotation))
    return (annotation,)


def _choices(annotation: Any) -> tuple[str, ...]:
    annotation = _bare(annotation)
    return typing.get_args(annotation) if typing.get_origin(annotation) is typing.Literal else ()


def value_of(annotation: Any, words: list[str], flag: str) -> Any:
    """What words mean for a setting of this type.

    Raises:
        ConfigError: they mean nothing of this type.
    """
    alternatives = _alternatives(_bare(annotation))
    if not words:
        raise ConfigError(f"{flag} has no value; expected {' or '.join(_expected(one) for one in alternatives)}")
    if len(words) == 1 and words[0] in NONE and type(None) in alternatives:
        return None
    for one in sorted(alternatives, key=lambda one: one is str):
        if one is type(None):
            continue
        try:
            return _as(one, words, flag)
        except ValueError:
            continue
    shown = " ".join(words)[:80]
    raise ConfigError(f"{flag} = {shown!r}; expected {' or '.join(_expected(one) for one in alternatives)}")


def _as(annotation: Any, words: list[str], flag: str) -> Any:
    origin, members = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is list:
        if _choices(members[0]):
            return [part for word in words for part in word.split(",")]
        return [value_of(members[0], [word], flag) for word in words]
    if origin is tuple:
        if len(words) != len(members):
            raise ValueError
        return tuple(value_of(member, [word], flag) for member, word in zip(members, words, strict=True))
    (text,) = words
    if origin is dict:
        return parse_json(text, lambda why: ConfigError(f"{flag} {why}; expected a JSON object"))
    if annotation is bool:
        if text.lower() not in BOOLEANS:
            raise ValueError
        return BOOLEANS[text.lower()]
    if annotation is int:
        return _whole(text)
    if annotation is float:
        return float(text)
    return text


def _whole(text: str) -> int:
    """`2048`, `1_000_000` or `1e6`."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer() or abs(number) > 1e18:
            raise ValueError from None
        return int(number)


def _expected(annotation: Any) -> str:
    origin, members = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return "none"
    if origin is typing.Literal:
        return ", ".join(map(str, members))
    if origin is list:
        return f"one or more of {_expected(_bare(members[0]))}"
    if origin is tuple:
        return f"{len(members)} numbers"
    if origin is dict:
        return "a JSON object"
    return EXPECTED.get(annotation, "a value")


def help_of(title: str, config: Section, own: type[Section], everything: bool) -> str:
    """The flags that apply to `config`, with their values there; the common ones, or all."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    lines = [title, "", *_listed("flags of this command", "", dict.fromkeys(own.model_fields), own, True, width)]
    lines += _group("", config.model_dump(), type(config), config, everything, width)
    if not everything:
        lines += ["", "--help-all lists every setting; docs/settings.md describes them."]
    return "\n".join(lines)


def _group(
    prefix: str, values: dict[str, Any], model: type[Section], config: Section, everything: bool, width: int
) -> list[str]:
    plain = {name: value for name, value in values.items() if name in model.model_fields}
    groups = {name for name in plain if group_of(model.model_fields[name].annotation)}
    heading = prefix.rstrip(".") or "settings"
    lines = _listed(heading, prefix, {n: v for n, v in plain.items() if n not in groups}, model, everything, width)
    for name in [name for name in plain if name in groups]:
        inner = getattr(config, name)
        lines += _group(f"{prefix}{name}.", plain[name], type(inner), inner, everything, width)
    return lines


def _listed(
    heading: str, prefix: str, values: dict[str, Any], model: type[Section], everything: bool, width: int
) -> list[str]:
    lines: list[str] = []
    for name, value in values.items():
        found = model.model_fields[name]
        kinds = list(model.kinds()) if issubclass(model, Kinds) and model.names_kind == name else []
        if not everything and not kinds and Common not in found.metadata:
            continue
        shown = "" if value is None and not prefix else f"  [{_shown(value)}]"
        accepts = ", ".join(kinds) or " or ".join(map(_expected, _alternatives(annotation_of(found))))
        lines.append(f"  --{prefix}{name}".replace("_", "-") + shown)
        text = f"{' '.join(_described(model, name).split())} ({accepts})".lstrip()
        lines += textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return [f"{heading}:", *lines, ""] if lines else []


def _described(model: type[Section], name: str) -> str:
    """A setting's description; a kind that only gives it another default leaves that to its base."""
    found = (base.model_fields[name] for base in model.__mro__ if name in getattr(base, "model_fields", {}))
    return next((field.description for field in found if field.description), "")


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    if isinstance(value, dict):
        return json.dumps(value)
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
