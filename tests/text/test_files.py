"""Local files: every document once, in a repeatable order that can be entered anywhere."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from unbraid.config import TextConfig
from unbraid.errors import TextError
from unbraid.text import files as files_module
from unbraid.text import open_source
from unbraid.text.documents import BLOCK, TextSource


def open_files(*paths: Path, column: str = "text", seed: int = 0) -> TextSource:
    return open_source(
        TextConfig(source="files", paths=[str(path) for path in paths], column=column, shuffle_seed=seed)
    )


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def write_parquet(path: Path, texts: list[str], rows: int) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "n": range(len(texts))}), path, row_group_size=rows)
    return path


def texts_of(source: TextSource, start: int = 0) -> list[str]:
    return [document.text for document in source.documents(start)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three kinds of files: 2500 lines of jsonl, 700 rows of parquet in 7 groups, 5 text files."""
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl(folder / "a.jsonl", [f"line {number} é" for number in range(2500)])
    write_parquet(folder / "b.parquet", [f"row {number}" for number in range(700)], 100)
    (folder / "inside").mkdir()
    for number in range(5):
        (folder / "inside" / f"{number}.txt").write_text(f"file {number}")
    (folder / "notes.md").write_text("not read")
    return folder


def as_text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def test_a_folder_gives_every_document_of_every_kind_once(folder: Path) -> None:
    found = sorted(map(as_text, texts_of(open_files(folder))))
    lines = [f"line {number} é" for number in range(2500)]
    expected = lines + [f"row {number}" for number in range(700)] + [f"file {number}" for number in range(5)]
    assert found == sorted(expected)


def test_the_order_is_random_repeatable_and_the_seeds_own(folder: Path) -> None:
    first = texts_of(open_files(folder))
    assert first == texts_of(open_files(folder))
    assert first != texts_of(open_files(folder, seed=1))
    assert first[:50] != sorted(first[:50], key=as_text)


def test_reading_from_any_document_gives_the_tail(folder: Path) -> None:
    whole = list(open_files(folder).documents())
    assert [document.index for document in whole] == list(range(len(whole)))
    for start in (*range(0, 3206, 229), 3204, 3205, 3300):
        assert list(open_files(folder).documents(start)) == whole[start:]


def test_a_long_text_file_is_cut_at_line_ends_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_module, "PIECE_BYTES", 64)
    path = tmp_path / "long.txt"
    lines = ["x" * (number % 150) + f" {number}\n" for number in range(200)] + ["the end"]
    path.write_text("".join(lines))
    source = files_module.FileSource([str(path)], "text", seed=0)
    pieces = [
        piece for block in sorted(source._ordered, key=lambda block: block.place) for piece in source._read(block)
    ]
    assert b"".join(pieces) == path.read_bytes()
    assert all(piece.endswith(b"\n") for piece in pieces[:-1] if piece)
    assert len(list(source.documents())) == len(pieces) > 100


def test_lines_that_are_not_json_or_not_utf8_are_handed_on_as_unusable(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\nnot json\n{"other": 1}\n[1]\n"\xff"\n\n{"text": null}\n')
    texts = texts_of(open_files(tmp_path))
    assert len(texts) == 7
    assert [text for text in texts if text is not None] in (["good", b'"\xff"\n'], [b'"\xff"\n', "good"])


def test_an_empty_file_holds_no_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    assert texts_of(open_files(tmp_path)) == []


def test_a_file_that_changes_under_a_run_is_an_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    source = open_files(path)
    write_jsonl(path, ["one"])
    with pytest.raises(TextError, match=r"holds 1 documents where 2 were found"):
        texts_of(source)
    path.unlink()
    with pytest.raises(TextError, match=r"cannot read .*a.jsonl"):
        texts_of(source)


def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"no column 'story'; expected one of text, n; set text.column"):
        open_files(write_parquet(tmp_path / "a.parquet", ["x"], 10), column="story")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"nowhere.txt' does not exist; expected"):
        open_files(tmp_path / "nowhere.txt")
    with pytest.raises(TextError, match="holds no text; expected txt, jsonl or parquet"):
        open_files(tmp_path)
    with pytest.raises(TextError, match=r"text\.paths is empty"):
        open_files()
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(TextError, match=r"a\.csv' is not a kind of file"):
        open_files(tmp_path / "a.csv")
    (tmp_path / "broken.parquet").write_text("not parquet")
    with pytest.raises(TextError, match=r"cannot read '.*broken\.parquet'"):
        open_files(tmp_path / "broken.parquet")


def test_identity_tells_other_files_and_orders_apart(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["one"])
    first = open_files(path).identity
    assert json.loads(json.dumps(first)) == first
    assert open_files(path, seed=1).identity != first
    write_jsonl(path, ["one", "two"])
    assert open_files(path).identity != first


def test_a_block_of_jsonl_is_found_by_its_byte(tmp_path: Path) -> None:
    source = files_module.FileSource([str(write_jsonl(tmp_path / "a.jsonl", ["é"] * (2 * BLOCK + 1)))], "text", 0)
    assert sorted(block.count for block in source._ordered) == [1, BLOCK, BLOCK]
    assert len(source) == 2 * BLOCK + 1
