"""Documents streamed from a Hugging Face data set over an unreliable network.

`datasets` hides short disconnections; the errors that it raises are handled here. A stream that raises, stalls or ends
early is opened again at the document it had reached, after a growing pause, a bounded number of times, so no document
is lost or repeated. A stream cannot be shuffled as a whole, and a shuffle buffer of `datasets` does not survive a
restart, so documents are put in random order within blocks of 1024. The stream's state at the start of each block is
saved, which makes resuming cheap.
"""

import queue
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

from unbraid.config import TextConfig
from unbraid.errors import TextError
from unbraid.offline import is_hub_id, why_unreachable
from unbraid.text.documents import BLOCK, Document, shuffled

PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Seconds waited before each attempt to go on; progress starts the list again."""
PATIENCE = 300.0
"""Seconds without a document after which a stream counts as stalled."""
READ_AHEAD = 256
BOOKMARKS = 64
NETWORK_PACKAGES = {"aiohttp", "fsspec", "httpcore", "httpx", "huggingface_hub", "requests", "urllib3"}
PERMANENT = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
PASSING_STATUSES = {408, 425, 429}
"""HTTP answers in the 400s that may differ next time."""


@runtime_checkable
class Stream(Protocol):
    """What is used of `datasets.IterableDataset`."""

    def __iter__(self) -> Iterator[dict[str, Any]]: ...

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there at the next iteration."""
        ...


