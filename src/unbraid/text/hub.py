"""Documents streamed from a Hugging Face data set, through networks that fail.

`datasets` hides short disconnections; what it lets through is met here. A stream that raises, stalls or ends early is
opened again at the document it had reached, after a growing pause, a bounded number of times, so nothing is lost and
nothing repeats. A stream cannot be shuffled as a whole and a shuffle buffer of `datasets` does not survive a restart,
so documents are put in random order within blocks of 1024; the stream's state at each block's start is the bookmark
that makes resuming cheap.
"""

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from unbraid.errors import TextError
from unbraid.randomness import derive_seed
from unbraid.text.documents import BLOCK, Document

PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Seconds waited before each attempt to go on; progress starts the list again."""
PATIENCE = 300.0
"""Seconds without a document after which a stream counts as stalled."""
READ_AHEAD = 256
BOOKMARKS = 64
NETWORK_PACKAGES = {
    "aiohttp",
    "fsspec",
    "httpcore",
    "httpcore2",
    "httpx",
    "httpx2",
    "huggingface_hub",
    "requests",
    "urllib3",
}
PERMANENT = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)


class Stream(Protocol):
    """What is used of `datasets.IterableDataset`."""

    def __iter__(self) -> Iterator[dict[str, Any]]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class HubSource:
    """A streamed data set, from the hub or a local folder.

    `open_stream` makes a fresh stream at its beginning and `expected` is the number of documents it should have, if
    known; both come from `datasets` unless given. `pause` waits between attempts.

    Raises:
        TextError: the data set does not exist or has no such split or column (on first use).
    """

    def __init__(
        self,
        dataset: str,
        *,
        config: str | None = None,
        revision: str | None = None,
        split: str = "train",
        column: str = "text",
        seed: int = 0,
        open_stream: Callable[[], Stream] | None = None,
        expected: int | None = None,
        pause: Callable[[float], None] = time.sleep,
        patience: float = PATIENCE,
    ) -> None:
        if not dataset:
            raise TextError(
                "text.source is hub but text.dataset is empty; expected a data set's name such as monology/pile-uncopyrighted"
            )
        self.dataset, self.config, self.revision, self.split, self.column, self.seed = (
            dataset,
            config,
            revision,
            split,
            column,
            seed,
        )
        self._open_stream = open_stream or self._load
        self._expected = expected
        self._pause = pause
        self._patience = patience
        self._bookmarks: OrderedDict[int, dict[str, Any]] = OrderedDict()

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that was asked of the hub, and the order."""
        names = ("dataset", "config", "revision", "split", "column", "seed")
        return {"source": "hub"} | {name: getattr(self, name) for name in names}

    def bookmark(self, document: int) -> dict[str, Any] | None:
        """The stream's own state at the start of the document's block, if it was read lately."""
        state = self._bookmarks.get(document // BLOCK)
        return None if state is None else {"block": document // BLOCK, "state": state}

    def documents(self, start: int = 0, bookmark: dict[str, Any] | None = None) -> Iterator[Document]:
        """Documents `start` to the last.

        Raises:
            TextError: the stream kept failing, or never existed.
        """
        first_block = start // BLOCK
        reader = _Reader(self)
        if bookmark is not None and bookmark["block"] <= first_block:
            reader.go_to(bookmark["block"] * BLOCK, bookmark["state"])
        for number in range(reader.position // BLOCK, first_block):
            for _ in range(BLOCK):
                if reader.read() is _END:
                    return
            self._remember(number + 1, reader.state)
        number = first_block
        while True:
            self._remember(number, reader.state)
            texts = []
            while len(texts) < BLOCK and (text := reader.read()) is not _END:
                texts.append(text)
            order = np.random.Generator(np.random.Philox(derive_seed(self.seed, "text block", number))).permutation(
                len(texts)
            )
            for index in range(max(start, number * BLOCK), number * BLOCK + len(texts)):
                yield Document(index, texts[order[index - number * BLOCK]])
            if len(texts) < BLOCK:
                return
            number += 1

    def _remember(self, block: int, state: dict[str, Any] | None) -> None:
        if state is not None:
            self._bookmarks[block] = state
            while len(self._bookmarks) > BOOKMARKS:
                self._bookmarks.popitem(last=False)

    def _load(self) -> Stream:
        import datasets

        datasets.utils.logging.set_verbosity_error()
        stream = datasets.load_dataset(
            self.dataset, self.config, revision=self.revision, split=self.split, streaming=True
        )
        if stream.column_names is not None and self.column not in stream.column_names:
            raise TextError(
                f"data set {self.dataset!r} has no column {self.column!r}; expected one of {', '.join(stream.column_names)}; set text.column"
            )
        info = (stream.info.splits or {}).get(self.split)
        if info is not None and info.num_examples:
            self._expected = info.num_examples
        return stream

    def _text(self, example: dict[str, Any]) -> Any:
        return example.get(self.column)


_END = object()


class _Reader:
    """Reads a stream document by document, opening it again where it broke."""

    def __init__(self, source: HubSource) -> None:
        self._source = source
        self._prefetch: _Prefetch | None = None
        self.position = 0
        self.state: dict[str, Any] | None = None

    def go_to(self, position: int, state: dict[str, Any]) -> None:
        self.position, self.state = position, state

    def read(self) -> Any:
        """The next document's text, or _END."""
        failures = 0
        while True:
            try:
                if self._prefetch is None:
                    self._prefetch = self._open()
                item = self._prefetch.get(self._source._patience)
                expected = self._source._expected
                if item is _END:
                    if expected is not None and self.position < expected:
                        raise EOFError(f"the stream ended after {self.position} of {expected} documents")
                    return _END
            except TextError:
                raise
            except Exception as problem:
                self._close()
                if not _is_transient(problem):
                    raise self._refusal(
                        problem,
                        "set text.dataset, text.dataset_config, text.split and text.revision to one that exists",
                    ) from problem
                if failures == len(PAUSES):
                    raise self._refusal(
                        problem, f"gave up after {failures} attempts; check the network and resume"
                    ) from problem
                self._source._pause(PAUSES[failures])
                failures += 1
                continue
            example, self.state = item
            self.position += 1
            return self._source._text(example)

    def _open(self) -> "_Prefetch":
        stream = self._source._open_stream()
        skip = self.position
        if self.state is not None:
            stream.load_state_dict(self.state)
            skip = 0
        else:
            self.state = stream.state_dict() if skip == 0 else None
        return _Prefetch(stream, skip)

    def _close(self) -> None:
        if self._prefetch is not None:
            self._prefetch.stop()
            self._prefetch = None

    def _refusal(self, problem: Exception, advice: str) -> TextError:
        source = self._source
        return TextError(
            f"cannot read document {self.position} of data set {source.dataset!r} (split {source.split!r}): "
            f"{type(problem).__name__}: {problem}; {advice}"
        )


class _Prefetch:
    """A thread that reads ahead, so that a stall is noticed and the network works while the model does."""

    def __init__(self, stream: Stream, skip: int) -> None:
        self._items: queue.Queue[Any] = queue.Queue(READ_AHEAD)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(stream, skip), daemon=True, name="unbraid-text")
        self._thread.start()

    def _work(self, stream: Stream, skip: int) -> None:
        try:
            for number, example in enumerate(stream):
                if number >= skip and not self._put((example, stream.state_dict())):
                    return
            self._put(_END)
        except Exception as problem:
            self._put(problem)

    def _put(self, item: Any) -> bool:
        while not self._stopped.is_set():
            try:
                self._items.put(item, timeout=0.5)
                return True
            except queue.Full:
                continue
        return False

    def get(self, patience: float) -> Any:
        try:
            item = self._items.get(timeout=patience)
        except queue.Empty:
            raise TimeoutError(f"no document for {patience:g} seconds") from None
        if isinstance(item, Exception):
            raise item
        return item

    def stop(self) -> None:
        self._stopped.set()


def _is_transient(problem: Exception) -> bool:
    if isinstance(problem, PERMANENT):
        return False
    status = getattr(getattr(problem, "response", None), "status_code", None)
    if status is not None and 400 <= status < 500 and status not in (408, 425, 429):
        return False
    return isinstance(problem, OSError | EOFError) or type(problem).__module__.partition(".")[0] in NETWORK_PACKAGES
