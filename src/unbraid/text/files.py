"""Documents from local txt, jsonl and parquet files, or folders of them, in a repeatable random order.

Files are cut into blocks that can be read on their own: a parquet row group, 1024 lines of jsonl, a whole txt file (or
its megabytes, cut at line ends, when it is larger). The order is random blocks and random documents within a block, so
reading stays sequential enough for a disk and any document is reached by reading one block.
"""

import bisect
import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from unbraid.errors import TextError
from unbraid.text.documents import BLOCK, Document, shuffled

SUFFIXES = (".txt", ".jsonl", ".parquet")
KINDS = "txt, jsonl or parquet"
SAMPLE_BYTES, SAMPLES = 1 << 16, 1 << 10
PIECE_BYTES = 1 << 20
"""A txt file longer than this becomes several documents, cut at line ends."""


def sampled_checksum(path: Path) -> str:
    """Of a file's bytes, whole up to 64 MiB; of 1024 pieces spread over a larger one."""
    size, digest = path.stat().st_size, hashlib.blake2b(digest_size=8)
    with path.open("rb") as file:
        for place in range(0, size, max(SAMPLE_BYTES, size // SAMPLES)):
            file.seek(place)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


class Block(NamedTuple):
    """`count` documents of one file, beginning at `place`: a byte of jsonl, a row group of parquet, a piece of txt."""

    path: Path
    place: int
    count: int


class FileSource:
    """Local files. The list and sizes of the files are taken when the source is made.

    Raises:
        TextError: a path does not exist, holds no file of a known kind, cannot be read, or lacks the column.
    """

    def __init__(self, paths: list[str], column: str, seed: int) -> None:
        self.column = column
        self.seed = seed
        self.files = _find_files(paths)
        blocks = [block for path in self.files for block in self._blocks(path)]
        self._ordered = [blocks[place] for place in shuffled(len(blocks), seed, "text order")]
        self._ends = list(itertools.accumulate(block.count for block in self._ordered))

    @property
    def identity(self) -> dict[str, Any]:
        """Names, sizes and checksums of the files, the column and the order."""
        files = [[path.name, path.stat().st_size, sampled_checksum(path)] for path in self.files]
        return {"source": "files", "files": files, "column": self.column, "seed": self.seed}

    def bookmark(self, document: int) -> None:
        """Any block is found by its number."""
        return None

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def documents(self, start: int = 0, bookmark: dict[str, Any] | None = None) -> Iterator[Document]:
        """Documents `start` to the last.

        Raises:
            TextError: a file vanished, shrank or cannot be read.
        """
        for number in range(bisect.bisect_right(self._ends, start), len(self._ordered)):
            block = self._ordered[number]
            first = self._ends[number] - block.count
            try:
                texts = self._read(block)
            except (OSError, ValueError) as problem:
                raise TextError(
                    f"cannot read {str(block.path)!r} any more ({problem}); expected the file as it was at the start; "
                    "restore it or change text.paths"
                ) from problem
            if len(texts) != block.count:
                raise TextError(
                    f"{str(block.path)!r} holds {len(texts)} documents where {block.count} were found at the start; "
                    "expected files that do not change during a run; copy them and set text.paths to the copy"
                )
            order = shuffled(block.count, self.seed, "text block", number)
            for index in range(max(start, first), first + block.count):
                yield Document(index, texts[order[index - first]])

    def _blocks(self, path: Path) -> list[Block]:
        try:
            if path.suffix == ".parquet":
                return self._parquet_blocks(path)
            if path.suffix == ".jsonl":
                return _jsonl_blocks(path)
            pieces = max(1, -(-path.stat().st_size // PIECE_BYTES))
            return [Block(path, first, min(BLOCK, pieces - first)) for first in range(0, pieces, BLOCK)]
        except (OSError, ValueError) as problem:
            raise TextError(
                f"cannot read {str(path)!r} ({problem}); expected a {path.suffix} file; mend it or change text.paths"
            ) from problem

    def _parquet_blocks(self, path: Path) -> list[Block]:
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if self.column not in names:
                raise TextError(
                    f"{str(path)!r} has no column {self.column!r}; expected one of {', '.join(names)}; set text.column"
                )
            groups = range(file.num_row_groups)
            return [Block(path, group, file.metadata.row_group(group).num_rows) for group in groups]

    def _read(self, block: Block) -> list[Any]:
        if block.path.suffix == ".parquet":
            import pyarrow.parquet

            with pyarrow.parquet.ParquetFile(block.path) as file:
                return file.read_row_group(block.place, columns=[self.column]).column(0).to_pylist()
        with block.path.open("rb") as file:
            if block.path.suffix == ".jsonl":
                file.seek(block.place)
                return [self._parse(line) for line in itertools.islice(file, block.count)]
            return [_piece(file, piece) for piece in range(block.place, block.place + block.count)]

    def _parse(self, line: bytes) -> Any:
        try:
            record = json.loads(line)
        except UnicodeDecodeError:
            return line
        except (ValueError, RecursionError):
            return None
        return record.get(self.column) if isinstance(record, dict) else None


def _find_files(paths: list[str]) -> list[Path]:
    if not paths:
        raise TextError(f"text.paths is empty; expected at least one {KINDS} file or folder; set text.paths")
    found: list[Path] = []
    for name in paths:
        path = Path(name).expanduser()
        if path.is_dir():
            inside = sorted(item for item in path.rglob("*") if item.suffix in SUFFIXES and item.is_file())
            if not inside:
                raise TextError(f"the folder {name!r} holds no text; expected {KINDS} files; change text.paths")
            found += inside
        elif not path.exists():
            raise TextError(f"{name!r} does not exist; expected a {KINDS} file or a folder of them; change text.paths")
        elif path.suffix not in SUFFIXES:
            raise TextError(f"{name!r} is not a kind of file unbraid reads; expected {KINDS}; change text.paths")
        else:
            found.append(path)
    return list(dict.fromkeys(found))


def _jsonl_blocks(path: Path) -> list[Block]:
    blocks: list[Block] = []
    with path.open("rb") as file:
        while True:
            place = file.tell()
            count = sum(1 for _ in itertools.islice(file, BLOCK))
            if count == 0:
                return blocks
            blocks.append(Block(path, place, count))


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
