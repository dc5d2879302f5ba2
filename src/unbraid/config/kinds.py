"""Groups of settings that come in kinds: one class each, with the settings that kind reads and no others.

`SAEConfig(architecture="topk", k=8)` gives a `TopKConfig`. A kind is registered by the class that reads it, where that
class is defined, so what a kind is called and what it reads stand in one file, inside the package or outside.
"""

import difflib
import importlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import ValidationError, model_validator
from pydantic_core import InitErrorDetails

from unbraid.config.checks import Section, checked, complaints, unread, wrong
from unbraid.errors import ConfigError

ReaderT = TypeVar("ReaderT", bound=type)
KindsT = TypeVar("KindsT", bound="Kinds")


class Registry(Generic[ReaderT]):
    """Names -> the classes that read settings of those kinds.

    Args:
        path: the setting that names the kind, such as sae.architecture.
        home: the module whose import registers the package's own kinds.
    """

    def __init__(self, path: str, home: str):
        self.path, self.home = path, home
        self._readers: dict[str, ReaderT] = {}

    def add(self, name: str, reader: ReaderT) -> None:
        """Register `reader`.

        Raises:
            ConfigError: another class has that name.
        """
        known = self._readers.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (reader.__module__, reader.__qualname__):
            raise ConfigError(
                f"{self.path} {name!r} of {reader.__module__}.{reader.__qualname__} is the name of "
                f"{known.__module__}.{known.__qualname__} already; expected a name of its own"
            )
        self._readers[name] = reader

    def forget(self, name: str) -> None:
        """Take back what was registered under a name."""
        self._readers.pop(name, None)

    @property
    def registered(self) -> Mapping[str, ReaderT]:
        """Those registered so far: of the package's own perhaps none."""
        return self._readers

    def readers(self) -> Mapping[str, ReaderT]:
        """All of them, in the order they were registered."""
        importlib.import_module(self.home)
        return self._readers


class Kinds(Section):
    """Base of a group that comes in kinds; calling or validating the base gives the kind that the data names."""

    names_kind: ClassVar[str]
    """The setting that names the kind; every kind gives it a default: its own name."""
    default_kind: ClassVar[str]
    registry: ClassVar[Registry[Any]]

    def __new__(cls, **settings: Any) -> Any:  # noqa: D102 - described by the class
        if _is_base(cls):
            try:
                return super().__new__(_kind(cls, settings))
            except ValidationError as error:
                raise ConfigError(f"{cls.__name__}: {complaints(error, cls)}") from None
        return super().__new__(cls)

    @classmethod
    def kinds(cls: type[KindsT]) -> dict[str, type[KindsT]]:
        """Every kind's settings by name."""
        return {name: reader.settings for name, reader in cls.registry.readers().items()}

    @classmethod
    def forms(cls) -> list[type[Section]]:
        """See `Section.forms`."""
        return list(cls.kinds().values()) if _is_base(cls) else [cls]

    @property
    def kind(self) -> str:
        """The name of this kind."""
        return getattr(self, self.names_kind)

    @model_validator(mode="wrap")
    @classmethod
    def _of_its_kind(cls: type[KindsT], data: Any, handler: Callable[[Any], KindsT]) -> KindsT:
        if not isinstance(data, Mapping):
            return handler(data)
        if _is_base(cls):
            return checked(_kind(cls, data), dict(data))
        elsewhere = {
            name: [kind for kind, form in cls.kinds().items() if name in form.model_fields]
            for name in data
            if name not in cls.model_fields
        }
        details = [
            InitErrorDetails(
                type=unread(_read_by(cls.registry.path, kinds)),
                loc=(name,),
                input=data[name],
            )
            for name, kinds in elsewhere.items()
            if kinds
        ]
        if details:
            raise ValidationError.from_exception_data(cls.__name__, details)
        return handler(data)

    @model_validator(mode="after")
    def _names_its_kind(self) -> "Kinds":
        self.model_fields_set.add(self.names_kind)
        return self


def _read_by(path: str, kinds: list[str]) -> str:
    return f"is read by {', '.join(kinds)}; set {path} to {'it' if len(kinds) == 1 else 'one of these'}"


def _is_base(cls: type[Kinds]) -> bool:
    return Kinds in cls.__bases__


def _kind(base: type[KindsT], data: Mapping[str, Any]) -> type[KindsT]:
    name, kinds = data.get(base.names_kind, base.default_kind), base.kinds()
    if not isinstance(name, str) or name not in kinds:
        close = difflib.get_close_matches(str(name)[:80], kinds, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        message = f"{base.registry.path} = {str(name)[:80]!r} is unknown; expected one of {', '.join(kinds)}{hint}"
        raise ValidationError.from_exception_data(
            base.__name__, [InitErrorDetails(type=wrong(message), loc=(base.names_kind,), input=name)]
        )
    return kinds[name]
