"""What every group of settings shares: unknown keys are refused with a suggestion, a complaint is one line."""

import difflib
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from unbraid.errors import ConfigError

ModelT = TypeVar("ModelT", bound=BaseModel)


class Section(BaseModel):
    """Shared behaviour of every group of settings: frozen, typed, no unknown keys, docs from attribute docstrings."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


def validated(model: type[ModelT], data: Any, where: str) -> ModelT:
    """`model` built from `data`; every complaint of pydantic's becomes one readable `ConfigError`."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{where}: {complaints(error, setting_paths(model))}") from None


def complaints(error: ValidationError, known: list[str]) -> str:
    """What pydantic complains of, in one line; `known` settings are what an unknown one may have meant."""
    return "; ".join(_complaint(item, known) for item in error.errors())


def _complaint(item: Any, known: list[str]) -> str:
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"unknown setting {path!r}{suggestion(path, known)}"
    return f"{path} = {item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}"


def setting_paths(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of every setting of `model`."""
    paths: list[str] = []
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            paths += setting_paths(annotation, f"{prefix}{name}.")
        else:
            paths.append(f"{prefix}{name}")
    return paths


def suggestion(path: str, known: list[str]) -> str:
    """`"; did you mean ...?"` for a misspelt setting, matched on the whole path and then on its last part."""
    close = difflib.get_close_matches(path, known, n=1, cutoff=0.7)
    close = close or [name for name in known if name.rpartition(".")[2] == path.rpartition(".")[2]][:1]
    close = close or difflib.get_close_matches(path, known, n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else f"; known settings: {', '.join(known)}"


def set_by_path(data: dict[str, Any], path: str, value: Any, where: str) -> None:
    """Set `data["a"]["b"]` for path "a.b" in place; the settings' own checks come later.

    Raises:
        ConfigError: the path leads through something that is not a group of settings.
    """
    *groups, last = path.split(".")
    for group in groups:
        if not isinstance(data.get(group), dict):
            known = [
                f"{outer}.{inner}" for outer, members in data.items() if isinstance(members, dict) for inner in members
            ]
            raise ConfigError(f"{where}: unknown setting {path!r}{suggestion(path, known)}")
        data = data[group]
    data[last] = value
