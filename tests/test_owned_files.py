"""Files a user names, and files of one's own that happen to have a name unbraid uses, are not written over."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from unbraid import formats, recipes
from unbraid.activations.cache import harvest
from unbraid.cli import main
from unbraid.config import EvaluationConfig, SAEConfig, overridden
from unbraid.errors import ActivationError, EvaluationError, FeatureError, UnbraidError
from unbraid.evaluation import synth
from unbraid.evaluation.suites import run_suites
from unbraid.feature_model.tables import Table
from unbraid.files import held, holds_nothing
from unbraid.owned_files import write_owned_json
from unbraid.sae import build
from unbraid.training.checkpoint import list_checkpoints, write_checkpoint


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(synth, "build_world", lambda *_: pytest.fail("the world was built"))


@pytest.mark.parametrize("text", ['{"results": [1, 2]}', "ten years of work", ""])
@pytest.mark.parametrize("extra", [[], ["--overwrite"]])
def test_synth_does_not_write_over_a_file_of_somebody_else(tmp_path: Path, no_training, capsys, text, extra):
    mine = tmp_path / "mine.json"
    mine.write_text(text)
    with pytest.raises(SystemExit):
        main(["synth", "--out", str(mine), *extra])
    assert "was not written by unbraid" in capsys.readouterr().err and mine.read_text() == text


def test_synth_replaces_its_own_file_only_when_told_to_and_knows_it_before_training(tmp_path, no_training, capsys):
    write_owned_json(tmp_path / "a.json", {}, synth.REPORT, error=EvaluationError)
    write_owned_json(tmp_path / "b.json", {}, "features", error=EvaluationError)
    for words, said in [
        (["a.json"], "add --overwrite"),
        (["b.json", "--overwrite"], "was not written by unbraid as a synth"),
        (["no/such.json"], "there is no folder"),
    ]:
        with pytest.raises(SystemExit):
            main(["synth", "--out", str(tmp_path / words[0]), *words[1:]])
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["synth", "--overwrite"])
    assert "beside --out" in capsys.readouterr().err
    with pytest.raises(pytest.fail.Exception, match="the world was built"):
        main(["synth", "--out", str(tmp_path / "a.json"), "--overwrite"])


def test_a_link_is_neither_followed_nor_replaced(tmp_path: Path):
    victim = tmp_path / "victim"
    write_owned_json(victim, {"x": 1}, "features", error=FeatureError)
    (tmp_path / "link.json").symlink_to(victim)
    before = victim.read_text()
    with pytest.raises(FeatureError, match="symbolic link"):
        Table(["a"], [{"a": 1}], "new").to_json(tmp_path / "link.json")
    assert victim.read_text() == before


def test_results_are_written_over_results_and_over_nothing_else(tmp_path: Path):
    path = tmp_path / "table.json"
    table = Table(["a"], [{"a": float("nan")}], "one")
    assert json.loads(table.to_json(path)) == json.loads(path.read_text()) and '"a": null' in path.read_text()
    table.to_json(path)
    path.write_text('{"a": 1}')
    with pytest.raises(FeatureError, match=r"was not written by unbraid .* move it away"):
        table.to_json(path)
    assert path.read_text() == '{"a": 1}'


@pytest.mark.parametrize("name", ["\0", "x" * 300, "file/x"])
def test_a_name_no_file_can_have_is_a_message(tmp_path: Path, name: str):
    (tmp_path / "file").write_text("")
    with pytest.raises(FeatureError):
        Table(["a"], [], "none").to_json(f"{tmp_path}/{name}")


@pytest.fixture
def sae_folder(tmp_path: Path) -> Path:
    sae = build(SAEConfig(architecture="topk", n_features=8, k=2), 4, torch.Generator().manual_seed(0))
    return formats.save(sae, tmp_path / "sae")


def geometry(folder: Path) -> None:
    config = EvaluationConfig(suites=["geometry"], controls=False, meta_steps=2)
    run_suites(folder, config)


@pytest.mark.parametrize("text", ['{"accuracy": 0.9}', "{}", '{"saes": {"a": {}}}'])
def test_an_evaluation_of_somebody_else_is_left_alone(sae_folder: Path, text: str):
    (sae_folder / "evaluation.json").write_text(text)
    with pytest.raises(EvaluationError, match=r"was not written by an evaluation; .* move it away"):
        geometry(sae_folder)
    assert (sae_folder / "evaluation.json").read_text() == text


def test_features_of_somebody_else_are_left_alone_and_ones_own_go_with_their_evaluation(sae_folder: Path):
    mine = sae_folder / "evaluation_features.safetensors"
    save_file({"x": torch.ones(3)}, mine)
    before = mine.read_bytes()
    with pytest.raises(EvaluationError, match=r"features\.safetensors' was not written by an evaluation"):
        geometry(sae_folder)
    assert mine.read_bytes() == before
    save_file({"x": torch.ones(3)}, mine, {"written_by": "unbraid eval"})
    geometry(sae_folder)
    assert not mine.exists() and (sae_folder / "evaluation.json").exists()


def test_a_file_with_the_name_of_a_lock_is_not_emptied(tmp_path: Path, sae_folder: Path):
    for place in (tmp_path / ".lock", tmp_path / ".sae.lock"):
        place.write_text("mine")
    with pytest.raises(OSError, match="not written by unbraid"), held(tmp_path):
        pass
    with pytest.raises(UnbraidError, match="not written by unbraid"):
        formats.save(formats.load(sae_folder), sae_folder)
    assert not holds_nothing(tmp_path)
    assert (tmp_path / ".lock").read_text() == (tmp_path / ".sae.lock").read_text() == "mine"


def write(folder: Path, step: int) -> Path:
    return write_checkpoint(folder, step, {"sae": {"x": torch.zeros(3)}}, {"step": step}, keep=1)


@pytest.mark.parametrize("mine", ["step_3/notes.txt", "step_3/model.safetensors", "step_3/deep/x.json", "step_3"])
def test_a_folder_called_like_a_checkpoint_is_not_deleted(tmp_path: Path, mine: str):
    (tmp_path / mine).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / mine).write_text("mine")
    write(tmp_path, 4), write(tmp_path, 5)
    assert (tmp_path / mine).read_text() == "mine"
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_3", "step_5"]


@pytest.mark.parametrize("name", ["step_4", ".step_4.partial", ".step_9.partial"])
def test_a_checkpoint_with_a_file_of_ones_own_is_not_deleted(tmp_path: Path, name: str):
    write(tmp_path, 4)
    (tmp_path / "step_4" / "notes.txt").write_text("mine")
    (tmp_path / "step_4").rename(tmp_path / name)
    write(tmp_path, 5), write(tmp_path, 6)
    assert (tmp_path / name / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "step_5").exists()


@pytest.mark.parametrize(
    "mine", ["thesis.tex", "training_00000.safetensors", "manifest.json", ".unbraid.json", "sub/x"]
)
def test_a_harvest_writes_nothing_into_a_folder_of_somebody_else(tmp_path: Path, mine: str):
    (tmp_path / mine).parent.mkdir(exist_ok=True)
    (tmp_path / mine).write_text('{"written_by": "unbraid", "kind": "run", "files": null}')
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    with pytest.raises(ActivationError, match=r"choose another --cache|harvest again into a new folder"):
        harvest(recipes.tiny(), tmp_path, torch.device("cpu"))
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_a_harvest_is_marked_and_not_written_through_links(tmp_path: Path):
    config = overridden(recipes.tiny(), {"training.tokens": 256, "training.held_out_tokens": 256})[0]
    harvest(config, tmp_path / "cache", torch.device("cpu"))
    assert json.loads((tmp_path / "cache" / ".unbraid.json").read_text())["kind"] == "activation cache"
    victim = tmp_path / "victim"
    (tmp_path / "cache" / "training_00000.safetensors").rename(victim)
    (tmp_path / "cache" / "training_00000.safetensors").symlink_to(victim)
    with pytest.raises(ActivationError, match="symbolic link"):
        harvest(config, tmp_path / "cache", torch.device("cpu"))


def test_a_harvest_begun_with_another_model_or_text_does_not_go_on(tmp_path: Path):
    config = overridden(recipes.tiny(), {"training.tokens": 256, "training.held_out_tokens": 256})[0]
    harvest(config, tmp_path, torch.device("cpu"))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    forged = manifest | {"complete": False, "model": manifest["model"] | {"weights": "another"}}
    (tmp_path / "manifest.json").write_text(json.dumps(forged))
    with pytest.raises(ActivationError, match="was begun with another model"):
        harvest(config, tmp_path, torch.device("cpu"))
