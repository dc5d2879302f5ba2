"""Public names of a package that are imported when they are first asked for (PEP 562).

So importing a package costs nothing, and `unbraid --help` does not wait for torch.
"""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def imported_when_asked_for(package: str, homes: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """The `__getattr__` of `package`.

    Args:
        package: its name.
        homes: module -> names of the package that it defines; a module that is itself one of its names stands for
            itself.
    """
    home = {name: module for module, names in homes.items() for name in names}

    def find(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(home[name])
        found = module if home[name] == f"{package}.{name}" else getattr(module, name)
        setattr(sys.modules[package], name, found)
        return found

    return find
