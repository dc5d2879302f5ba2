"""Published dictionaries by name, from the registry that SAELens ships: 170 releases, thousands of dictionaries.

The registry is a file that `UNBRAID_REGISTRY` names, or that of an installed sae-lens, read without importing that
package; without either it is downloaded once from SAELens' repository into the cache. unbraid has none of its own.
Dictionaries are downloaded file by file into the cache of the Hugging Face hub.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import importlib.util
import os
import re
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from unbraid.bundled import BUNDLED
from unbraid.errors import FormatError
from unbraid.files import write_json, write_whole
from unbraid.formats.folder import SAEFolder
from unbraid.formats.published import Known
from unbraid.json_files import is_number, read_json_object
from unbraid.text.cache_folder import cache_root

REGISTRY_FILE, REGISTRY_VARIABLE = "pretrained_saes.yaml", "UNBRAID_REGISTRY"
REGISTRY_ADDRESS = f"https://raw.githubusercontent.com/decoderesearch/SAELens/main/sae_lens/{REGISTRY_FILE}"
LARGEST_REGISTRY = 64 << 20
"""Bytes; it has 1.5 million."""
TIMEOUT = 10.0
"""Seconds in which the download must go on."""
READERS = {
    "gemma_3": "gemma_scope_2",
    "gemma_2": "gemma_scope",
    "gemma_2_transcoder": "gemma_scope",
    "dictionary_learning_1": "dictionary_learning",
    "qwen_scope": "qwen_scope",
    "sae_lens": "sae_lens",
    "mwhanna_transcoder": "transcoder_set",
    "llama_scope": "llama_scope",
    "llama_scope_r1_distill": "llama_scope_r1",
    "connor_rob_hook_z": "connor_rob",
    "goodfire": "linear_layers",
    "deepseek_r1": "linear_layers",
}
"""The registry's name of a layout -> unbraid's; those not listed are not read."""
REFUSED = {
    "mntss_clt_layer_transcoder": "a layer of a cross-layer transcoder, whose features write to every later layer, so "
    "that it predicts no site alone",
    "temporal": "a temporal SAE, whose codes depend on the whole sequence",
}
"""What the registry's other layouts are."""
IN_A_FOLDER = (
    *("cfg.json", "config.json", "hyperparams.json", "sae_weights.safetensors", "sparsity.safetensors"),
    *("sae.safetensors", "ae.pt", "params.npz", "params.safetensors", "checkpoints/final.safetensors", "config.yaml"),
)
ONE_PER_LAYER = tuple(
    f"{name}_{digits}.safetensors" for name in ("params_layer", "W_enc", "W_dec") for digits in ("[0-9]", "[0-9][0-9]")
)
"""Patterns of further such files."""
BESIDE_A_FILE = ("config.json", "config.yaml")
HUB_PATH = re.compile(r"(?:hf://)?([\w.-]+/[\w.-]+)(?:@([\w.-]+))?((?:/[^/\0]+)*)/?")
"""OWNER/NAME[@REVISION][/FOLDER]"""


@dataclass(frozen=True)
class Entry:
    """One dictionary of the registry.

    Attributes:
        name: what `unbraid.load` takes, `release/id`.
        repository: on the hub.
        path: folder or file in it.
        layout: unbraid's name of the layout; None where it cannot be read.
        loader: the registry's name of the layout.
        model: the language model, as TransformerLens names it.
        l0: active features per token, as published.
        neuronpedia: its id there, MODEL/LAYER-SET.
        norm_scaling_factor: what activations were multiplied with.
        settings: entries of cfg.json that go before the file's own.
    """

    name: str
    repository: str
    path: str
    layout: str | None
    loader: str
    model: str
    l0: float | None = None
    neuronpedia: str | None = None
    norm_scaling_factor: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def registry_path() -> Path | None:
    """Where the registry is; None where there is none yet."""
    named = os.environ.get(REGISTRY_VARIABLE)
    if named:
        return Path(named).expanduser()
    found = importlib.util.find_spec("sae_lens")
    places = found.submodule_search_locations if found is not None else None
    paths = [Path(place) / REGISTRY_FILE for place in places or []]
    paths.append(_downloaded())
    return next((path for path in paths if path.is_file()), None)


def _downloaded() -> Path:
    return cache_root() / "registry" / REGISTRY_FILE


