"""What is known of a published dictionary beyond its own files: the path it was found under, and its registry entry."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Known:
    """What a reader may be told about the files it reads.

    Attributes:
        norm_scaling_factor: what activations were multiplied with before the dictionary saw them, where its files do
            not say it.
        decoder_norms: for Llama Scope, whether thresholds apply to codes multiplied with their decoder row's norm
            ("folded") or to codes as they are ("kept"); what the files ask for by default.
        settings: entries of cfg.json that go before the file's own.
        metadata: where the dictionary belongs, under SAELens' names; goes before what the files say.
        several_sites: whether a dictionary that reads several sites is wanted too.
    """

    norm_scaling_factor: float | None = None
    decoder_norms: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    several_sites: bool = False


NOTHING = Known()


def path_words(path: Path) -> str:
    """The end of a path as `owner/name/folder/...`, whether it is a plain folder or one in the hub's cache."""
    parts = list(path.absolute().parts[-9:])
    if "snapshots" in parts[1:-1]:  # models--OWNER--NAME/snapshots/COMMIT/...
        at = parts.index("snapshots")
        parts[at - 1 : at + 2] = [parts[at - 1].removeprefix("models--").replace("--", "/")]
    return "/".join(parts)
