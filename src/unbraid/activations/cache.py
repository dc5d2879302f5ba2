"""Activations on disk: harvested once, trained on many times, with the very batches live training would have seen.

A cache is a folder of safetensors shards and a `manifest.json` that says which model, text, sites and settings made
them, with a checksum for each shard. A shard holds whole chunks (see `rows.py`) of token ids and unfiltered
activations; a context's position in the text is its chunk's. The manifest is rewritten after every shard, so an
interrupted harvest goes on where it stood, and nothing that is not in the manifest is ever read.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from unbraid.activations.cache_manifest import FORMAT_VERSION, PARTS, check_recipe, read_manifest, recipe_of_activations
from unbraid.activations.live import LiveActivations
from unbraid.activations.rows import TABLES, Chunk, RefillInterrupted, RowFilter, StopSignal, interruptible, never
from unbraid.config import RunConfig
from unbraid.errors import ActivationError, TextError
from unbraid.files import checksum, free_bytes, held, holds_nothing, write_json, write_whole_tensors
from unbraid.owned_folders import mark, read_marker

KIND = "activation cache"
CHUNKS_PER_SHARD = 8


def harvest(
    config: RunConfig,
    folder: Path,
    device: torch.device,
    *,
    on_rows: Callable[[str, int, int], None] | None = None,
    should_stop: StopSignal = never,
) -> dict[str, Any]:
    """Write the activations a run of `config` needs into `folder`; goes on with an unfinished harvest.

    Args:
        config: the run to prepare; its token budget, text, model, sites and row filter count.
        folder: where shards go.
        device: where the model runs.
        on_rows: called with (part, usable rows so far, rows wanted).
        should_stop: asked between model passes.

    Returns:
        The manifest.

    Raises:
        ActivationError: the folder holds another harvest, is in use, cannot be written, or the disk is full.
        TextError: the text is too small for the run.
    """
    try:
        _open_manifest(config, folder)  # refuses before anything is written
        folder.mkdir(parents=True, exist_ok=True)
        with held(folder):
            manifest = _open_manifest(config, folder)
            return (
                manifest if manifest["complete"] else _harvest(config, folder, manifest, device, on_rows, should_stop)
            )
    except BlockingIOError:
        raise ActivationError(
            f"another process is harvesting into {str(folder)!r}; wait for it or choose another --cache"
        ) from None
    except (OSError, safetensors.SafetensorError) as error:
        raise ActivationError(
            f"cannot write the cache {str(folder)!r}: {error}; expected a writable folder with free space; free some "
            "space and run the same command to resume, or choose another --cache"
        ) from error


def _harvest(
    config: RunConfig,
    folder: Path,
    manifest: dict[str, Any],
    device: torch.device,
    on_rows: Callable[[str, int, int], None] | None,
    should_stop: StopSignal,
) -> dict[str, Any]:
    live = LiveActivations(config, device)
    identity = {"model": live.model.identity, "text": live.documents.identity}
    odd = [name for name in identity if any(manifest["parts"].values()) and manifest.get(name) != identity[name]]
    if odd:
        raise ActivationError(
            f"{str(folder)!r} was begun with another {' and '.join(odd)}: {manifest.get(odd[0])} then, "
            f"{identity[odd[0]]} now; expected the same; put it back, or harvest into another folder"
        )
    manifest |= {
        **identity,
        "widths": dict(zip(map(str, live.sites), live.widths, strict=True)),
        "special_ids": sorted(live.special_ids),
        "prepends_bos": live.prepends_bos,
    }
    write_json(folder / "manifest.json", manifest)
    mark(folder, KIND)
    limits: list[float] | None = None
    for part in PARTS:
        wanted = wanted_rows(config, part)
        shards: list[dict[str, Any]] = manifest["parts"][part]
        counter = RowFilter(config.buffer, config.sites, live.special_ids)
        counter.limits = limits
        if shards:
            try:
                counter.load_state(shards[-1]["filter"])
            except ValueError as error:
                raise ActivationError(
                    f"{str(folder / 'manifest.json')!r} is damaged: {error}; expected what an earlier part of the "
                    "harvest wrote; harvest into a new folder"
                ) from error
        chunks = live.chunks(shards[-1]["positions"][-1] if shards else None, held_out=part == "held_out")
        group: list[Chunk] = []
        while counter.kept < wanted:
            try:
                if should_stop():
                    raise RefillInterrupted
                with interruptible(should_stop):
                    chunk = next(chunks, None)
            except RefillInterrupted:
                raise ActivationError(
                    f"harvest stopped with {counter.kept:,} of {wanted:,} {part} rows; run the same command to go on"
                ) from None
            if chunk is None:
                break
            counter(chunk)
            group.append(chunk)
            if len(group) == CHUNKS_PER_SHARD or counter.kept >= wanted:
                shards.append(_write_shard(folder, f"{part}_{len(shards):05d}", config, group, counter.state()))
                group = []
                write_json(folder / "manifest.json", manifest)
            if on_rows is not None:
                on_rows(part, min(counter.kept, wanted), wanted)
        if group:
            shards.append(_write_shard(folder, f"{part}_{len(shards):05d}", config, group, counter.state()))
        if part == "training" and counter.kept < wanted:
            batch = config.training.batch_tokens
            most = counter.kept * config.training.epochs // batch * batch
            raise TextError(
                f"the text is used up: it gave {counter.kept:,} usable token rows and the run needs {wanted:,}; give "
                f"more text, raise training.epochs, or lower training.tokens to at most {most:,}"
            )
        limits = counter.limits
    manifest["complete"] = True
    write_json(folder / "manifest.json", manifest)
    return manifest


def wanted_rows(config: RunConfig, part: str) -> int:
    """Usable rows that a run takes from one part of the text; the training part may be read several times."""
    once = -(-config.steps * config.training.batch_tokens // config.training.epochs)
    return once if part == "training" else config.training.held_out_tokens


def _open_manifest(config: RunConfig, folder: Path) -> dict[str, Any]:
    path, recipe, marker = folder / "manifest.json", recipe_of_activations(config), read_marker(folder)
    if marker is not None and marker.get("kind") != KIND:
        raise ActivationError(
            f"{str(folder)!r} is a folder of another kind ({marker.get('kind')}); expected a new or empty folder, or a "
            "harvest; choose another --cache"
        )
    link = next((entry for entry in folder.iterdir() if entry.is_symlink()), None) if folder.is_dir() else None
    if link is not None:
        raise ActivationError(
            f"{str(link)!r} is a symbolic link; expected a harvest without any, because what is written through one "
            "lies elsewhere; choose another --cache"
        )
    if not path.exists():
        if not holds_nothing(folder):
            raise ActivationError(
                f"{str(folder)!r} is not empty and holds no harvest; expected a new or empty folder; choose another "
                "--cache"
            )
        return {
            "format_version": FORMAT_VERSION,
            "complete": False,
            "recipe": recipe,
            "sites": [str(site) for site in config.sites],
            "parts": {part: [] for part in PARTS},
        }
    manifest = read_manifest(folder)
    check_recipe(manifest, config, folder)
    return manifest


def _write_shard(
    folder: Path, name: str, config: RunConfig, group: list[Chunk], state: dict[str, Any]
) -> dict[str, Any]:
    dtype = getattr(torch, config.buffer.dtype)
    tensors = {"tokens": torch.cat([chunk.tokens_BT for chunk in group]).to(torch.int32)}
    tables = {table: stored for table, stored in TABLES.items() if getattr(group[0], table) is not None}
    tensors |= {stored: torch.cat([getattr(chunk, table) for chunk in group]) for table, stored in tables.items()}
    for i, site in enumerate(config.sites):
        tensors[str(site)] = torch.cat([chunk.activations[i].to("cpu", dtype) for chunk in group])
    needed, free = sum(tensor.nbytes for tensor in tensors.values()), free_bytes(folder)
    if free < needed + (64 << 20):
        raise ActivationError(
            f"shard {name} needs {needed / 2**20:,.0f} MiB but {str(folder)!r} has {free / 2**20:,.0f} MiB free; free "
            "some space and run the same command to resume"
        )
    path = folder / f"{name}.safetensors"
    write_whole_tensors(path, lambda partial: safetensors.torch.save_file(tensors, partial))
    return {
        "file": path.name,
        "checksum": checksum(path),
        "contexts": [len(chunk.tokens_BT) for chunk in group],
        "positions": [chunk.position for chunk in group],
        "filter": state,
        "square_norm": {str(site): float(tensors[str(site)].double().square().sum(-1).mean()) for site in config.sites},
    }


class CachedActivations:
    """A `ChunkSource` that reads a finished harvest; no language model is loaded.

    Args:
        config: the run; its text, model and stored precision must be those of the harvest.
        folder: the cache.

    Raises:
        ActivationError: the cache is unfinished, was made with other settings, is too small, or a shard is missing,
            truncated or altered: every shard's checksum is verified here, before any training.
    """

    def __init__(self, config: RunConfig, folder: Path):
        self.folder, self.manifest = folder, read_manifest(folder)
        check_recipe(self.manifest, config, folder)
        if not self.manifest["complete"]:
            raise ActivationError(
                f"cache {str(folder)!r} is unfinished; run the same `unbraid harvest` command to go on"
            )
        self.sites, self.model_name = config.sites, config.model.name
        widths, d_model = self.manifest.get("widths", {}), self.manifest.get("d_model")  # 0.1 kept one width for all
        self.widths: list[int] = [widths.get(str(site), d_model) for site in self.sites]
        self.context_length = config.text.context_length
        self.batch_contexts = config.model.batch_contexts
        self.special_ids = frozenset(self.manifest["special_ids"])
        checksums = {part: [shard["checksum"] for shard in self.manifest["parts"][part]] for part in PARTS}
        self.identity: dict[str, Any] = {"model": self.manifest["model"], "text": self.manifest["text"]} | checksums
        self.prepends_bos: bool = self.manifest["prepends_bos"]
        for part in PARTS:
            for shard in self.manifest["parts"][part]:
                self._verify(shard)

    def _verify(self, shard: dict[str, Any]) -> None:
        path = self.folder / shard["file"]
        try:
            found = checksum(path)
        except OSError as error:
            raise ActivationError(
                f"shard {str(path)!r} cannot be read ({error.strerror}); harvest again into a new folder"
            ) from None
        if found != shard["checksum"]:
            raise ActivationError(
                f"shard {str(path)!r} is truncated, altered or foreign: its checksum is {found}, the manifest says "
                f"{shard['checksum']}; harvest again into a new folder"
            )

    def chunks(self, position: dict[str, Any] | None, held_out: bool = False) -> Iterator[Chunk]:
        """Chunks from `position` to the end of what was harvested."""
        waiting = position is not None
        for shard in self.manifest["parts"]["held_out" if held_out else "training"]:
            if waiting and position not in shard["positions"]:
                continue
            tensors = self._read(shard)
            first = 0
            for contexts, after in zip(shard["contexts"], shard["positions"], strict=True):
                here = slice(first, first + contexts)
                first += contexts
                if not waiting:
                    activations = [tensors[str(site)][here] for site in self.sites]
                    tables = {name: tensors[at][here] for name, at in TABLES.items() if at in tensors}
                    yield Chunk(tensors["tokens"][here].long(), activations, after, **tables)
                elif after == position:
                    waiting = False

    def _read(self, shard: dict[str, Any]) -> dict[str, torch.Tensor]:
        path = self.folder / shard["file"]
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                tables = sorted({*file.keys()} & {*TABLES.values()})
                tensors = {name: file.get_tensor(name) for name in ("tokens", *tables, *map(str, self.sites))}
        except (OSError, safetensors.SafetensorError) as error:
            raise ActivationError(
                f"shard {str(path)!r} cannot be read ({error}); harvest again into a new folder"
            ) from error
        contexts = (sum(shard["contexts"]), self.context_length)
        shapes = {str(site): (*contexts, width) for site, width in zip(self.sites, self.widths, strict=True)}
        for name, tensor in tensors.items():
            expected = shapes.get(name, contexts)
            if tuple(tensor.shape) != expected:
                raise ActivationError(
                    f"shard {str(path)!r} holds {name} of shape {tuple(tensor.shape)}; the manifest says {expected}; "
                    "harvest again into a new folder"
                )
        return tensors

    @property
    def description(self) -> str:
        """The cache and what is read of it."""
        return f"the cache {str(self.folder)!r} of {self.model_name}, {', '.join(map(str, self.sites))}"

    def count_rows(self, limit: int) -> int:
        """Training rows in the cache that passed its harvest's filter."""
        shards = self.manifest["parts"]["training"]
        return int(shards[-1]["filter"]["kept"]) if shards else 0

    def has_held_out_rows(self) -> bool:
        """Whether the harvest kept some."""
        return bool(self.manifest["parts"]["held_out"])
