"""Code of a user's that registers architectures, penalties and what else has a registry, named by hand.

It is imported because the command line says so, never because a file does: nothing a run folder holds can name code.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

from unbraid.errors import ConfigError


def load_plugin(name: str) -> None:
    """Import a module, from the working folder too, or a file ending in .py.

    Raises:
        ConfigError: there is no such module, or importing it failed.
    """
    try:
        if name.endswith(".py"):
            _load_file(Path(name))
        else:
            if "" not in sys.path and str(Path.cwd()) not in sys.path:
                sys.path.insert(0, str(Path.cwd()))
            importlib.import_module(name)
    except ConfigError:
        raise
    except Exception as error:  # a user's code can fail in any way
        raise ConfigError(
            f"--plugin {name} cannot be imported: {type(error).__name__}: {error}; expected the name of a module, or a "
            "file ending in .py; --debug shows where it failed"
        ) from error


def _load_file(path: Path) -> None:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError(f"--plugin {path}: no such file; expected a Python file or the name of a module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
