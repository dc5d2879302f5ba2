"""The examples run as they stand, and do what they say inside other libraries' training loops."""

import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_plain_loop_runs_and_selects_pairs(capsys):
    names = runpy.run_path(str(EXAMPLES / "plain_pytorch.py"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 20 and lines[0].endswith(" 0 pairs")
    assert names["stats"].path == "coactive" and names["stats"].penalty > 0 and len(names["stats"].pairs) > 100


def test_the_readme_shows_the_plain_loop_in_fifteen_lines():
    text = (EXAMPLES / "plain_pytorch.py").read_text(encoding="utf-8")
    snippet = text.split("# README from here\n")[1].split("# README to here")[0]
    assert len(snippet.splitlines()) == 15
    assert snippet in (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.peers
@pytest.mark.filterwarnings("default")
def test_sae_lens_trains_with_the_penalty_in_its_loss(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    train = runpy.run_path(str(EXAMPLES / "decorrelate_in_sae_lens.py"))["train"]
    free, plain = train(0.0)
    pushed, decorrelated = train(1.0)
    assert sum(decorrelated[-10:]) < 0.9 * sum(plain[-10:])
    assert not torch.equal(free.W_enc, pushed.W_enc) and bool(torch.isfinite(pushed.W_enc).all())


@pytest.mark.peers
@pytest.mark.filterwarnings("default")
def test_dictionary_learning_trains_with_the_penalty_in_its_loss():
    train = runpy.run_path(str(EXAMPLES / "decorrelate_in_dictionary_learning.py"))["train"]
    assert sum(train(1.0)[-10:]) < 0.9 * sum(train(0.0)[-10:])
