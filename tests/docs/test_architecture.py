"""What docs/architecture.md says of the code is so: its names exist, its walk is short, its example trains."""

import importlib
import io
import json
import re
import textwrap
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from rich.console import Console

import unbraid
from unbraid import cli
from unbraid.config import EvaluationConfig
from unbraid.config.measuring import SUITES
from unbraid.errors import ConfigError
from unbraid.evaluation.suite import Suite, per_dictionary, register
from unbraid.evaluation.suites import run_suites
from unbraid.formats import save
from unbraid.randomness import generator
from unbraid.sae import ARCHITECTURES, SAE
from unbraid.sae.build import build

PAGE = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text(encoding="utf-8")
NAMES = sorted(set(re.findall(r"`(unbraid\.[\w.]+(?::\w+)?)`", PAGE)))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_on_the_page_is_one_of_the_code(name: str):
    module, _, thing = name.partition(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError:
        parent, _, thing = module.rpartition(".")
        found = importlib.import_module(parent)
    assert not thing or hasattr(found, thing)


def test_a_batch_goes_from_text_to_gradient_in_ten_steps():
    walk = PAGE.split("## One batch")[1].split("## To add")[0]
    assert [int(step) for step in re.findall(r"^\| (\d+) \|", walk, re.MULTILINE)] == list(range(1, 11))


@pytest.mark.parametrize("file", sorted(set(re.findall(r"`(examples/[\w.]+)`", PAGE))))
def test_an_example_on_the_page_exists(file: str):
    assert (Path(__file__).parents[2] / file).is_file()


def test_the_architecture_of_the_page_trains_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    code = PAGE.split("`mine.py`:\n\n")[1].split("\nSettings, help")[0]
    line = re.findall(r"`unbraid (train [^`]*--plugin mine\.py[^`]*)`", PAGE)
    assert len(line) == 1
    (tmp_path / "mine.py").write_text(textwrap.dedent(code))
    try:
        cli.main([*line[0].split(), "--training.tokens", "768", "--training.held-out-tokens", "256", "--run", "run"])
        assert unbraid.load(tmp_path / "run" / "saes" / "resid_post.0_twin").architecture == "gentle"
    finally:
        cast(dict, ARCHITECTURES).pop("gentle", None)


def test_the_metric_of_the_page_is_measured_on_every_sae_and_control(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = PAGE.split("`entropy.py`:\n\n")[1].split("\n`unbraid eval")[0]
    (line,) = re.findall(r"`unbraid (eval [^`]*--plugin entropy\.py[^`]*)`", PAGE)
    (tmp_path / "entropy.py").write_text(textwrap.dedent(code))
    recipe = ["tiny", "--training.tokens", "768", "--training.held-out-tokens", "256", "--run", "runs/tiny"]
    try:
        cli.main(["train", *recipe])
        cli.main(["eval", "runs/tiny", "--suite", "geometry", "--meta-steps", "2", "--controls", "false"])
        cli.main([*line.split(), "--tokens", "256", "--control-tokens", "0"])
        report = json.loads((tmp_path / "runs/tiny/evaluation.json").read_text())
        rows = {**report["saes"], **report["controls"]}
        shares = {name: row["entropy"]["share"] for name, row in rows.items() if "entropy" in row}
        assert {*report["saes"], "resid_post.0: random", "resid_post.1: pca"} <= set(shares)
        assert all(0.3 < share <= 1 for share in shares.values())
        assert "entropy: how evenly features share the codes, 1 for all alike" in capsys.readouterr().out
    finally:
        SUITES.forget("entropy")
    assert "geometry" in report["settings"]
    cli.main(["eval", "runs/tiny", "--suite", "geometry", "--meta-steps", "3", "--controls", "false"])
    kept = json.loads((tmp_path / "runs/tiny/evaluation.json").read_text())["saes"]
    assert all(kept[name]["entropy"]["share"] == shares[name] for name in kept), "without the plugin"


@pytest.mark.parametrize(
    ("name", "reads", "problem"),
    [
        ("core", "weights", "a suite of unbraid's"),
        ("a,b", "weights", "expected a word of its own"),
        ("site", "weights", "expected a word of its own"),
        ("mine", "everything", "expected weights, prompts, text or codes"),
    ],
)
def test_a_suite_that_could_not_be_told_from_another_is_refused(name, reads, problem):
    with pytest.raises(ConfigError, match=problem):
        register(type("Mine", (Suite,), {"name": name, "caption": "", "columns": {}, "reads": reads}))


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"a": torch.tensor(0.5), "b": np.float32(2), "c": None, "a_interval": (np.float64(0.1), 0.9)}, None),
        ({"a": torch.ones(3)}, "expected numbers by name"),
        ({"a": "much"}, "expected numbers by name"),
        (0.5, "expected numbers by name"),
        (ValueError("no such thing"), "failed: ValueError: no such thing"),
    ],
)
def test_what_a_plugin_gives_is_numbers_or_the_others_results_stay(given, problem, tmp_path: Path):
    def measured(one, evaluation):
        if isinstance(given, Exception):
            raise given
        return given

    save(small_sae(), tmp_path / "sae")
    per_dictionary("mine", "something", {"a": "a", "missing": "missing"})(measured)
    try:
        settings = EvaluationConfig(suites=["geometry", "mine"], meta_steps=2, controls=False)
        shown = io.StringIO()
        report = run_suites(tmp_path / "sae", settings, console=Console(file=shown, width=100))
    finally:
        SUITES.forget("mine")
    assert report["saes"]["sae"]["geometry"]
    if problem is None:
        assert report["saes"]["sae"]["mine"] == {"a": 0.5, "b": 2.0, "c": None, "a_interval": [0.1, 0.9]}
        assert "0.500 ±.400" in shown.getvalue()
    else:
        assert problem in report["skipped"]["mine"] and "mine" not in report["saes"]["sae"]


def small_sae() -> SAE:
    return build(unbraid.SAEConfig(architecture="topk", n_features=32, k=2), 8, generator(0, "init"))