class HubSource:
    """A streamed data set, from the hub or a local folder.

    Args:
        config: dataset, dataset_config, revision, split, column and shuffle_seed.
        open_stream: makes a fresh stream at its beginning; `datasets.load_dataset` unless given.
        expected: documents the stream should have; taken from the data set's card unless given.
        pause: waits the given seconds between attempts.
        patience: seconds without a document after which the stream counts as stalled.

    Raises:
        TextError: no data set is named; later, on first use: it does not exist or has no such split or column.
    """

    def __init__(
        self,
        config: TextConfig,
        *,
        open_stream: Callable[[], Stream] | None = None,
        expected: int | None = None,
        pause: Callable[[float], None] = time.sleep,
        patience: float = PATIENCE,
    ) -> None:
        if not config.dataset:
            raise TextError(
                f"text.dataset = {config.dataset!r}; expected a data set such as monology/pile-uncopyrighted or a "
                "local folder that datasets can load; set text.dataset"
            )
        self.config = config
        self.open_stream = open_stream or self._load
        self.expected = expected
        self.pause = pause
        self.patience = patience
        self._reached = False
        self._bookmarks: OrderedDict[int, dict[str, Any]] = OrderedDict()

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that was asked of the hub, and the order."""
        names = ("dataset", "dataset_config", "revision", "split", "column", "shuffle_seed")
        return {"source": "hub"} | {name: getattr(self.config, name) for name in names}

    def bookmark(self, document: int) -> dict[str, Any] | None:
        """The stream's own state at the start of the document's block, if it was read lately."""
        state = self._bookmarks.get(document // BLOCK)
        return None if state is None else {"block": document // BLOCK, "state": state}

    def documents(self, start: int = 0, bookmark: dict[str, Any] | None = None) -> Iterator[Document]:
        """Documents `start` to the last.

        Raises:
            TextError: the stream kept failing, or never existed.
        """
        reader = _Reader(self)
        try:
            if bookmark is not None and bookmark["block"] <= start // BLOCK:
                reader.go_to(bookmark["block"] * BLOCK, bookmark["state"])
            yield from self._documents(reader, start)
        finally:
            reader.close()

    def _documents(self, reader: "_Reader", start: int) -> Iterator[Document]:
        while True:
            first = reader.position
            self._remember(first // BLOCK, reader.state)
            texts: list[Any] = []
            while len(texts) < BLOCK and (text := reader.read()) is not _END:
                texts.append(text)
            order = shuffled(len(texts), self.config.shuffle_seed, "text block", first // BLOCK)
            for index in range(max(start, first), first + len(texts)):
                yield Document(index, texts[order[index - first]])
            if len(texts) < BLOCK:
                return

    def _remember(self, block: int, state: dict[str, Any] | None) -> None:
        if state is not None:
            self._bookmarks[block] = state
            while len(self._bookmarks) > BOOKMARKS:
                self._bookmarks.popitem(last=False)

    def _load(self) -> Stream:
        import datasets
        from datasets.utils import logging as chatter

        config = self.config
        why = why_unreachable() if not self._reached and is_hub_id(config.dataset) else None
        if why is not None:
            raise TextError(
                f"cannot read data set {config.dataset!r}: the hub cannot be reached ({why}); expected a network, or a "
                "local folder in text.dataset; connect, or set text.source to packaged or files"
            )
        level, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
        chatter.set_verbosity_error()
        chatter.disable_progress_bar()
        try:
            stream = datasets.load_dataset(
                config.dataset, config.dataset_config, revision=config.revision, split=config.split, streaming=True
            )
        finally:
            chatter.set_verbosity(level)
            if bars:
                chatter.enable_progress_bar()
        self._reached = True
        if stream.column_names is not None and config.column not in stream.column_names:
            raise TextError(
                f"data set {config.dataset!r} has no column {config.column!r}; expected one of "
                f"{', '.join(stream.column_names)}; set text.column"
            )
        info = (stream.info.splits or {}).get(config.split)
        if info is not None and info.num_examples:
            self.expected = info.num_examples
        return stream


_END = object()


class _Reader:
    """Reads a stream document by document, opening it again where it broke."""

    def __init__(self, source: HubSource) -> None:
        self.source = source
        self.position = 0
        self.state: dict[str, Any] | None = None
        self._prefetch: _Prefetch | None = None

    def go_to(self, position: int, state: dict[str, Any]) -> None:
        self.position, self.state = position, state

    def read(self) -> Any:
        """The next document's text, or _END."""
        failures = 0
        while True:
            try:
                item = self._next()
                break
            except TextError:
                raise
            except Exception as problem:
                self.close()
                if not _may_pass(problem):
                    advice = "expected one that exists; change text.dataset, dataset_config, split or revision"
                    raise self._refusal(problem, advice) from problem
                if failures == len(PAUSES):
                    advice = f"gave up after {failures} attempts to go on; check the network, then resume"
                    raise self._refusal(problem, advice) from problem
                pause = PAUSES[failures]
                failures += 1
                warnings.warn(f"{self._refusal(problem, f'trying again in {pause:g} s')}", stacklevel=2)
                self.source.pause(pause)
        if item is _END:
            return _END
        example, self.state = item
        self.position += 1
        return example.get(self.source.config.column)

    def _next(self) -> Any:
        if self._prefetch is None:
            self._prefetch = self._open()
        item = self._prefetch.get(self.source.patience)
        expected = self.source.expected
        if item is _END and expected is not None and self.position < expected:
            raise EOFError(f"the stream ended after {self.position} of {expected} documents")
        return item

    def _open(self) -> "_Prefetch":
        stream = self.source.open_stream()
        if self.state is None:
            self.state = stream.state_dict()
        else:
            stream.load_state_dict(self.state)
        return _Prefetch(stream)

    def close(self) -> None:
        if self._prefetch is not None:
            self._prefetch.stop()
            self._prefetch = None

    def _refusal(self, problem: Exception, advice: str) -> TextError:
        config = self.source.config
        return TextError(
            f"cannot read document {self.position} of data set {config.dataset!r}, split {config.split!r}: "
            f"{type(problem).__name__}: {problem}; {advice}"
        )


class _Prefetch:
    """A thread that reads ahead, so that a stall is noticed and the network works while the model does."""

    def __init__(self, stream: Stream) -> None:
        self._items: queue.Queue[Any] = queue.Queue(READ_AHEAD)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(stream,), daemon=True, name="unbraid-text")
        self._thread.start()

    def _work(self, stream: Stream) -> None:
        try:
            for example in stream:
                if not self._put((example, stream.state_dict())):
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


def _may_pass(problem: Exception) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(problem, PERMANENT) or "Offline" in f"{type(problem).__name__} {problem}":
        return False
    status = getattr(getattr(problem, "response", None), "status_code", None)
    if status is not None and 400 <= status < 500 and status not in PASSING_STATUSES:
        return False
    return isinstance(problem, OSError | EOFError) or type(problem).__module__.partition(".")[0] in NETWORK_PACKAGES
