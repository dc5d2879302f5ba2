"""Local files: every document once, in a repeatable order that can be entered anywhere."""

import csv
import gzip
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from unbraid.config import TextConfig
from unbraid.errors import TextError
from unbraid.text import files as files_module
from unbraid.text import open_source, readers
from unbraid.text.documents import BLOCK, TextSource, usable


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
    monkeypatch.setattr(readers, "PIECE_BYTES", 64)
    path = tmp_path / "long.txt"
    lines = ["x" * (number % 150) + f" {number}\n" for number in range(200)] + ["the end"]
    path.write_text("".join(lines))
    source = files_module.FileSource([str(path)], "text", seed=0)
    blocks = sorted((block for block, _ in source._ordered), key=lambda block: block.place)
    pieces = [piece for block in blocks for piece in readers.Txt.read(block, "text")]
    assert b"".join(pieces) == path.read_bytes()
    assert all(piece.endswith(b"\n") for piece in pieces[:-1] if piece)
    assert len(list(source.documents())) == len(pieces) > 100


def test_lines_that_are_not_json_or_not_utf8_are_handed_on_as_unusable(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\nnot json\n{"other": 1}\n[1]\n"\xff"\n\n{"text": null}\n')
    texts = texts_of(open_files(tmp_path))
    assert len(texts) == 6
    assert [text for text in texts if text is not None] in (["good", b'"\xff"\n'], [b'"\xff"\n', "good"])


def test_an_empty_file_holds_no_documents(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.csv"):
        (tmp_path / name).write_text("")
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
    with pytest.raises(TextError, match="holds no text; expected txt, jsonl, csv or parquet"):
        open_files(tmp_path)
    with pytest.raises(TextError, match=r"text\.paths is empty"):
        open_files()
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(TextError, match=r"a\.docx' is not a kind of file unbraid reads; expected txt, jsonl, csv"):
        open_files(tmp_path / "a.docx")
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
    assert sorted(block.count for block, _ in source._ordered) == [1, BLOCK, BLOCK]
    assert len(source) == 2 * BLOCK + 1


ROWS = ["plain", 'with "quotes"', "two\nlines, and a comma", "é 中文", "", "last"]


def write_csv(path: Path, texts: list[str]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["n", "text"])
        writer.writerows(enumerate(texts))
    return path


def test_csv_rows_are_documents_even_with_line_ends_inside(tmp_path: Path) -> None:
    assert sorted(texts_of(open_files(write_csv(tmp_path / "a.csv", ROWS)))) == sorted(ROWS)
    many = [f"row {number}\nsecond line" for number in range(2 * BLOCK + 7)]
    source = open_files(write_csv(tmp_path / "b.csv", many))
    whole = list(source.documents())
    assert sorted(document.text for document in whole) == sorted(many)
    assert list(source.documents(BLOCK + 3)) == whole[BLOCK + 3 :]
    (tmp_path / "c.csv").write_bytes(b"n,text\n1,caf\xe9\n2\n3,good\n")
    found = texts_of(open_files(tmp_path / "c.csv"))
    assert [usable(text, 100)[1] for text in sorted(found, key=str)] == ["not text", "not UTF-8", ""]
    with pytest.raises(TextError, match=r"no column 'story'; expected one of n, text; set text\.column"):
        open_files(tmp_path / "a.csv", column="story")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt"])
def test_gzipped_files_give_what_they_were_packed_from(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNBRAID_CACHE", str(tmp_path / "cache"))
    plain = tmp_path / name
    {"a.jsonl": write_jsonl, "a.csv": write_csv, "a.txt": lambda path, texts: path.write_text("\n".join(texts))}[name](
        plain, ROWS
    )
    packed = tmp_path / f"{name}.GZ"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert texts_of(open_files(packed)) == texts_of(open_files(plain))
    assert open_files(packed).identity != open_files(plain).identity
    for damaged in (b"not gzip", packed.read_bytes()[:-9]):
        packed.write_bytes(damaged)
        with pytest.raises(TextError, match=r"cannot read '.*\.GZ'"):
            open_files(packed)


def test_endings_of_any_case_are_known_alone_and_in_folders(tmp_path: Path) -> None:
    (tmp_path / "UP.TXT").write_text("upper")
    write_jsonl(tmp_path / "b.JsonL", ["mixed"])
    assert sorted(map(as_text, texts_of(open_files(tmp_path)))) == ["mixed", "upper"]
    assert texts_of(open_files(tmp_path / "UP.TXT")) == [b"upper"]


def test_blank_lines_are_no_documents(tmp_path: Path) -> None:
    texts = [f"line {number}" for number in range(1500)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n\n \n" for text in texts))
    source = open_files(tmp_path)
    whole = list(source.documents())
    assert sorted(document.text for document in whole) == sorted(texts)
    assert list(source.documents(1200)) == whole[1200:]


def test_a_key_that_no_line_has_is_named_with_the_keys_found(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"content": "x", "id": 1}\n{"content": "y", "url": ""}\n')
    with pytest.raises(TextError, match=r"a\.jsonl' has no column 'text'; expected one of content, id, url; set text"):
        open_files(tmp_path)


def test_lines_nested_too_deeply_are_unusable_and_no_traceback(tmp_path: Path) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    (tmp_path / "a.jsonl").write_text(f'{{"text": "good"}}\n{{"text": {deep}}}\n{deep}\n')
    assert [text for text in texts_of(open_files(tmp_path)) if text is not None] == ["good"]


def test_a_data_set_saved_to_disk_is_read_from_its_folder_as_files_and_as_a_data_set(tmp_path: Path) -> None:
    texts = [f"row {number}" for number in range(BLOCK + 5)]
    saved = datasets.Dataset.from_dict({"text": texts, "n": list(range(len(texts)))})
    saved.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": saved, "test": saved.select(range(3))}).save_to_disk(str(tmp_path / "split"))
    source = open_files(tmp_path / "one")
    whole = list(source.documents())
    assert sorted(document.text for document in whole) == sorted(texts)
    assert list(source.documents(BLOCK)) == whole[BLOCK:]
    for settings in (
        {"source": "files", "paths": [str(tmp_path / "split")]},
        {"source": "hub", "dataset": str(tmp_path / "split")},
    ):
        assert len(texts_of(open_source(TextConfig.model_validate(settings)))) == len(texts)
        assert len(texts_of(open_source(TextConfig.model_validate(settings | {"split": "test"})))) == 3
        with pytest.raises(TextError, match=r"no split 'dev'; expected one of test, train"):
            open_source(TextConfig.model_validate(settings | {"split": "dev"}))
    with pytest.raises(TextError, match=r"no column 'story'; expected one of text, n"):
        open_files(tmp_path / "one", column="story")
