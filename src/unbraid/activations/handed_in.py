"""Activations of one's own, from any field: they take the place of a run's model, text and sites.

A tensor, a NumPy array or memmap, a folder of .npy or safetensors files and a column of a `datasets` table can be read
at any row: their rows come in blocks in a seeded order, which the buffer mixes further. An iterable of batches comes in
its own order. A seeded share of the rows (`text.held_out_fraction`) is held out, whatever they come from. A pair, as in
`{"x -> y": (x, y)}`, is for a transcoder, which reads x and predicts y; `{"a + b": (a, b)}` is for a crosscoder.
"""

import bisect
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from unbraid.activations.rows import Chunk
from unbraid.config import RunConfig, overridden
from unbraid.errors import ActivationError
from unbraid.randomness import generator
from unbraid.replay import Replay
from unbraid.sites import AND, ARROW, HANDED_IN, Route, Site
from unbraid.text.documents import shuffled

BLOCK_ROWS = 256
"""Rows that lie side by side and stay together when the order is drawn."""
DEFAULT_NAME = "activations"


def named(activations: Any) -> dict[str, Any]:
    """`{name: data}`, every name of a key by itself; a single one is named `activations`.

    Raises:
        ActivationError: there is none, a name cannot be part of a folder's name, or one name stands for two things.
    """
    if not isinstance(activations, Mapping):
        return {DEFAULT_NAME: activations}
    if not activations:
        raise ActivationError('activations is empty; expected at least one, such as {"patches": tensor}')
    found: dict[str, Any] = {}
    for key, data in activations.items():
        names = [name for end in _ends(key) for name in end]
        for name in names:
            if not Site.is_handed_in_name(name):
                raise ActivationError(
                    f"activations are named {name!r}; expected letters, digits, '_', '-' and '.', because folders are "
                    "called after them"
                )
        if len(names) > 1 and not (isinstance(data, tuple | list) and len(data) == len(names)):
            raise ActivationError(
                f"activations {key!r} are a {type(data).__name__}; expected something for each of the {len(names)} "
                'names, in this order, as in {"x -> y": (x, y)}'
            )
        for name, one in zip(names, data if len(names) > 1 else [data], strict=True):
            if found.setdefault(name, one) is not one:
                raise ActivationError(
                    f"activations name {name!r} twice, for different data; expected one name for each; rename one"
                )
    return found


def _ends(key: Any) -> list[list[str]]:
    """The names at each end of a key."""
    if not isinstance(key, str):
        return [[str(key)]]
    return [[name.strip() for name in end.split(AND.strip())] for end in key.split(ARROW.strip())]


def routes(activations: Any) -> list[Route]:
    """What dictionaries read and predict: each name by itself, `x -> y` for a transcoder, `a + b` for a crosscoder.

    Raises:
        ActivationError: see `named`.
        ConfigError: both ends of a pair have the same names.
    """
    named(activations)
    keys = activations if isinstance(activations, Mapping) else [DEFAULT_NAME]
    return [
        Route.parse(ARROW.join(AND.join(str(Site.handed_in(name)) for name in end) for end in _ends(key)))
        for key in keys
    ]


def settings_for(config: RunConfig, activations: Any) -> RunConfig:
    """`config` with the names of `activations` as its sites, and no position to drop."""
    sites = [str(route) for route in routes(activations)]
    given = {"model.name": HANDED_IN, "model.sites": sites, "buffer.drop_first_position": False}
    return overridden(config, given, "train")[0]


class HandedInActivations:
    """A source of rows that the caller gave.

    Args:
        activations: a tensor, array, folder, column or iterable of batches, or several by name, row by row alike.
        config: the run; its seed decides order and split, its batch sizes how much is read at a time.
        held_out: whether a share of the rows is held out.

    Raises:
        ActivationError: shapes disagree, or something cannot be read.
    """

    def __init__(self, activations: Any, config: RunConfig, *, held_out: bool = True):
        data = named(activations)
        self.sites = [Site.handed_in(name) for name in data]
        self.context_length, self.batch_contexts = config.text.context_length, config.model.batch_contexts
        self.special_ids: frozenset[int] = frozenset()
        self.prepends_bos, self.model_name = False, "activations handed in"
        self._seed, self._fraction = config.seed, config.text.held_out_fraction if held_out else 0.0
        rows = self.context_length * self.batch_contexts
        columns = {name: _random_access(value, name) for name, value in data.items()}
        if all(column is not None for column in columns.values()):
            self._reader: _Blocks | _Batches = _Blocks(
                {name: column for name, column in columns.items() if column is not None}, rows, config.seed
            )
        else:
            self._reader = _Batches(data, rows)
        self.widths = self._reader.widths

    @property
    def identity(self) -> dict[str, Any]:
        """Names, shapes and a checksum over samples of what can be read at any row."""
        return {"activations": self._reader.identity, "held_out_fraction": self._fraction}

    @property
    def description(self) -> str:
        """What there is of each name."""
        return self._reader.description

    def chunks(self, position: dict[str, Any] | None, held_out: bool = False) -> Iterator[Chunk]:
        """Chunks of training (or held-out) rows from `position` on."""
        for block, arrays, after in self._reader.read(position):
            kept = self._held_out(block, len(arrays[0])) == held_out
            rows = [array[kept] for array in arrays]
            if len(rows[0]):
                yield Chunk(torch.ones(1, len(rows[0]), dtype=torch.long), [x_RD[None] for x_RD in rows], after)

    def _held_out(self, block: int, rows: int) -> Tensor:
        return torch.rand(rows, generator=generator(self._seed, "held-out rows", block)) < self._fraction

    def count_rows(self, limit: int) -> int | None:
        """Training rows, counted no further than `limit`; none for an iterable of batches."""
        found = 0
        for block, rows in self._reader.sizes() or ():
            found += int((~self._held_out(block, rows)).sum())
            if found >= limit:
                return found
        return found if self._reader.sizes() is not None else None

    def has_held_out_rows(self) -> bool:
        """Whether the share held out is any row at all."""
        sizes = self._reader.sizes()
        return sizes is None or any(bool(self._held_out(block, rows).any()) for block, rows in sizes)


