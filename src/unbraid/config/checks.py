"""What every group of settings shares: strict types, no unknown key, no setting that does nothing, one-line complaints.

A setting may say beside itself when it is read (`active_when`). Given while it is not read, it is refused with what
would activate it; left alone, it is absent from dumps, so that a dump holds exactly what the run reads.
"""

import difflib
import re
import reprlib
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, NamedTuple, TypeVar, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from unbraid.errors import ConfigError

SectionT = TypeVar("SectionT", bound=BaseModel)
Location = tuple[str, ...]
UNREAD = "unread"
"""Type of pydantic's complaint about a setting that would do nothing."""
LONGEST_NAME = 255
"""Bytes, of a file on any system."""
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 120
_short.maxlevel = 3


class Common:
    """Marks a setting that `--help` shows first; the others are behind `--help-all`."""


class Condition(NamedTuple):
    """When a value counts, and in words."""

    holds: Callable[[Any], bool]
    words: str


class ActiveWhen(NamedTuple):
    """A setting is read while every one of these settings, named as seen from its group, meets its condition."""

    conditions: Mapping[str, Condition]


def active_when(**conditions: Any) -> ActiveWhen:
    """To stand in a setting's `Annotated`: what other settings must be for this one to be read.

    Keys are settings of the same group, or `group__setting` for one of another group of the same SAE. A value is what
    that setting must be, a tuple of such, or a `Condition`.

        >>> active_when(threshold="fixed").conditions["threshold"].words
        'fixed'
    """
    return ActiveWhen({name.replace("__", "."): _condition(wanted) for name, wanted in conditions.items()})


def _condition(wanted: Any) -> Condition:
    if isinstance(wanted, Condition):
        return wanted
    accepted = wanted if isinstance(wanted, tuple) else (wanted,)
    return Condition(lambda value: value in accepted, " or ".join(map(str, accepted)))


GIVEN = Condition(lambda value: value is not None, "given")
"""Any value but none."""


def above(limit: float | int) -> Condition:
    """A number above `limit`."""
    return Condition(lambda value: value > limit, f"something above {limit:g}")


def including(*members: str) -> Condition:
    """A list that holds one of `members`."""
    return Condition(lambda value: any(member in value for member in members), f"a list with {' or '.join(members)}")


def not_of(*kinds: str, whole: tuple[str, ...] = ()) -> Condition:
    """A text that does not begin with one of `kinds` and a colon, and is none of `whole`."""
    prefixes = tuple(f"{kind}:" for kind in kinds)
    return Condition(
        lambda value: not value.startswith(prefixes) and value not in whole,
        f"something other than {' or '.join([*(f'{prefix}...' for prefix in prefixes), *whole])}",
    )


def but(*texts: str) -> Condition:
    """A text that is none of these."""
    return Condition(lambda value: value not in texts, f"something other than {' or '.join(texts)}")


