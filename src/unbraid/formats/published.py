"""What is known of a published dictionary beyond its own files: the path it was found under."""

from pathlib import Path


def path_words(path: Path) -> str:
    """The end of a path as `owner/name/folder/...`, whether it is a plain folder or one in the hub's cache."""
    parts = list(path.absolute().parts[-8:])
    if "snapshots" in parts[:-1]:  # models--OWNER--NAME/snapshots/COMMIT/...
        at = parts.index("snapshots")
        parts[max(0, at - 1) : at + 2] = [parts[at - 1].removeprefix("models--").replace("--", "/")]
    return "/".join(parts)
