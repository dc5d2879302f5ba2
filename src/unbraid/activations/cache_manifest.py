"""The manifest of an activation cache: what harvests write into it, and whether a run may use what it describes."""

import re
from pathlib import Path
from typing import Any

from unbraid.config import RunConfig, TextConfig
from unbraid.errors import ActivationError
from unbraid.json_files import is_count, read_json_object

FORMAT_VERSION = 1
PARTS = ("training", "held_out")


def recipe_of_activations(config: RunConfig) -> dict[str, Any]:
    """The settings that decide what a model pass gives: two runs may share a cache when these agree."""
    model = config.model.model_dump(mode="json", include={"name", "revision", "dtype", "batch_contexts"})
    return {"text": config.text.model_dump(mode="json"), "model": model, "stored_dtype": config.buffer.dtype}


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a cache says of itself.

    Raises:
        ActivationError: it is missing, damaged or of a later version.
    """
    expected = "one made by `unbraid harvest`; harvest again into a new folder"
    manifest = read_json_object(folder / "manifest.json", ActivationError, f"a cache's manifest, {expected}")
    version = manifest.get("format_version")
    if is_count(version, FORMAT_VERSION + 1):
        raise ActivationError(
            f"cache {str(folder)!r} has format version {version}; this unbraid reads up to {FORMAT_VERSION}; "
            "upgrade unbraid"
        )
    problem = _problem_in_manifest(manifest)
    if problem is not None:
        raise ActivationError(f"{str(folder / 'manifest.json')!r} is damaged: {problem}; expected {expected}")
    return manifest


def _problem_in_manifest(manifest: dict[str, Any]) -> str | None:
    """What about a manifest no harvest could have written; None for a good one."""
    if manifest.get("format_version") != FORMAT_VERSION or not isinstance(manifest.get("complete"), bool):
        return f"format_version {manifest.get('format_version')!r}, complete {manifest.get('complete')!r}"
    sites, recipe, parts = manifest.get("sites"), manifest.get("recipe"), manifest.get("parts")
    if not isinstance(sites, list) or not all(isinstance(site, str) for site in sites):
        return f"sites {sites!r}"
    if not isinstance(recipe, dict):
        return f"recipe {recipe!r}"
    if not isinstance(parts, dict) or not all(isinstance(parts.get(part), list) for part in PARTS):
        return f"parts {parts!r}"
    if manifest["complete"]:
        odd = next((name for name in ("model", "text") if not isinstance(manifest.get(name), dict)), None)
        if odd is not None:
            return f"{odd} {manifest.get(odd)!r}"
        widths, d_model = manifest.get("widths", {}), manifest.get("d_model")
        if not isinstance(widths, dict) or not all(is_count(widths.get(site, d_model), 1) for site in sites):
            return f"widths {widths!r}, d_model {d_model!r}"
        if not isinstance(manifest.get("prepends_bos"), bool):
            return f"prepends_bos {manifest.get('prepends_bos')!r}"
        special_ids = manifest.get("special_ids")
        if not isinstance(special_ids, list) or not all(map(is_count, special_ids)):
            return f"special_ids {special_ids!r}"
    return next(
        (
            f"{part} shard {number} has {problem}"
            for part in PARTS
            for number, shard in enumerate(parts[part])
            if (problem := _problem_in_shard(shard, part))
        ),
        None,
    )


def _problem_in_shard(shard: Any, part: str) -> str | None:
    if not isinstance(shard, dict):
        return repr(shard)
    file, contexts, positions = shard.get("file"), shard.get("contexts"), shard.get("positions")
    if not isinstance(file, str) or not re.fullmatch(rf"{part}_\d+\.safetensors", file):
        return f"file {file!r}"
    if not isinstance(shard.get("checksum"), str):
        return f"checksum {shard.get('checksum')!r}"
    if not isinstance(contexts, list) or not contexts or not all(is_count(count, 1) for count in contexts):
        return f"contexts {contexts!r}"
    if not isinstance(positions, list) or len(positions) != len(contexts):
        return f"{len(positions) if isinstance(positions, list) else positions!r} positions for {len(contexts)} chunks"
    if not all(isinstance(position, dict) for position in positions) or not isinstance(shard.get("filter"), dict):
        return f"positions {positions!r}, filter {shard.get('filter')!r}"
    return None


def check_recipe(manifest: dict[str, Any], config: RunConfig, folder: Path) -> None:
    """Refuse a cache that `config` cannot train from.

    Raises:
        ActivationError: naming the group of settings that differs, or the sites that are missing.
    """
    expected, found = recipe_of_activations(config), manifest["recipe"]
    if isinstance(found.get("text"), dict):  # harvests of earlier versions lack the settings that came later
        found = found | {"text": TextConfig().model_dump(mode="json") | found["text"]}
    for group in expected:
        if found.get(group) != expected[group]:
            raise ActivationError(
                f"cache {str(folder)!r} was harvested with {group} = {found.get(group)}; the run has "
                f"{expected[group]}; expected the same settings; change the run's, or harvest into another folder"
            )
    missing = [str(site) for site in config.sites if str(site) not in manifest["sites"]]
    if missing:
        raise ActivationError(
            f"cache {str(folder)!r} holds {', '.join(manifest['sites'])} but not {', '.join(missing)}; change "
            "model.sites, or harvest again"
        )
