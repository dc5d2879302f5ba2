"""Documents from local files, or folders of them, in a repeatable random order.

The order is random blocks (see `readers.py`) and random documents within a block, so reading stays sequential enough
for a disk and any document is reached by reading one block. Compressed files are unpacked once into unbraid's cache,
because a place in the middle of one cannot be reached otherwise.
"""

import bisect
import gzip
import hashlib
import itertools
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from unbraid.errors import TextError
from unbraid.text.cache_folder import cache_root, publish
from unbraid.text.documents import Document, shuffled
from unbraid.text.readers import KINDS, READERS, Block, Reader, SavedDataset, saved_dataset

SAMPLE_BYTES, SAMPLES = 1 << 16, 1 << 10


class _File(NamedTuple):
    path: Path
    reader: type[Reader]


class FileSource:
    """Local files. The list and sizes of the files are taken when the source is made.

    Args:
        paths: files and folders; a folder stands for every text file below it, or for the data set that
            `datasets.Dataset.save_to_disk` left there.
        column: the column or key that holds the text.
        seed: of the order.
        split: which split of a saved data set that has several.

    Raises:
        TextError: a path does not exist, holds no file of a known kind, cannot be read, or lacks the column.
    """

    def __init__(self, paths: list[str], column: str, seed: int, split: str = "train") -> None:
        self.column = column
        self.seed = seed
        self.files = _find_files(paths, split)
        read = [(block, file.reader) for file in self.files for block in self._blocks(file)]
        self._ordered = [read[place] for place in shuffled(len(read), seed, "text order")]
        self._ends = list(itertools.accumulate(block.count for block, _ in self._ordered))

    @property
    def identity(self) -> dict[str, Any]:
        """Names, sizes and checksums of the files, the column and the order."""
        files = [[file.path.name, *_size_and_checksum(file.path)] for file in self.files]
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
            block, reader = self._ordered[number]
            first = self._ends[number] - block.count
            try:
                texts = reader.read(block, self.column)
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

    def _blocks(self, file: _File) -> list[Block]:
        try:
            path = _unpacked(file.path) if file.path.suffix.lower() == ".gz" else file.path
            return file.reader.blocks(path, self.column, str(file.path))
        except (OSError, ValueError, EOFError, zlib.error) as problem:
            raise TextError(
                f"cannot read {str(file.path)!r} ({problem}); expected a file of the kind its name says; fix it or "
                "change text.paths"
            ) from problem


def sampled_checksum(path: Path) -> str:
    """Of a file's bytes, whole up to 64 MiB; of 1024 pieces spread over a larger one."""
    size, digest = path.stat().st_size, hashlib.blake2b(digest_size=8)
    with path.open("rb") as file:
        for place in range(0, size, max(SAMPLE_BYTES, size // SAMPLES)):
            file.seek(place)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _find_files(paths: list[str], split: str) -> list[_File]:
    if not paths:
        raise TextError(f"text.paths is empty; expected at least one {KINDS} file or folder; set text.paths")
    found: list[_File] = []
    for name in paths:
        path = Path(name).expanduser()
        if path.is_dir():
            saved = saved_dataset(path, split)
            inside = sorted(item for item in path.rglob("*") if _reader(item) is not None and item.is_file())
            if saved is None and not inside:
                raise TextError(f"the folder {name!r} holds no text; expected {KINDS} files; change text.paths")
            found += [_File(saved, SavedDataset)] if saved else [_File(item, READERS[_suffix(item)]) for item in inside]
        elif not path.exists():
            raise TextError(f"{name!r} does not exist; expected a {KINDS} file or a folder of them; change text.paths")
        elif (reader := _reader(path)) is None:
            raise TextError(f"{name!r} is not a kind of file unbraid reads; expected {KINDS}; change text.paths")
        else:
            found.append(_File(path, reader))
    return list(dict.fromkeys(found))


def _reader(path: Path) -> type[Reader] | None:
    return READERS.get(_suffix(path))


def _suffix(path: Path) -> str:
    """The ending that tells the kind, in lower case, without `.gz`."""
    path = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return path.suffix.lower()


def _size_and_checksum(path: Path) -> tuple[int, str]:
    parts = sorted(path.glob("*.arrow")) if path.is_dir() else [path]
    return sum(part.stat().st_size for part in parts), "-".join(map(sampled_checksum, parts))


def _unpacked(path: Path) -> Path:
    status = path.stat()
    key = f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}".encode()
    digest = hashlib.blake2b(key, digest_size=12).hexdigest()

    def unpack(target: Path) -> None:
        with gzip.open(path, "rb") as packed, target.open("wb") as file:
            shutil.copyfileobj(packed, file)

    try:
        return publish(cache_root() / "text" / f"unpacked-{digest}", unpack, TextError)
    except TextError as problem:
        if isinstance(problem.__cause__, gzip.BadGzipFile):
            raise ValueError(str(problem.__cause__)) from problem
        raise
