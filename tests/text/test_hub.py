"""Streams: the hub's code path on local folders, and streams that raise, stall or end early."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unbraid.config import TextConfig
from unbraid.errors import TextError
from unbraid.text import hub, open_source
from unbraid.text.documents import BLOCK
from unbraid.text.hub import PAUSES, HubSource

CONFIG = TextConfig(source="hub", dataset="somewhere/something")


class ListStream:
    """A stream over `texts` that calls `before(n)` ahead of the n-th document it ever hands out."""

    def __init__(self, texts: list[Any], before: Any = lambda number: None) -> None:
        self.texts, self.before = texts, before
        self.place = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while self.place < len(self.texts):
            self.before(self.place)
            self.place += 1
            yield {"text": self.texts[self.place - 1]}

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.place = state_dict["place"]


TEXTS = [f"document {number}" for number in range(BLOCK + 300)]


def read(source: HubSource, start: int = 0) -> list[str]:
    return [document.text for document in source.documents(start)]


READ_THROUGH = HubSource(CONFIG, open_stream=lambda: ListStream(TEXTS))
WHOLE = read(READ_THROUGH)


def test_a_stream_gives_every_document_once_in_a_repeatable_random_order() -> None:
    found = read(HubSource(CONFIG, open_stream=lambda: ListStream(TEXTS)))
    assert sorted(found) == sorted(TEXTS) and found != TEXTS
    assert set(found[:BLOCK]) == set(TEXTS[:BLOCK])
    assert found == read(HubSource(CONFIG, open_stream=lambda: ListStream(TEXTS)))
    other = CONFIG.model_copy(update={"shuffle_seed": 1})
    assert found != read(HubSource(other, open_stream=lambda: ListStream(TEXTS)))


@settings(max_examples=8)
@given(st.integers(0, len(TEXTS) + 1), st.booleans())
def test_reading_from_any_document_gives_the_tail_with_and_without_a_bookmark(start: int, marked: bool) -> None:
    bookmark = READ_THROUGH.bookmark(start) if marked else None
    fresh = HubSource(CONFIG, open_stream=lambda: ListStream(TEXTS))
    assert read(fresh, start) == WHOLE[start:]
    assert [document.text for document in fresh.documents(start, json.loads(json.dumps(bookmark)))] == WHOLE[start:]


def test_a_bookmark_spares_reading_what_came_before() -> None:
    source = HubSource(CONFIG, open_stream=lambda: ListStream(TEXTS))
    read(source)
    reads: list[int] = []
    fresh = HubSource(CONFIG, open_stream=lambda: ListStream(TEXTS, reads.append))
    list(fresh.documents(BLOCK + 10, source.bookmark(BLOCK + 10)))
    assert min(reads) == BLOCK


@pytest.mark.parametrize("failing", [1, 7, 100])
def test_a_stream_that_breaks_again_and_again_loses_and_repeats_nothing(failing: int) -> None:
    handed_out = 0

    def flaky(place: int) -> None:
        nonlocal handed_out
        handed_out += 1
        if handed_out % (failing + 1) == 0:
            raise ConnectionError("connection reset")

    pauses: list[float] = []
    texts = TEXTS[:400]
    source = HubSource(CONFIG, open_stream=lambda: ListStream(texts, flaky), pause=pauses.append)
    with pytest.warns(UserWarning, match=r"ConnectionError: connection reset; trying again in 1 s"):
        found = read(source)
    assert found == read(HubSource(CONFIG, open_stream=lambda: ListStream(texts)))
    assert pauses == [PAUSES[0]] * (399 // failing)


def test_a_stream_that_stays_broken_is_given_up_after_growing_pauses() -> None:
    def broken(place: int) -> None:
        if place == 5:
            raise ConnectionError("no route to host")

    pauses: list[float] = []
    source = HubSource(CONFIG, open_stream=lambda: ListStream(TEXTS, broken), pause=pauses.append)
    with (
        pytest.warns(UserWarning, match=r"trying again"),
        pytest.raises(TextError, match=r"cannot read document 5 of data set 'somewhere/something'.*gave up after 6"),
    ):
        read(source)
    assert tuple(pauses) == PAUSES


def test_a_stream_that_cannot_be_opened_at_first_is_opened_later() -> None:
    attempts = iter([TimeoutError("slow"), OSError("reset")])

    def open_stream() -> ListStream:
        for problem in attempts:
            raise problem
        return ListStream(TEXTS)

    with pytest.warns(UserWarning, match=r"cannot read document 0"):
        assert len(read(HubSource(CONFIG, open_stream=open_stream, pause=lambda seconds: None))) == len(TEXTS)


def test_a_stream_that_stalls_is_opened_again_where_it_was() -> None:
    release = threading.Event()
    opened: list[ListStream] = []

    def stall_once(place: int) -> None:
        if place == 3 and len(opened) == 1:
            release.wait()

    def open_stream() -> ListStream:
        opened.append(ListStream(TEXTS, stall_once))
        return opened[-1]

    source = HubSource(CONFIG, open_stream=open_stream, pause=lambda seconds: None, patience=0.5)
    with pytest.warns(UserWarning, match=r"TimeoutError: no document for 0\.5 seconds"):
        assert sorted(read(source)) == sorted(TEXTS)
    release.set()
    assert len(opened) > 1


def test_a_stream_that_ends_early_is_opened_again_where_it_was() -> None:
    lengths = iter([100, 900])

    def open_stream() -> ListStream:
        return ListStream(TEXTS[: next(lengths, len(TEXTS))])

    source = HubSource(CONFIG, open_stream=open_stream, expected=len(TEXTS), pause=lambda seconds: None)
    with pytest.warns(UserWarning, match=r"EOFError: the stream ended after (100|900) of 1324 documents"):
        assert sorted(read(source)) == sorted(TEXTS)


def test_an_error_that_waiting_cannot_mend_stops_at_once() -> None:
    def broken(place: int) -> None:
        raise ValueError("not a data set")

    source = HubSource(
        CONFIG, open_stream=lambda: ListStream(TEXTS, broken), pause=lambda seconds: pytest.fail("waited")
    )
    with pytest.raises(TextError, match=r"ValueError: not a data set; expected one that exists"):
        read(source)


@pytest.fixture(scope="module", params=["jsonl", "parquet"])
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set folder of three shards, 1800 documents."""
    folder = tmp_path_factory.mktemp(f"dataset_{request.param}")
    for shard in range(3):
        texts = [f"shard {shard} document {number}" for number in range(600)]
        path = folder / f"train-{shard}.{request.param}"
        if request.param == "parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=250)
        else:
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def test_a_local_folder_streams_through_datasets_and_resumes_at_any_document(dataset: Path) -> None:
    config = TextConfig(source="hub", dataset=str(dataset))
    source = open_source(config)
    whole = list(source.documents())
    expected = {f"shard {shard} document {number}" for shard in range(3) for number in range(600)}
    assert len(whole) == 1800 and {document.text for document in whole} == expected
    for start in (1, 1023, 1024, 1500, 1799, 1800):
        fresh = open_source(config)
        assert list(fresh.documents(start, source.bookmark(start))) == whole[start:]
    assert list(open_source(config).documents(1100)) == whole[1100:]