def download() -> Path:
    """Fetch the registry into the cache, in the place of an earlier one; returns where it is.

    Raises:
        FormatError: it cannot be had, or what came is no registry, and an earlier one is kept; or another one is read.
    """
    from huggingface_hub import constants

    path, read = _downloaded(), registry_path()
    if read not in (None, path):
        raise FormatError(
            f"the list of published dictionaries is {str(read)!r}, so a downloaded one would not be read; expected "
            f"neither {REGISTRY_VARIABLE} nor an installed sae-lens; upgrade sae-lens for a newer list"
        )
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("offline mode is on; unset HF_HUB_OFFLINE")
        with urllib.request.urlopen(REGISTRY_ADDRESS, timeout=TIMEOUT) as answer:
            content = answer.read(LARGEST_REGISTRY)
        path.parent.mkdir(parents=True, exist_ok=True)

        def write(partial: Path) -> None:
            partial.write_bytes(content)
            if not _parse(partial):
                raise OSError("what came lists no dictionary")

        write_whole(path, write)
    except (OSError, HTTPException, FormatError) as problem:
        raise FormatError(
            f"the registry of published dictionaries cannot be downloaded ({_first_line(problem)}); expected a "
            f"connection to {REGISTRY_ADDRESS}, an installed sae-lens (`pip install --no-deps sae-lens`, of which only "
            f"that list is read), or {REGISTRY_VARIABLE} naming a copy of its {REGISTRY_FILE}; a path on the hub, such "
            "as unbraid.load('hf://OWNER/NAME/FOLDER'), needs none"
        ) from None
    return path


def _first_line(problem: Exception) -> str:
    text = str(problem).strip()
    return text.splitlines()[0] if text else type(problem).__name__


def registry() -> dict[str, Entry]:
    """Every dictionary by its name; the registry is downloaded where there is none.

    Raises:
        FormatError: it cannot be had, or not be read.
    """
    path = registry_path() or download()
    try:
        return _read(path, path.stat().st_mtime_ns)
    except OSError as problem:
        raise FormatError(
            f"cannot read the registry {str(path)!r}: {problem}; expected a copy of {REGISTRY_FILE}"
        ) from None


@cache
def _read(path: Path, changed: int) -> dict[str, Entry]:
    """The registry, from a copy in JSON where one was kept: YAML of this size takes seconds."""
    name = hashlib.blake2b(f"{path.absolute()} {changed}".encode(), digest_size=8).hexdigest()
    kept = cache_root() / "registry" / f"{name}.json"
    try:
        listed = read_json_object(kept, FormatError)["entries"]
        entries = [Entry(**fields) for fields in listed]
    except (FormatError, KeyError, TypeError):
        entries = list(_parse(path).values())
        with contextlib.suppress(OSError):  # without a cache it only takes longer
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_json(kept, {"entries": [dataclasses.asdict(entry) for entry in entries]})
    return {entry.name: entry for entry in entries}


def _parse(path: Path) -> dict[str, Entry]:
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, RecursionError, ValueError) as problem:
        reason = str(problem).splitlines()[0]
        raise FormatError(f"the registry {str(path)!r} is not YAML ({reason}); expected {REGISTRY_FILE}") from None
    if not isinstance(data, dict):
        raise FormatError(f"the registry {str(path)!r} holds {type(data).__name__}; expected releases by name")
    return {entry.name: entry for release, body in data.items() for entry in _entries(str(release), body)}


def _entries(release: str, body: Any) -> Iterator[Entry]:
    """What a release lists; anything that is not as expected is passed over."""
    if not isinstance(body, dict) or not isinstance(body.get("saes"), list) or "repo_id" not in body:
        return
    loader = str(body.get("conversion_func") or "sae_lens")
    settings = body.get("config_overrides")
    for item in body["saes"]:
        if isinstance(item, dict) and "id" in item and "path" in item:
            yield Entry(
                name=f"{release}/{item['id']}",
                repository=str(body["repo_id"]),
                path=str(item["path"]),
                layout=READERS.get(loader),
                loader=loader,
                model=str(body.get("model", "")),
                l0=_number(item.get("l0")),
                neuronpedia=str(item["neuronpedia"]) if item.get("neuronpedia") else None,
                norm_scaling_factor=_number(item.get("norm_scaling_factor")),
                settings=dict(settings) if isinstance(settings, dict) else {},
            )


def _number(value: Any) -> float | None:
    return float(value) if is_number(value) else None


def search(query: str) -> list[Entry]:
    """Dictionaries whose release, id, model or Neuronpedia id have every word of `query`.

    A number must stand alone, and one after "layer" be the layer's: "gemma 2b layer 12" finds no 12b, no layer 112.

    What comes with unbraid stands first, and is found without a registry too.

    Raises:
        FormatError: there is no registry, and nothing that comes with unbraid is meant.
    """
    words = re.sub(r"\b(layers?|blocks?)[\s_.-]*(\d+)\b", r"layer:\2", query.lower()).split()
    patterns = [_pattern(word) for word in words]
    own = [Entry(name, "", words, "sae_lens", "sae_lens", words) for name, words in BUNDLED.items()]
    found = [entry for entry in own if _has_all(entry, patterns)]
    try:
        listed = registry()
    except FormatError:
        if not found:
            raise
        return found
    return found + [entry for entry in listed.values() if _has_all(entry, patterns)]


def _has_all(entry: Entry, patterns: Sequence[re.Pattern[str]]) -> bool:
    return all(pattern.search(_text(entry)) for pattern in patterns)


