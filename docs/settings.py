"""Write docs/settings.md from the settings themselves: every name, default, check and docstring, so it cannot drift.

python docs/settings.py          rewrites docs/settings.md
python docs/settings.py --check  fails when it is out of date
"""

import typing
from types import UnionType

from annotated_types import Ge, Gt, Le, Lt, MinLen
from generated import write_or_check
from pydantic.fields import FieldInfo

from unbraid.config import EvaluationConfig, RunConfig, SynthConfig, WorldConfig
from unbraid.config.checks import ActiveWhen, Section, group_of
from unbraid.config.kinds import Kinds

HEAD = """# Settings

Every setting of unbraid, written by `docs/settings.py` from the classes in `unbraid.config`. Each is a flag of the
command line (`unbraid train demo --sae.k 32`), a key of `config.json`, and an attribute in Python. An unknown or
unacceptable setting ends in one message that names it; nothing is dropped silently. A setting that says when it is read
is refused otherwise: given by hand, every setting changes something.
"""
SECTIONS: list[tuple[str, type[Section]]] = [
    ("A run: `unbraid train`, `unbraid harvest`", RunConfig),
    ("Evaluation: `unbraid eval`", EvaluationConfig),
    ("Synthetic worlds: `unbraid synth`", SynthConfig),
    ("The worlds themselves: `unbraid.config.WorldConfig`", WorldConfig),
]
SYMBOLS = {Ge: ("at least {}", "ge"), Gt: ("above {}", "gt"), Le: ("at most {}", "le"), Lt: ("below {}", "lt")}


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *(line for title, model in SECTIONS for line in section(title, model, "", "##"))])


def section(title: str, model: type[Section], prefix: str, heading: str) -> list[str]:
    """A heading, a table of the settings of `model`, and a section for each group it holds."""
    lines = [f"{heading} {title}", "", (model.__doc__ or "").split("\n\n")[0].replace("\n", " ").strip(), ""]
    lines += ["| setting | default | accepts | what it is | read |", "|---|---|---|---|---|"]
    groups: list[str] = []
    for form in model.forms():
        for name, field in form.model_fields.items():
            group = group_of(field.annotation)
            if group is None:
                row = _row(f"{prefix}{name}", field, model)
                lines += [row] if row not in lines else []
            elif model is not RunConfig and name in RunConfig.model_fields:
                lines.append(f"| `{name}.*` | | | As of a run, above. | |")
            else:
                groups += section(f"`{name}`", group, f"{prefix}{name}.", f"{heading}#")
    return [*lines, "", *groups]


def _row(path: str, field: FieldInfo, model: type[Section]) -> str:
    name = path.rpartition(".")[2]
    if issubclass(model, Kinds) and name == model.names_kind:
        field = model.model_fields[name]
        cells = [f"`{path}`", f"`{model.default_kind}`", " or ".join(f"`{kind}`" for kind in model.kinds())]
    else:
        cells = [f"`{path}`", _default(field), _accepts(field)]
    cells += [" ".join((field.description or "").split()), _read(name, field, model)]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _read(name: str, field: FieldInfo, model: type[Section]) -> str:
    """When a setting is read; empty for always."""
    read: list[str] = []
    if issubclass(model, Kinds) and name not in model.model_fields:
        read.append(f"by {', '.join(kind for kind, other in model.kinds().items() if name in other.model_fields)}")
    for rule in field.metadata:
        if isinstance(rule, ActiveWhen):
            read += [f"while `{path}` is {wanted.words}" for path, wanted in rule.conditions.items()]
    return "; ".join(read)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    value = "none" if value is None else value
    shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    if isinstance(value, list) and len(value) > 4:
        return f"{len(value)} of them"
    return f"`{shown}`" if shown else "empty"


def _accepts(field: FieldInfo) -> str:
    limits = [
        SYMBOLS[type(limit)][0].format(f"{getattr(limit, SYMBOLS[type(limit)][1]):,}")
        for limit in field.metadata
        if type(limit) in SYMBOLS
    ]
    limits += [f"at least {limit.min_length} of them" for limit in field.metadata if isinstance(limit, MinLen)]
    return ", ".join([_type(field.annotation), *limits])


def _type(annotation: object) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if annotation is type(None):
        return "none"
    if origin is typing.Literal:
        return " or ".join(f"`{choice}`" for choice in arguments)
    if origin in (typing.Union, UnionType):
        return " or ".join(_type(argument) for argument in arguments)
    if origin is list:
        return f"list of {_type(arguments[0])}"
    if origin is tuple:
        return f"{len(arguments)} numbers"
    if origin is dict:
        return "JSON object"
    names = {int: "whole number", float: "number", str: "text", bool: "true or false"}
    return names[annotation] if annotation in names else str(annotation)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    write_or_check("settings.md", page())
