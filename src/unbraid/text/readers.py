"""How each kind of text file is cut into blocks that can be read on their own.

A block is a parquet row group, 1024 lines of jsonl or rows of csv, a batch of a data set that `datasets` saved, or a
whole txt file (its megabytes, cut at line ends, when it is larger). `READERS` is the list of kinds: another kind of
file is another class and a line there.
"""

import csv
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from unbraid.errors import TextError
from unbraid.text.documents import BLOCK

PIECE_BYTES = 1 << 20
"""A txt file longer than this becomes several documents, cut at line ends."""
LONGEST_FIELD = 2**31 - 1
LOOKED_AT = 100
"""Records whose keys are looked at for the column."""


class Block(NamedTuple):
    """`count` documents of one file; `place` says where they begin, in the reader's own terms."""

    path: Path
    place: int
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]


class Reader(ABC):
    """One kind of file; `path` holds its content uncompressed, `name` is what the user called it."""

    @staticmethod
    @abstractmethod
    def blocks(path: Path, column: str, name: str) -> list[Block]:
        """The blocks of a file, in order.

        Raises:
            TextError: it has no such column.
            OSError, ValueError: it cannot be read.
        """

    @staticmethod
    @abstractmethod
    def read(block: Block, column: str) -> list[Any]:
        """The documents of a block; what is not there or cannot be decoded is None or bytes."""


