"""`unbraid bench`, at toy sizes: what is measured, what is written, what is refused; and the page made from it."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from unbraid.bench import commands
from unbraid.bench.steps import Shape, hold_l0, settings_of, stand_in_activations
from unbraid.bench.timing import Times, take_turns
from unbraid.cli import main
from unbraid.randomness import generator
from unbraid.sae import build

ROOT = Path(__file__).parents[2]
TOY = ["--rounds", "2", "--steps", "1", "--device", "cpu"]


def test_a_step_of_each_architecture_is_timed_beside_a_bare_product(tmp_path, capsys):
    out = tmp_path / "step.json"
    shape = ["--shapes", "16x64x32", "--k", "4", "--decorrelation", "none", "best"]
    main(["bench", "step", *shape, "--architectures", "topk", "jumprelu", *TOY, "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["written_by"] == "unbraid bench result" and found["command"].startswith("unbraid bench step --shapes")
    assert [(row["what"], row["penalty"]) for row in found["rows"]] == [
        ("product", "none"),
        *((name, penalty) for name in ("topk", "jumprelu") for penalty in ("none", "best")),
    ]
    for row in found["rows"]:
        assert row["shape"] == {"d_in": 16, "n_features": 64, "batch": 32, "k": 4}
        assert row["turns"] == 2 and row["wall_ms"] >= 0 and row["cpu_ms"] >= 0
    assert found["rows"][0]["products"] == 1.0
    assert {"processor", "cores", "threads", "torch", "load", "date"} <= found["machine"].keys()
    said = capsys.readouterr().out
    assert "topk + best" in said and "rows/s" in said


@pytest.mark.parametrize("kind", ["harvest", "pipeline"])
def test_a_recipe_is_timed_in_tokens(kind, tmp_path):
    out = tmp_path / "it.json"
    main(["bench", kind, "tiny", "--rounds", "1", "--device", "cpu", "--out", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert row["what"] == "tiny" and row["tokens_per_second"] > 0
    assert row["saes"] == (4 if kind == "pipeline" else 0)


def test_a_world_is_timed_in_samples_alone_and_learnt_from(tmp_path):
    out = tmp_path / "it.json"
    main(["bench", "synth", "unit", "--batch", "32", *TOY, "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [row["what"] for row in rows] == ["samples", "batch_topk"]
    assert all(row["samples_per_second"] > 0 for row in rows)


@pytest.mark.parametrize(
    "words, said",
    [
        (["step", "tiny"], "bench step does not read what follows it"),
        (["harvest", "--shapes", "4x8x8"], "bench harvest does not read --shapes"),
        (["pipeline", "--k", "3"], "bench pipeline does not read --k"),
        (["step", "--shapes", "4x8"], "'4x8' is not D x N x B"),
        (["step", "--architectures", "topp"], "architecture 'topp' is unknown"),
        (["step", "--decorrelation", "much"], "decorrelation 'much' is unknown; expected none, paper, apart, best"),
        (["step", "--shapes", "4x8x8", "--k", "8"], "k = 8 of 8 features"),
        (["step", "--rounds", "0"], "--rounds = 0; expected at least 1"),
        (["harvest", "tyni"], "no recipe 'tyni'"),
        (["synth", "big"], "synth takes one world; found 'big'"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_message(words, said, capsys):
    with pytest.raises(SystemExit):
        main(["bench", *words])
    assert said in capsys.readouterr().err


def test_a_file_that_is_no_bench_result_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(SystemExit):
        main(["bench", "step", "--out", str(tmp_path / "mine.json")])
    assert "was not written by unbraid as a bench result" in capsys.readouterr().err


def test_the_number_of_threads_is_put_back():
    before = torch.get_num_threads()
    options = commands.Bench("synth", ("unit",), rounds=1, steps=1, batch=16, threads=before + 1, device="cpu")
    assert commands.measure(options, "")["machine"]["threads"] == before + 1
    assert torch.get_num_threads() == before


def test_contenders_take_turns():
    order = []
    found = take_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, "cpu")
    assert order[4:] == ["a", "b"] * 3 and len(found["a"].wall) == 3


def test_times_are_medians_with_quartiles():
    report = Times(wall=[1.0, 2.0, 9.0], cpu=[1.0, 1.0, 4.0]).report()
    assert (report["wall_ms"], report["wall_ms_quartiles"], report["cpu_ms"]) == (2000.0, [1500.0, 5500.0], 1000.0)


@pytest.mark.parametrize("architecture", ["jumprelu", "relu", "gated"])
def test_a_thresholded_sae_is_timed_at_the_l0_asked_for(architecture):
    sae = build(settings_of(architecture, 256, 8, "none").sae, 16, generator(0, "init"))
    (x_BD,) = stand_in_activations(16, 256, 1, "cpu")
    hold_l0(sae, x_BD, 8)
    assert float((sae.preactivations(x_BD) > 0).float().sum(1).mean()) == pytest.approx(8, abs=0.1)


def test_a_shape_is_written_as_it_is_read():
    assert Shape.parse("16X64x32") == Shape(16, 64, 32)


def test_the_page_is_made_of_the_committed_measurements(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "docs"), *sys.path])
    monkeypatch.setattr(sys, "argv", ["docs/benchmarks.py", "--check"])
    runpy.run_path(str(ROOT / "docs" / "benchmarks.py"), run_name="__main__")


@pytest.mark.slow
def test_every_contender_of_ours_takes_steps_in_the_step_benchmark(tmp_path):
    """Without peers, which need an environment of their own."""
    command = [sys.executable, "benchmarks/step.py", "--shapes", "tiny", "--architectures", "topk", "--rounds", "1"]
    command += ["--steps", "1", "--warmup", "1", "--out", str(tmp_path / "step.json"), "--peers-python", "none"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    (cell,) = json.loads((tmp_path / "step.json").read_text()).values()
    assert {"unbraid", "unbraid, dense", "unbraid, 1/16 dead"} <= set(cell["results"])
