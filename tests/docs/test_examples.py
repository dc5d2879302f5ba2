"""The examples in which something of one's own is handed in run and give what they promise."""

import doctest
import json
import runpy
from pathlib import Path

import unbraid

EXAMPLES = Path(__file__).parents[2] / "examples"


def main_of(name: str):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def last_line(run) -> dict:
    return json.loads(run.folder.metrics.read_text().splitlines()[-1])["saes"]


def test_saes_on_a_plain_tensor_explain_it_and_the_wide_one_more():
    r2 = main_of("plain_tensor")()
    assert 0.3 < r2["narrow"] < r2["wide"] < 1


def test_patches_of_a_vision_transformer_are_learnt(tmp_path):
    run = main_of("vision_patches")(tmp_path / "run")
    assert list(run.saes) == ["patches"]
    assert run.summary["saes"]["patches"]["r2"] > 0.2 and run.summary["saes"]["patches"]["l0"] == 8
    assert run.summary["steps"] == {"planned": 40, "executed": 40}


def test_residues_of_a_protein_model_are_learnt_beside_a_twin(tmp_path):
    run = main_of("protein_sequences")(tmp_path / "run")
    assert sorted(run.saes) == ["residues_decorrelated", "residues_twin"]
    assert all(sae["r2"] > 0.2 for sae in run.summary["saes"].values())


def test_a_penalty_of_ones_own_changes_what_is_learnt_and_is_logged(tmp_path):
    run = main_of("own_penalty")(tmp_path / "run")
    line = last_line(run)
    with_it, without = line["resid_post.1_decorrelated"], line["resid_post.1_twin"]
    assert with_it["decorrelation"]["largest_cosine"] < without["decorrelation"]["largest_cosine"]
    assert with_it["penalty"] < without["penalty"]


def test_the_example_of_fit_runs():
    runner = doctest.DocTestRunner()
    for example in doctest.DocTestFinder().find(unbraid.fit, "fit"):
        runner.run(example)
    assert runner.summarize(verbose=False) == (0, 5)