class Txt(Reader):
    """One document per file, or one per megabyte of a large file."""

    @staticmethod
    def blocks(path: Path, column: str, name: str) -> list[Block]:
        """Up to 1024 pieces each."""
        pieces = max(1, -(-path.stat().st_size // PIECE_BYTES))
        return [Block(path, first, min(BLOCK, pieces - first)) for first in range(0, pieces, BLOCK)]

    @staticmethod
    def read(block: Block, column: str) -> list[Any]:
        """Pieces as bytes."""
        with block.path.open("rb") as file:
            return [_piece(file, piece) for piece in range(block.place, block.place + block.count)]


class JsonLines(Reader):
    """One document a line; blank lines are none."""

    @staticmethod
    def blocks(path: Path, column: str, name: str) -> list[Block]:
        """Up to 1024 lines each; `place` is the byte at which the first begins."""
        blocks: list[Block] = []
        seen: list[Any] = []
        with path.open("rb") as file:
            while True:
                place = file.tell()
                lines = list(itertools.islice(_filled_lines(file), BLOCK))
                if not lines:
                    break
                if len(seen) < LOOKED_AT:
                    seen += map(_json, lines[:LOOKED_AT])
                blocks.append(Block(path, place, len(lines)))
        _check_column([record for record in seen if isinstance(record, dict)], column, name)
        return blocks

    @staticmethod
    def read(block: Block, column: str) -> list[Any]:
        """The column of every line."""
        with block.path.open("rb") as file:
            file.seek(block.place)
            lines = itertools.islice(_filled_lines(file), block.count)
            return [_field(line, column) for line in lines]


class Csv(Reader):
    """One document a row, under a header; quoted fields may hold line ends."""

    @staticmethod
    def blocks(path: Path, column: str, name: str) -> list[Block]:
        """Up to 1024 rows each; `place` is the byte at which the first begins."""
        blocks: list[Block] = []
        with path.open("rb") as file:
            header = next(_csv_rows(file), None)
            if header is None:
                return []
            _check_column([dict.fromkeys(header)], column, name)
            rows = _csv_rows(file)
            while True:
                place = file.tell()
                count = sum(1 for _ in itertools.islice(rows, BLOCK))
                if count == 0:
                    return blocks
                blocks.append(Block(path, place, count))

    @staticmethod
    def read(block: Block, column: str) -> list[Any]:
        """The column of every row; None in a row that is too short."""
        with block.path.open("rb") as file:
            index = next(_csv_rows(file)).index(column)
            file.seek(block.place)
            rows = itertools.islice(_csv_rows(file), block.count)
            return [row[index] if index < len(row) else None for row in rows]


class Parquet(Reader):
    """One document a row."""

    @staticmethod
    def blocks(path: Path, column: str, name: str) -> list[Block]:
        """Row groups."""
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as file:
            _check_column([dict.fromkeys(file.schema_arrow.names)], column, name)
            groups = range(file.num_row_groups)
            return [Block(path, group, file.metadata.row_group(group).num_rows) for group in groups]

    @staticmethod
    def read(block: Block, column: str) -> list[Any]:
        """The column of a row group."""
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(block.path) as file:
            return file.read_row_group(block.place, columns=[column]).column(0).to_pylist()


class SavedDataset(Reader):
    """A folder written by `datasets.Dataset.save_to_disk`."""

    @staticmethod
    def blocks(path: Path, column: str, name: str) -> list[Block]:
        """Up to 1024 rows each."""
        rows = _saved(path)
        _check_column([dict.fromkeys(rows.column_names)], column, name)
        return [Block(path, first, min(BLOCK, len(rows) - first)) for first in range(0, len(rows), BLOCK)]

    @staticmethod
    def read(block: Block, column: str) -> list[Any]:
        """The column of these rows."""
        rows = _saved(block.path).select_columns([column])
        return rows[block.place : block.place + block.count][column]


READERS: dict[str, type[Reader]] = {".txt": Txt, ".jsonl": JsonLines, ".csv": Csv, ".parquet": Parquet}
"""The kind of file that each ending stands for."""
KINDS = "txt, jsonl, csv or parquet"


def saved_dataset(path: Path, split: str) -> Path | None:
    """The folder of the split, if `path` was written by `save_to_disk`.

    Raises:
        TextError: it holds several splits and not this one.
    """
    if (path / "dataset_info.json").is_file() and (path / "state.json").is_file():
        return path
    if not (path / "dataset_dict.json").is_file():
        return None
    splits = sorted(folder.parent.name for folder in path.glob("*/state.json"))
    if split not in splits:
        raise TextError(
            f"{str(path)!r} has no split {split!r}; expected one of {', '.join(splits) or 'none'}; set text.split"
        )
    return path / split


def _saved(path: Path) -> Any:
    import datasets

    bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.utils.logging.disable_progress_bar()
    try:
        return datasets.load_from_disk(str(path))
    finally:
        if bars:
            datasets.utils.logging.enable_progress_bar()


def _check_column(records: list[dict[str, Any]], column: str, name: str) -> None:
    known = dict.fromkeys(key for record in records for key in record)
    if records and column not in known:
        raise TextError(
            f"{name!r} has no column {column!r}; expected one of {', '.join(map(str, known)) or 'none'}; set "
            "text.column"
        )


def _filled_lines(file: Any) -> Iterator[bytes]:
    return (line for line in iter(file.readline, b"") if not line.isspace())


def _json(line: bytes) -> Any:
    """What a line holds; the line itself if it is not UTF-8, None if it is not JSON."""
    try:
        return json.loads(line)
    except UnicodeDecodeError:
        return line
    except (ValueError, RecursionError):
        return None


def _field(line: bytes, column: str) -> Any:
    record = _json(line)
    if isinstance(record, bytes):
        return record
    return record.get(column) if isinstance(record, dict) else None


def _csv_rows(file: Any) -> Iterator[list[str]]:
    """Rows from where `file` stands; it stands at the next one whenever a row has been given out."""
    limit = csv.field_size_limit(LONGEST_FIELD)
    try:
        # What is not UTF-8 becomes lone surrogates, which are counted as such later.
        lines: Iterable[str] = (line.decode("utf-8-sig", "surrogateescape") for line in iter(file.readline, b""))
        for row in csv.reader(lines):
            if row:
                yield row
    except csv.Error as problem:
        raise ValueError(str(problem)) from problem
    finally:
        csv.field_size_limit(limit)


def _piece(file: Any, number: int) -> bytes:
    """Lines that begin in bytes `number * PIECE_BYTES` (exclusive of a line already begun) to the next multiple."""
    begin, end = number * PIECE_BYTES, (number + 1) * PIECE_BYTES
    if begin:
        file.seek(begin - 1)
        file.readline()
        begin = file.tell()
    else:
        file.seek(0)
    if begin >= end:
        return b""
    lines = file.read(end - begin)
    if lines and not lines.endswith(b"\n"):
        lines += file.readline()
    return lines
