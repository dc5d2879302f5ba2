"""Settings over settings: what a user gives by hand, over what a recipe, a preset or an older file says.

A setting given by hand changes something or is refused. One that was there before and is no longer read, because what
was given by hand chose another kind, is dropped and listed.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import InitErrorDetails

from unbraid.config.checks import (
    UNREAD,
    Location,
    SectionT,
    checked,
    complaint,
    complaints,
    setting_paths,
    suggestion,
    unread,
    wrong,
)
from unbraid.errors import ConfigError


class Dropped(NamedTuple):
    """A setting of a recipe, a preset or an older file that is not read any more."""

    path: str
    value: Any
    why: str

    def __str__(self) -> str:
        return f"{self.path} = {self.value}: {self.why.split('; ')[0]}"  # what would make it be read was not asked for


def overridden(config: SectionT, given: Mapping[str, Any], where: str = "settings") -> tuple[SectionT, list[Dropped]]:
    """`config` with settings given by hand, and what of `config` they leave without effect.

    Args:
        config: what stands; only what was set in it can be listed as dropped.
        given: dotted path -> value, such as `{"sae.architecture": "topk", "sae.k": 8}`.
        where: whose settings `given` are, for messages.

    Raises:
        ConfigError: a given setting is unknown, unacceptable, or would do nothing.
    """
    return merged(type(config), config.model_dump(exclude_unset=True), given, where)


def merged(
    model: type[SectionT], base: Mapping[str, Any], given: Mapping[str, Any], where: str
) -> tuple[SectionT, list[Dropped]]:
    """The same from plain data; see `overridden`."""
    try:
        return merge(model, base, given)
    except ValidationError as error:
        raise ConfigError(f"{where}: {complaints(error, model)}") from None


def merge(model: type[SectionT], base: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[SectionT, list[Dropped]]:
    """The same, with pydantic's complaints about what was given."""
    data, dropped = _copied(base), []
    for path, value in given.items():
        _set(model, data, path, value)
    by_hand = [tuple(path.split(".")) for path in given]
    while True:
        try:
            return checked(model, data), dropped
        except ValidationError as error:
            items = error.errors(include_url=False)
            stays = [item for item in items if item["type"] != UNREAD or _is_of(_location(item), by_hand)]
            if stays:
                raise _only(stays, model) from None
            for item in items:
                dropped.append(Dropped(".".join(_location(item)), _removed(data, _location(item)), item["msg"]))


def flattened(data: Mapping[str, Any], keep: Iterable[str] = ("variants",), prefix: str = "") -> dict[str, Any]:
    """`{"sae": {"k": 8}}` -> `{"sae.k": 8}`; what `keep` names stays whole, and so does an empty object."""
    flat: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, dict) and value and name not in keep:
            flat |= flattened(value, keep, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _copied(data: Any) -> Any:
    return {key: _copied(value) for key, value in data.items()} if isinstance(data, Mapping) else data


def _location(item: Any) -> Location:
    return tuple(map(str, item["loc"]))


def _is_of(location: Location, given: list[Location]) -> bool:
    """Whether a complaint is about something given by hand, or about the group it is in."""
    return any(all(mine == its for mine, its in zip(location, one, strict=False)) for one in given)


def _set(model: type[SectionT], data: dict[str, Any], path: str, value: Any) -> None:
    *groups, last = path.split(".")
    inner, known = data, setting_paths(model)
    for depth, group in enumerate(groups):
        prefix = ".".join(groups[: depth + 1])
        if not any(name.startswith(f"{prefix}.") for name in known) or not isinstance(inner.get(group, {}), dict):
            raise _complaint(model, path, f"unknown setting {path!r}{suggestion(path, known)}", value)
        inner = inner.setdefault(group, {})
    members = [name for name in known if name.startswith(f"{path}.")]
    if members and value == {}:
        return
    if members:
        raise _complaint(
            model, path, f"{path!r} is a group of settings; expected one of its members, such as {members[0]!r}", value
        )
    inner[last] = value


def _complaint(model: type[SectionT], path: str, message: str, value: Any) -> ValidationError:
    details = InitErrorDetails(type=wrong(message), loc=tuple(path.split(".")), input=value)
    return ValidationError.from_exception_data(model.__name__, [details])


def _only(items: list[Any], model: type[SectionT]) -> ValidationError:
    """These complaints alone, in words."""
    return ValidationError.from_exception_data(
        model.__name__,
        [
            InitErrorDetails(
                type=unread(item["msg"]) if item["type"] == UNREAD else wrong(complaint(item, model)),
                loc=item["loc"],
                input=item["input"],
            )
            for item in items
        ],
    )


def _removed(data: dict[str, Any], location: Location) -> Any:
    *groups, last = location
    for group in groups:
        data = data[group]
    return data.pop(last)