def test_a_broken_datasets_stream_goes_on_at_the_exact_document(dataset: Path) -> None:
    source = HubSource(TextConfig(source="hub", dataset=str(dataset)), pause=lambda seconds: None)
    load, served = source._load, 0

    class Flaky:
        def __init__(self) -> None:
            self.stream: Any = load()

        def __iter__(self) -> Iterator[dict[str, Any]]:
            nonlocal served
            for example in self.stream:
                served += 1
                if served % 331 == 0:
                    raise ConnectionError("reset")
                yield example

        def state_dict(self) -> dict[str, Any]:
            return self.stream.state_dict()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.stream.load_state_dict(state_dict)

    source.open_stream = Flaky
    with pytest.warns(UserWarning, match=r"trying again"):
        found = list(source.documents())
    assert found == list(open_source(source.config).documents())


def test_what_is_wrong_with_a_data_set_is_said(dataset: Path) -> None:
    good = TextConfig(source="hub", dataset=str(dataset))
    for change, words in (
        ({"column": "story"}, "no column 'story'; expected one of text; set text.column"),
        ({"split": "nope"}, "split 'nope'.*expected one that exists"),
        ({"dataset": str(dataset / "nowhere")}, "nowhere.*expected one that exists"),
        ({"dataset": "no/such-data-set"}, "no/such-data-set.*the hub cannot be reached .offline mode is on"),
    ):
        with pytest.raises(TextError, match=words):
            next(open_source(good.model_copy(update=change)).documents())
    with pytest.raises(TextError, match=r"set text.dataset"):
        open_source(TextConfig(source="hub"))


def test_an_unreachable_hub_is_asked_once_and_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[None] = []
    monkeypatch.setattr(hub, "why_unreachable", lambda: asked.append(None) or "Name or service not known")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("tried all the same"))
    source = HubSource(CONFIG, pause=lambda seconds: pytest.fail("waited"))
    with pytest.raises(TextError, match=r"'somewhere/something': the hub cannot be reached \(Name or ser"):
        read(source)
    assert len(asked) == 1