def _pattern(word: str) -> re.Pattern[str]:
    if word.startswith("layer:"):
        layer = int(word.removeprefix("layer:"))
        return re.compile(rf"(layers?|blocks?|\bl)[_.-]?0*{layer}(?!\d)|/{layer}-")
    before, after = r"(?<!\d)" if word[0].isdigit() else "", r"(?!\d)" if word[-1].isdigit() else ""
    return re.compile(f"{before}{re.escape(word)}{after}")


def _text(entry: Entry) -> str:
    return f"{entry.name} {entry.model} {entry.neuronpedia or ''} {entry.path}".lower()


def open_named(name: str, known: Known) -> SAEFolder:
    """The dictionary of a name of the registry, or of a path on the hub: `hf://OWNER/NAME[@REVISION]/FOLDER-OR-FILE`.

    Args:
        name: `release/id`, or a path on the hub.
        known: what is said by hand, which goes before the registry.

    Raises:
        FormatError: there is no such name, its layout is not read, or the hub refused.
    """
    if name.startswith("hf://"):
        return _open_on_hub(name, known)
    try:
        entry = _found(name)
    except FormatError as unlisted:
        if registry_path() is not None or HUB_PATH.fullmatch(name) is None:
            raise
        try:  # no registry: it may be a path on the hub
            return _open_on_hub(name, known)
        except FormatError as problem:
            raise FormatError(
                f"there is no folder {name!r}; as a path on the hub: {problem}; as a name: {unlisted}"
            ) from None
    if entry is None:
        return _open_on_hub(name, known)
    if entry.layout is None:
        raise FormatError(
            f"{name!r} is in the layout {entry.loader!r}, which unbraid does not read: "
            f"{REFUSED.get(entry.loader, 'it is newer than this version')}; expected one of "
            f"{', '.join(sorted(READERS))}; choose another dictionary"
        )
    factor = known.norm_scaling_factor
    if factor is None and entry.loader != "llama_scope":  # whose own files say it
        factor = entry.norm_scaling_factor
    metadata = {"registry_name": name, "neuronpedia_id": entry.neuronpedia} | known.metadata
    metadata = {key: value for key, value in metadata.items() if value is not None}
    known = replace(known, norm_scaling_factor=factor, settings=entry.settings, metadata=metadata)
    found = _open(entry.repository, entry.path, known)
    found.metadata.setdefault("model_name", entry.model)
    found.sae.metadata.setdefault("model_name", entry.model)
    return found


def _open_on_hub(path: str, known: Known) -> SAEFolder:
    match = HUB_PATH.fullmatch(path)
    if match is None:
        raise FormatError(
            f"{path!r} is no path on the hub; expected hf://OWNER/NAME/FOLDER, or hf://OWNER/NAME@REVISION/FOLDER"
        )
    return _open(match[1], match[3].strip("/"), known, match[2])


def _found(name: str) -> Entry | None:
    """The registry's entry; None where the name can only be a path on the hub."""
    is_path = HUB_PATH.fullmatch(name) is not None
    known = registry()
    if name in known:
        return known[name]
    release = name.partition("/")[0]
    of_release = [other for other in known if other.startswith(f"{release}/")]
    if not of_release and is_path:
        return None
    close = difflib.get_close_matches(name, of_release or known, n=3, cutoff=0.3)
    raise FormatError(
        f"the registry has no dictionary {name!r}; expected release/id"
        + (f", such as {', '.join(close)}" if close else "")
        + "; look it up with `unbraid search`"
    )


def _open(repository: str, path: str, known: Known, revision: str | None = None) -> SAEFolder:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    from unbraid.formats import open_folder

    place = PurePosixPath(path)
    if ".." in place.parts or place.is_absolute():
        raise FormatError(f"the path {path!r} leads out of the repository {repository!r}; expected one inside it")
    try:
        local = Path(snapshot_download(repository, revision=revision, allow_patterns=files_of(path)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as problem:
        raise FormatError(
            f"cannot download {path or 'anything'!r} of the repository {repository!r}: {_first_line(problem)}; "
            "expected a repository you may read and a connection; check the name with `unbraid search`, or log in "
            "(`hf auth login`)"
        ) from problem
    return open_folder(local / path, known=known)


def files_of(path: str) -> list[str]:
    """Patterns, for `snapshot_download`, of the files that a dictionary at `path` in a repository may consist of."""
    place, prefix = PurePosixPath(path), f"{path}/" if path else ""
    beside = [str(place.parent / name) for name in (*BESIDE_A_FILE, f"{place.stem}_cfg.json")] if path else []
    wanted = [*([path] if path else []), *(f"{prefix}{name}" for name in IN_A_FOLDER), *beside]
    return [*(_literal(pattern) for pattern in wanted), *(f"{_literal(prefix)}{name}" for name in ONE_PER_LAYER)]


def _literal(path: str) -> str:
    """A pattern that matches this path only."""
    return re.sub(r"([*?\[])", r"[\1]", path)
