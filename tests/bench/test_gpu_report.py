"""`make gpu-report` runs to its end on a CPU at toy sizes; a part that fails or does not fit is recorded."""

import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    place = ROOT / "benchmarks" / "gpu_report.py"
    spec = importlib.util.spec_from_file_location("gpu_report", place)
    assert spec and spec.loader
    module = sys.modules["gpu_report"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def asked(out: Path, **changes) -> Namespace:
    return Namespace(**{"out": out, "device": "cpu", "toy": True, "minutes": 9.0, "parts": None} | changes)


def in_this_process(script):
    """Runs the parts that measure without starting a process for each, and answers for the others."""

    def run(command: list[str], seconds: float) -> tuple[int, str]:
        if "pytest" in command or str(ROOT / "benchmarks" / "step.py") in command:
            return 0, "5 passed"
        script.main(command[2:])
        return 0, ""

    return run


def test_every_part_runs_to_its_end_at_toy_sizes(script, tmp_path):
    report = script.report_on(asked(tmp_path), in_this_process(script))
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert list(report["parts"]) == [part.name for part in script.PARTS]
    for part in script.PARTS:
        found = report["parts"][part.name]
        if part.measure is not None:
            assert found["state"] == "done" and found["rows"]
            assert not [row["error"] for row in found["rows"] if "error" in row]
    widths = {
        row["shape"]["n_features"]
        for name in report["parts"]
        for row in report["parts"][name].get("rows", [])
        if "shape" in row
    }
    assert widths == set(script.TOY.widths)
    assert {row["what"] for row in report["parts"]["steps 262k"]["rows"]} == {"product", *script.ARCHITECTURES}
    assert {row["penalty"] for row in report["parts"]["decorrelation"]["rows"]} == {"none", "best", "paper"}
    page = (tmp_path / "report.md").read_text()
    assert "| steps 65k | done |" in page and "5 passed" in page and "samples |" in page


@pytest.mark.slow
def test_a_part_is_a_process_of_its_own(script, tmp_path):
    report = script.report_on(asked(tmp_path, parts=["bfloat16"]))
    assert report["parts"]["bfloat16"]["state"] == "done", report
    assert [row["what"] for row in report["parts"]["bfloat16"]["rows"]] == ["product", "topk", "batch_topk"]


def test_a_part_that_fails_or_hangs_is_recorded_and_the_rest_goes_on(script, tmp_path):
    ends = {"steps 16k": (1, "Traceback\nCUDA error: unspecified launch failure"), "steps 65k": (None, "step 3 of 9")}

    def run(command, seconds):
        name = command[command.index("--only") + 1] if "--only" in command else ""
        return ends.get(name, (0, ""))

    report = script.report_on(asked(tmp_path, parts=["steps 16k", "steps 65k", "bfloat16"]), run)
    states = {name: found["state"] for name, found in report["parts"].items()}
    assert states == {"steps 16k": "failed", "steps 65k": "out of time", "bfloat16": "done"}
    assert "unspecified launch failure" in (tmp_path / "report.md").read_text()


def test_rows_measured_before_the_limit_are_kept(script, tmp_path, monkeypatch):
    """The third architecture takes too long: the process ends inside it."""

    def measure(shape, architectures, *_):
        if architectures == ["matryoshka"]:
            raise SystemExit
        return [{"what": architectures[0], "wall_ms": 1.0, "wall_ms_quartiles": [1.0, 1.0]}]

    def run(command, seconds):
        with pytest.raises(SystemExit):
            script.main(command[2:])
        return None, ""

    monkeypatch.setattr(script, "measure_steps", measure)
    found = script.report_on(asked(tmp_path, parts=["steps 16k"]), run)["parts"]["steps 16k"]
    assert found["state"] == "out of time" and [row["what"] for row in found["rows"]] == ["topk", "batch_topk"]


def test_no_part_begins_when_the_time_is_up(script, tmp_path):
    report = script.report_on(asked(tmp_path, minutes=0.1), lambda *_: 1 / 0)
    assert {found["state"] for found in report["parts"].values()} == {"left out"}


def test_a_part_gets_no_more_time_than_is_left(script, tmp_path):
    limits = []
    script.report_on(asked(tmp_path, minutes=0.5), lambda command, seconds: limits.append(seconds) or (0, ""))
    assert limits and max(limits) <= 30


def test_an_architecture_that_runs_out_of_memory_leaves_the_others(script, monkeypatch):
    def measure(shape, architectures, *_):
        if architectures == ["matryoshka"]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [{"what": architectures[0]}]

    monkeypatch.setattr(script, "measure_steps", measure)
    rows = [row for found in script.steps_of_width(0)(script.TOY, torch.device("cpu")) for row in found]
    assert [row["what"] for row in rows] == list(script.ARCHITECTURES)
    assert rows[2]["error"] == "OutOfMemoryError: CUDA out of memory"
    assert "out of memory" in script.line_of(rows[2])


def test_all_limits_are_those_of_whole_parts(script):
    assert script.MINUTES * 60 <= 540
    assert all(part.seconds <= 120 for part in script.PARTS)


def test_without_a_gpu_the_full_size_is_refused(script, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        script.main([])
    assert "there is no GPU here" in capsys.readouterr().err