class _Blocks:
    """Rows that can be read anywhere, in blocks whose order the seed decides."""

    def __init__(self, columns: "dict[str, _Column]", rows: int, seed: int):
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ActivationError(f"activations have {lengths} rows; expected as many of each, row by row alike")
        self.columns, self.count = columns, next(iter(lengths.values()))
        self.widths = [column.width for column in columns.values()]
        self.block_rows = min(BLOCK_ROWS, rows)
        self.blocks_at_once = max(1, rows // self.block_rows)
        self.order = shuffled(-(-self.count // self.block_rows), seed, "activation blocks")

    @property
    def identity(self) -> dict[str, Any]:
        digest = hashlib.blake2b(digest_size=8)
        for column in self.columns.values():
            for place in range(0, self.count, max(1, self.count // 64)):
                digest.update(column.rows(place, place + 1).numpy().tobytes())
        return {"names": list(self.columns), "rows": self.count, "widths": self.widths, "sample": digest.hexdigest()}

    @property
    def description(self) -> str:
        named = ", ".join(f"{name} ({column.width} wide)" for name, column in self.columns.items())
        return f"{self.count:,} rows of {named}"

    def sizes(self) -> Iterator[tuple[int, int]]:
        last = self.count // self.block_rows
        return ((block, self.block_rows if block < last else self.count % self.block_rows) for block in self.order)

    def read(self, position: dict[str, Any] | None) -> Iterator[tuple[int, list[Tensor], dict[str, Any]]]:
        """One block after the other; (its number, rows of every name, position after it)."""
        start = position["block"] if position else 0
        for place, block in enumerate(self.order[start:], start + 1):
            span = block * self.block_rows, min(self.count, (block + 1) * self.block_rows)
            yield block, [column.rows(*span) for column in self.columns.values()], {"block": place}


class _Batches:
    """Batches in the order in which they come."""

    def __init__(self, data: dict[str, Any], rows: int):
        self.rows, self.names = rows, list(data)
        self.replays = [Replay(value, f"activations[{name!r}]", ActivationError) for name, value in data.items()]
        _, arrays, _ = next(self.read(None), (0, [], {}))
        if not arrays:
            raise ActivationError("activations hold no batch; expected at least one [rows, D] tensor")
        self.widths = [array.shape[1] for array in arrays]
        digest = hashlib.blake2b(digest_size=8)
        for array in arrays:
            digest.update(array.numpy().tobytes())
        self._sample = digest.hexdigest()

    @property
    def identity(self) -> dict[str, Any]:
        return {"names": self.names, "widths": self.widths, "sample": self._sample}

    @property
    def description(self) -> str:
        named = ", ".join(f"{name} ({width} wide)" for name, width in zip(self.names, self.widths, strict=True))
        return f"batches of {named}; {self.replays[0].resumes}"

    def sizes(self) -> None:
        """Nobody knows before all are read."""
        return None

    def read(self, position: dict[str, Any] | None) -> Iterator[tuple[int, list[Tensor], dict[str, Any]]]:
        """Pieces of batches, none longer than a chunk may be."""
        start, pieces = (position["batch"], position["piece"]) if position else (0, 0)
        states = position["states"] if position else [None] * len(self.replays)
        streams = [replay.items(start, state) for replay, state in zip(self.replays, states, strict=True)]
        for batches in zip(*streams, strict=False):
            number, now = batches[0][0], [state for _, _, state in batches]
            here = zip(self.names, batches, strict=True)
            arrays = [_as_rows(item, f"batch {number} of {name}") for name, (_, item, _) in here]
            if len({len(array) for array in arrays}) > 1:
                raise ActivationError(
                    f"batch {number} has {[len(array) for array in arrays]} rows of {self.names}; expected as many of "
                    "each, row by row alike"
                )
            split = list(zip(*(array.split(self.rows) for array in arrays), strict=True))
            for piece, rows in enumerate(
                split[pieces:] if number == start else split, pieces if number == start else 0
            ):
                after = {"batch": number, "piece": piece + 1, "states": now}
                yield number * 1_000_003 + piece, list(rows), after


class _Column:
    """[rows, D] data that is read a few rows at a time.

    Args:
        parts: arrays, or functions of (first row, end) that read rows.
        lengths: rows of each.
        width: D.
    """

    def __init__(self, parts: Sequence[Callable[[int, int], Any]], lengths: Sequence[int], width: int, name: str):
        self.parts, self.width, self.name = parts, width, name
        self.ends = list(itertools.accumulate(lengths))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def rows(self, first: int, end: int) -> Tensor:
        """Rows `first` to `end`, as float32."""
        found, part = [], bisect.bisect_right(self.ends, first)
        while first < end:
            begins = self.ends[part - 1] if part else 0
            until = min(end, self.ends[part])
            found.append(_as_rows(self.parts[part](first - begins, until - begins), self.name))
            first, part = until, part + 1
        x_RD = torch.cat(found)
        if x_RD.shape[1] != self.width:
            raise ActivationError(f"{self.name} has rows of width {x_RD.shape[1]} and {self.width}; expected one width")
        return x_RD


def _random_access(data: Any, name: str) -> _Column | None:
    """Data that can be read at any row; None for an iterable of batches."""
    if isinstance(data, str | Path):
        return _folder(Path(data), name)
    if isinstance(data, Tensor | np.ndarray):
        if data.ndim < 2 or 0 in data.shape:
            raise ActivationError(f"{name} has shape {tuple(data.shape)}; expected [rows, D] with rows and D >= 1")
        array = data.reshape(-1, data.shape[-1])
        return _Column([lambda first, end: array[first:end]], [array.shape[0]], array.shape[1], name)
    if isinstance(data, Sequence) and len(data) and _is_row(data[0]):  # a column of a `datasets` table, or a list
        width = len(np.asarray(data[0]))
        return _Column([lambda first, end: data[first:end]], [len(data)], width, name)
    return None


def _is_row(item: Any) -> bool:
    return np.ndim(item) == 1 if not isinstance(item, Tensor) else item.ndim == 1


def _folder(path: Path, name: str) -> _Column:
    files = sorted(file for file in path.glob("*") if file.suffix in (".npy", ".safetensors")) if path.is_dir() else []
    if not files:
        raise ActivationError(f"{name}: {str(path)!r} is no folder of .npy or .safetensors files; expected one")
    parts, lengths, widths = [], [], set()
    for file in files:
        try:
            read, shape = _npy(file) if file.suffix == ".npy" else _safetensors(file, name)
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise ActivationError(f"{name}: cannot read {str(file)!r} ({error}); expected [rows, D] numbers") from error
        if len(shape) != 2:
            raise ActivationError(f"{name}: {str(file)!r} holds shape {tuple(shape)}; expected [rows, D]")
        parts.append(read)
        lengths.append(shape[0])
        widths.add(shape[1])
    if len(widths) > 1:
        raise ActivationError(f"{name}: the files in {str(path)!r} have widths {sorted(widths)}; expected one width")
    return _Column(parts, lengths, widths.pop(), name)


def _npy(file: Path) -> tuple[Callable[[int, int], Any], tuple[int, ...]]:
    array = np.load(file, mmap_mode="r", allow_pickle=False)
    return (lambda first, end: array[first:end]), array.shape


def _safetensors(file: Path, name: str) -> tuple[Callable[[int, int], Any], tuple[int, ...]]:
    with safetensors.safe_open(file, framework="pt") as opened:
        keys = list(opened.keys())
        key = name if name in keys else keys[0] if len(keys) == 1 else None
        if key is None:
            raise ActivationError(f"{name}: {str(file)!r} holds {keys}; expected one tensor, or one named {name!r}")
        shape = tuple(opened.get_slice(key).get_shape())

    def read(first: int, end: int) -> Tensor:
        with safetensors.safe_open(file, framework="pt") as opened:
            return opened.get_slice(key)[first:end]

    return read, shape


def _as_rows(item: Any, where: str) -> Tensor:
    """[*, D] numbers as [rows, D] float32."""
    try:
        x = item if isinstance(item, Tensor) else torch.from_numpy(np.array(item))
    except (TypeError, ValueError) as error:
        raise ActivationError(f"{where} is a {type(item).__name__} ({error}); expected numbers, [rows, D]") from None
    if x.ndim < 1 or x.is_complex() or x.numel() == 0:
        raise ActivationError(f"{where} has shape {tuple(x.shape)}, {x.dtype}; expected [rows, D] numbers")
    return x.detach().reshape(-1, x.shape[-1]).float()
