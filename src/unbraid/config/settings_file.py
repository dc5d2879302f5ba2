"""Settings read from a file: a run's own, or some written by hand."""

from pathlib import Path
from typing import Any

from unbraid.config.overrides import flattened, merged
from unbraid.config.run import RunConfig
from unbraid.errors import ConfigError
from unbraid.json_files import read_json_object


def load_config(path: Path) -> RunConfig:
    """Read a `config.json` as written into every run folder, or settings written by hand.

    Raises:
        ConfigError: the file is missing, not JSON, or holds unknown or unacceptable settings.
    """
    base, by_hand = read_settings(path)
    return merged(RunConfig, base, by_hand, str(path))[0]


def read_settings(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a file: those a run wrote, of which some may not be read any more, and those given by hand.

    Raises:
        ConfigError: the file is missing or not a JSON object.
    """
    data = read_json_object(path, ConfigError, "settings as in a run's config.json")
    written_by_a_run = "version" in data or _is_dump_of_version_0_1(data)
    return (data, {}) if written_by_a_run else ({}, flattened(data))


def _is_dump_of_version_0_1(data: dict[str, Any]) -> bool:
    """Version 0.1 wrote every setting of every kind, which nobody writes by hand."""
    sae = data.get("sae")
    return isinstance(sae, dict) and {"k", "lambda1", "bandwidth", "corruption", "matryoshka_widths"} <= set(sae)


def require_trust(config: RunConfig, given: bool, where: str) -> RunConfig:
    """`config`, which was read from the file `where`, if it may load its model.

    Settings come from anywhere, and those with model.trust_remote_code would run whatever code lies with the model. A
    file cannot allow that; only whoever starts the command can.

    Raises:
        ConfigError: the settings ask for it and it was not `given` by hand.
    """
    if config.model.trust_remote_code and not given:
        raise ConfigError(
            f"{where} asks for model.trust_remote_code, which runs code that comes with the model "
            f"{config.model.name!r}; expected that to be allowed by hand, not by a file; read that code, then add "
            "--model.trust_remote_code to this command (trust_remote_code=True in Python)"
        )
    return config