class Section(BaseModel):
    """A group of settings: frozen, strictly typed, documented by attribute docstrings, refusing what does nothing."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False, defer_build=True
    )
    group: ClassVar[str] = ""
    """Where the group stands in a run's settings, for messages."""

    def __init__(self, **settings: Any):
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise ConfigError(f"{type(self).__name__}: {complaints(error, type(self))}") from None

    # Pydantic then calls its validator for groups inside groups, so that a complaint names the whole path.
    __init__.__pydantic_base_init__ = True  # pyright: ignore[reportFunctionMemberAccess]

    @classmethod
    def model_validate(cls: type[SectionT], obj: Any, **options: Any) -> SectionT:
        """The settings in plain data.

        Raises:
            ConfigError: in one line, what is unknown, unacceptable or would do nothing.
        """
        return validated(cls, obj, cls.__name__, **options)

    @classmethod
    def forms(cls) -> "list[type[Section]]":
        """The classes a group of this type can be of: itself, or its kinds."""
        return [cls]

    def unread(self) -> dict[Location, str]:
        """Settings that do nothing beside the others as they are, each with what would make it be read."""
        found: dict[Location, str] = {}
        for name, field in type(self).model_fields.items():
            for rule in field.metadata:
                if isinstance(rule, ActiveWhen):
                    local = {key: wanted for key, wanted in rule.conditions.items() if "." not in key}
                    missing = self._missing(local)
                    if missing:
                        found[(name,)] = missing
        return found

    def _missing(self, conditions: Mapping[str, Condition]) -> str:
        unmet = [(name, wanted) for name, wanted in conditions.items() if not wanted.holds(getattr(self, name))]
        return activation([(f"{self.group}.{name}".lstrip("."), wanted.words) for name, wanted in unmet])

    @classmethod
    def conditions_elsewhere(cls) -> dict[str, dict[str, Condition]]:
        """Setting -> what settings of other groups must be for it to be read."""
        found: dict[str, dict[str, Condition]] = {}
        for name, field in cls.model_fields.items():
            for rule in field.metadata:
                if isinstance(rule, ActiveWhen):
                    elsewhere = {path: wanted for path, wanted in rule.conditions.items() if "." in path}
                    found |= {name: elsewhere} if elsewhere else {}
        return found

    def is_given(self, location: Location) -> bool:
        """Whether the setting at `location` was given, not left to its default."""
        name, *rest = location
        inner = getattr(self, name, None)
        return name in self.model_fields_set and (
            not rest or not isinstance(inner, Section) or inner.is_given(tuple(rest))
        )

    @field_validator("*")
    @classmethod
    def _can_be_stored_and_shown(cls, value: Any) -> Any:
        """Whole numbers beyond 64 bits fit no tensor, NUL no path, and parts of a path have their longest name."""
        for one in value if isinstance(value, list | tuple) else (value,):
            if isinstance(one, int) and not -(1 << 63) <= one < 1 << 63:
                raise PydanticCustomError("too_large", "expected a whole number of at most 64 bits")
            if isinstance(one, str) and "\0" in one:
                raise PydanticCustomError("nul", "expected text without NUL characters")
            if isinstance(one, str) and any(len(part.encode()) > LONGEST_NAME for part in re.split(r"[/\\]", one)):
                raise PydanticCustomError("too_long", "expected no name of more than 255 bytes")
        return value

    @model_validator(mode="after")
    def _nothing_given_is_unread(self) -> "Section":
        refuse(type(self), {place: why for place, why in self.unread().items() if self.is_given(place)})
        return self

    @model_serializer(mode="wrap")
    def _only_what_is_read(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        data = handler(self)
        for *groups, name in self.unread():
            inner = data
            for group in groups:
                inner = inner.get(group, {})
            inner.pop(name, None)
        return data


def activation(needs: list[tuple[str, str]]) -> str:
    """What a user has to set for a setting to be read; empty without needs."""
    if not needs:
        return ""
    read = " and ".join(f"{path} is {words}" for path, words in needs)
    to_set = " and ".join(path if words == GIVEN.words else f"{path} to {words}" for path, words in needs)
    return f"is read only while {read}; set {to_set}"


def refuse(model: type[BaseModel], idle: Mapping[Location, str]) -> None:
    """Complain, as pydantic does, about settings that would do nothing."""
    if idle:
        details = [InitErrorDetails(type=unread(why), loc=place, input=None) for place, why in idle.items()]
        raise ValidationError.from_exception_data(model.__name__, details)


def unread(why: str) -> PydanticCustomError:
    """The complaint about a setting that would do nothing."""
    return PydanticCustomError(UNREAD, "{why}", {"why": why})


def wrong(message: str) -> PydanticCustomError:
    """The complaint of a check of one's own: its message stands as it is."""
    return PydanticCustomError("wrong", "{message}", {"message": message})


def checked(model: type[SectionT], data: Any, **options: Any) -> SectionT:
    """`model` built from `data`, with pydantic's own complaints."""
    return model.__pydantic_validator__.validate_python(data, **options)  # pyright: ignore[reportReturnType]


def validated(model: type[SectionT], data: Any, where: str, **options: Any) -> SectionT:
    """`model` built from `data`; every complaint of pydantic's becomes one readable `ConfigError`."""
    try:
        return checked(model, data, **options)
    except ValidationError as error:
        raise ConfigError(f"{where}: {complaints(error, model)}") from None


def complaints(error: ValidationError, model: type[BaseModel]) -> str:
    """What pydantic complains of, in one line; the settings of `model` are what an unknown one may have meant."""
    items = error.errors(include_url=False)
    shown = "; ".join(dict.fromkeys(complaint(item, model) for item in items[:5]))
    return shown if len(items) <= 5 else f"{shown}; and {len(items) - 5} more"


def complaint(item: Any, model: type[BaseModel]) -> str:
    """One of pydantic's complaints in a line."""
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"unknown setting {path!r}{suggestion(path, setting_paths(model))}"
    if item["type"] == UNREAD:
        return f"{path} {item['msg']}"
    if item["type"] == "wrong":
        return item["msg"]
    if item["type"] == "model_type":
        return f"{path or 'the settings'} = {_short.repr(item['input'])}: expected a group of settings (a JSON object)"
    return f"{path} = {_short.repr(item['input'])}: {item['msg'][0].lower()}{item['msg'][1:]}"


def group_of(annotation: Any) -> "type[Section] | None":
    """The group of settings a field holds, if it holds one."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def setting_paths(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of every setting of `model`, of every kind where a group comes in kinds."""
    paths: list[str] = []
    for name, field in model.model_fields.items():
        group = group_of(field.annotation)
        if group is None:
            paths.append(f"{prefix}{name}")
        else:
            for form in group.forms():
                paths += [path for path in setting_paths(form, f"{prefix}{name}.") if path not in paths]
    return paths


def suggestion(path: str, known: list[str]) -> str:
    """`"; did you mean ...?"` for a misspelt setting, matched on the whole path and then on its last part."""
    close = difflib.get_close_matches(path, known, n=1, cutoff=0.7)
    close = close or [name for name in known if name.rpartition(".")[2] == path.rpartition(".")[2]][:1]
    close = close or difflib.get_close_matches(path, known, n=1, cutoff=0.4)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; expected one of {', '.join(dict.fromkeys(name.partition('.')[0] for name in known))}"


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


AsTuple = BeforeValidator(_as_tuple)
"""JSON has lists only."""
