"""JSON from elsewhere: whatever is wrong with a file ends in one message that names it."""

import os
from pathlib import Path

import pytest

from unbraid.errors import CheckpointError, FormatError
from unbraid.json_files import is_count, is_number, parse_json, read_json_object


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[" * 200_000, "nested too deeply"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
        ('{"d_in":' + "9" * 5000 + "}", "is not JSON"),
        ("{}".encode("utf-16"), "cannot read"),
        ("\ufeff{}", "is not JSON"),
        ("", "is not JSON"),
        ("[]", "holds list"),
        ("null", "holds NoneType"),
        ('{"a": "x\\u0000y"}', "NUL"),
        ('{"\\ud800": 1}', "surrogate"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_line(content, problem, tmp_path: Path):
    path = tmp_path / "cfg.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FormatError, match=problem) as raised:
        read_json_object(path, FormatError)
    assert str(path) in str(raised.value)
    assert len(str(raised.value)) < 600


def test_a_pipe_a_folder_and_a_missing_file_are_never_opened(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "missing", "\0", "."):
        with pytest.raises(CheckpointError, match="expected a state"):
            read_json_object(tmp_path / name, CheckpointError, "a state")


def test_text_that_only_mentions_escapes_is_kept():
    assert parse_json(r'["\\u0000", "\ud83d\ude00"]', ValueError) == ["\\u0000", "\U0001f600"]


def test_numbers_are_finite_and_fit_and_are_no_booleans():
    assert [is_number(value) for value in (1, 0.5, True, float("nan"), float("inf"), 10**400, "1")] == [
        *(True, True),
        *[False] * 5,
    ]
    assert [is_count(value, 1) for value in (1, 2**62, 0, -1, 1.0, True, 10**30)] == [True, True, *[False] * 5]
