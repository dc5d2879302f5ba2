"""Results of several evaluations of the same weights come together in one file, also when they end at once."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from sae_samples import make_sae
from safetensors.torch import load_file

from unbraid.config.measuring import BUILT_IN
from unbraid.errors import EvaluationError
from unbraid.evaluation.evaluation_file import EvaluationFile, read_evaluation
from unbraid.evaluation.subjects import EvaluatedSAE


def test_two_evaluations_at_once_both_end_up_in_the_file(tmp_path: Path):
    sae = make_sae("topk")
    subjects = [EvaluatedSAE("x", (0,), sae, features={"density": torch.ones(3)})]
    one, two = EvaluationFile(tmp_path, subjects), EvaluationFile(tmp_path, subjects)
    other = [EvaluatedSAE("x", (0,), sae, features={"norm": torch.zeros(3)})]
    for file, suite, whose in ((one, "core", subjects), (two, "probing", other)):
        report = {"settings": {suite: {}}, "saes": {"x": {"site": None, suite: {"a": 1}}}}
        file.write(report | {"controls": {}, "skipped": {}, "seconds": {}}, whose)
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert set(found["saes"]["x"]) == {"site", "core", "probing"} and set(found["settings"]) == {"core", "probing"}
    assert set(load_file(tmp_path / "evaluation_features.safetensors")) == {"x.density", "x.norm"}


def test_evaluations_of_many_threads_lose_nothing(tmp_path: Path):
    subjects = [EvaluatedSAE("x", (0,), make_sae("topk"), features={"density": torch.ones(3)})]

    def write(suite: str) -> None:
        report = {"settings": {suite: {}}, "saes": {"x": {"site": None, suite: {}}}, "controls": {}}
        EvaluationFile(tmp_path, subjects).write(report | {"skipped": {}, "seconds": {}}, subjects)

    with ThreadPoolExecutor() as threads:
        list(threads.map(write, BUILT_IN))
    assert set(json.loads((tmp_path / "evaluation.json").read_text())["settings"]) == set(BUILT_IN)


def test_a_file_written_while_another_evaluation_starts_is_not_taken_for_a_strangers(tmp_path: Path, monkeypatch):
    def looks_too_early(path: Path) -> dict:
        found = read_evaluation(path)
        path.write_text('{"saes": {}, "weights": "0"}')
        return found

    monkeypatch.setattr("unbraid.evaluation.evaluation_file.read_evaluation", looks_too_early)
    EvaluationFile(tmp_path, [EvaluatedSAE("x", (0,), make_sae("topk"))])


@pytest.mark.parametrize("text", ["{", "[1]", '{"saes": [1]}', '{"saes": {"x": 1}}', "[" * 100_000])
def test_a_file_that_is_no_evaluation_is_refused_before_anything_is_measured(tmp_path: Path, text: str):
    (tmp_path / "evaluation.json").write_text(text)
    with pytest.raises(EvaluationError, match=r"evaluation\.json.*move it away"):
        read_evaluation(tmp_path / "evaluation.json")
    with pytest.raises(EvaluationError, match="move it away"):
        EvaluationFile(tmp_path, [EvaluatedSAE("x", (0,), make_sae("topk"))])
