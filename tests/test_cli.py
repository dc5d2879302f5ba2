"""What a user sees: every mistake ends in one message, a non-zero exit code and no traceback."""

import errno
import json
import os
import subprocess
import sys

import pytest

from unbraid import recipes
from unbraid.cli import COMMANDS, main


def fails(capsys, *arguments: str) -> str:
    """Run a command that must fail; what it said."""
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code not in (0, None)
    captured = capsys.readouterr()
    said = captured.err + captured.out
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian", "tiny"], "did you mean 'train'?"),
        (["train"], "recipes: tiny, demo, transcoder-demo, smollm2, gemma-3-270m, gemma-2-2b"),
        (["train", "dmo"], "did you mean 'demo'?"),
        (["train", "missing.json"], "cannot read 'missing.json'"),
        (["train", "tiny", "--sae.nfeatures", "4"], "--sae.n-features"),
        (["train", "tiny", "--sae.n-features", "many"], "many"),
        (["train", "tiny", "--optimiser.lr", "-1"], "greater than 0"),
        (["train", "tiny", "--model.sites", "resid.4"], "expected KIND.LAYER"),
        (["train", "tiny", "--model.sites", "resid_post.9"], "resid_post.9"),
        (["train", "tiny", "--training.tokens", "0"], "gives 0 steps"),
        (["train", "tiny", "--training.device", "abacus"], "expected auto, cpu or cuda"),
        (["train", "tiny", "--variants", "{"], "is not JSON"),
        (["train", "tiny", "--variants", '{"a": {"sae.kk": 1}}'], "did you mean"),
        (["train", "tiny", "--variants", '{"a/b": {}}'], "cannot be part of a folder name"),
        (["train", "tiny", "--buffer.contexts", "4"], "buffer.contexts"),
        (["train", "tiny", "--text.source", "files"], "text.paths"),
        (["train", "tiny", "--model.name", "no/such-model"], "no/such-model"),
        (["train", "tiny", "--model.name", "random:abacus"], "abacus"),
        (["resume", "nowhere"], "holds no run"),
        (["figure", "nowhere"], "nowhere"),
        (["harvest", "tiny"], "--cache DIR"),
        (["train", "tiny", "--seed", "-1"], "greater than"),
        (["eval", "nowhere"], "there is no 'nowhere'; expected a run folder"),
        (["eval", "nowhere", "--suite", "core,corr"], "there is no suite 'corr'; expected some of core,correlation,"),
        (["eval", "nowhere", "--tokens", "0"], "greater than"),
        (["eval", ".", "--world", "huge"], "no world named 'huge'; expected one of unit"),
        (["doctor", "tiny"], "doctor takes nothing; found 'tiny'"),
        (["presets", "best"], "presets takes nothing; found 'best'"),
        (["search", "gemma", "--limit", "0"], "--limit = 0; expected at least 1"),
        (["dashboard", "nowhere", "--tokens", "-5"], "tokens = -5; expected at least 1"),
        (["compare", "nowhere"], "'nowhere' holds no run"),
        (["compare", "nowhere", "elsewhere"], "there is no 'nowhere'"),
        (["synth", "huge"], "no world named 'huge'; expected one of unit"),
    ],
)
def test_a_mistake_is_answered_in_one_message(capsys, tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    assert expected in fails(capsys, *arguments)


def test_an_existing_run_folder_is_refused_and_left_alone(capsys, tmp_path):
    (tmp_path / "precious.txt").write_text("keep me")
    assert "exists already" in fails(capsys, "train", "tiny", "--run", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_a_run_folder_below_a_file_is_refused(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write the run folder" in fails(capsys, "train", "tiny", "--run", str(tmp_path / "file" / "run"))


def test_an_empty_text_file_is_named(capsys, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    said = fails(
        capsys,
        "train",
        "tiny",
        "--run",
        str(tmp_path / "run"),
        "--text.source",
        "files",
        "--text.paths",
        str(tmp_path / "empty.txt"),
    )
    assert "text" in said and "expected" in said


def test_too_little_text_says_how_many_steps_it_yields(capsys, tmp_path):
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text(f"the cat number {number} sat on the mat and looked at the dog. " * 20)
    said = fails(
        capsys, "train", "tiny", "--run", str(tmp_path / "run"), "--text.source", "files", "--text.paths", str(tmp_path)
    )
    assert "the text is too small: it gives" in said and "steps of training.batch_tokens = 256" in said


def test_debug_shows_the_traceback(tmp_path):
    from unbraid.errors import TrainingError

    with pytest.raises(TrainingError):
        main(["resume", str(tmp_path), "--debug"])


def test_help_lists_every_command_and_every_setting(capsys):
    main(["--help"])
    said = capsys.readouterr().out
    assert all(f"unbraid {name}" in said for name in COMMANDS)
    with pytest.raises(SystemExit) as stopped:
        main(["train", "tiny", "--help"])
    assert stopped.value.code == 0
    assert "--decorrelation.fraction" in capsys.readouterr().out


def test_python_dash_m_is_the_same_program():
    done = subprocess.run([sys.executable, "-m", "unbraid", "resume", "nowhere"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("unbraid: 'nowhere' holds no run")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_a_recipe_written_as_json_reads_back_as_itself(name, tmp_path):
    from unbraid.config import load_config

    config = recipes.RECIPES[name]()
    (tmp_path / "config.json").write_text(json.dumps(config.model_dump(mode="json")))
    assert load_config(tmp_path / "config.json") == config
    assert config.steps > 0


def test_the_gemma_recipe_holds_the_papers_constants():
    config = recipes.gemma_2_2b()
    assert config.model.sites == ["resid_post.5", "resid_post.12", "resid_post.19"]
    assert (config.model.name, config.text.dataset) == ("google/gemma-2-2b", "monology/pile-uncopyrighted")
    assert (config.optimiser.lr, config.optimiser.warmup_steps, config.sae.lambda1) == (3e-4, 1000, 0.04)
    assert (config.training.batch_tokens, config.model.batch_contexts, config.text.context_length) == (2048, 24, 128)
    assert (config.buffer.contexts, config.decorrelation.fraction) == (2048, 1e-3)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_refuses_is_answered_in_one_message(capsys, monkeypatch, number):
    def doctor(arguments):
        raise OSError(number, os.strerror(number), "summary.json")

    monkeypatch.setitem(COMMANDS, "doctor", doctor)
    assert f"{os.strerror(number)}: 'summary.json'; free some space" in fails(capsys, "doctor")


@pytest.mark.parametrize("words", [["--text.bos", "none"], ["--model", "x", "--site", "resid_post.1"]])
def test_an_evaluation_of_a_run_takes_nothing_that_the_run_says_itself(capsys, tmp_path, words):
    (tmp_path / "saes" / "one").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps(recipes.tiny().model_dump(mode="json")))
    for folder in (tmp_path, tmp_path / "saes" / "one"):
        assert "belongs to a run, whose own settings say which" in fails(capsys, "eval", str(folder), *words)
