"""What the study and the benchmarks would train can be constructed: no setting of theirs is unknown or does nothing."""

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from unbraid.config import DecorrelationConfig, RunConfig, VariantConfig

ROOT = Path(__file__).parents[2]
OURS = ("unbraid", "unbraid, dense", "unbraid, 1/16 dead")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """Imports a script with its neighbours, which are forgotten again: folders share names such as `support`."""
    before = set(sys.modules)

    def imported(folder: str, name: str) -> ModuleType:
        monkeypatch.syspath_prepend(str(ROOT / folder))
        return importlib.import_module(name)

    yield imported
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith((str(ROOT / "study"), str(ROOT / "benchmarks"))):
            del sys.modules[name]


@pytest.mark.parametrize("table", ["grid", "sweep", "budget"])
def test_trials_of_the_synthetic_tables(script, table):
    seeds, trials = script("study", "worlds").TABLES[table]
    settings = [trial.settings for seed in seeds for trial in trials(seed)]
    assert settings and all(isinstance(own, VariantConfig) for own in settings)


def test_trials_of_hybrids_and_recipes(script):
    hybrids, recipe = script("study", "hybrids"), script("study", "recipe")
    trials = hybrids.trials(20)
    for world in recipe.RARER_FLOOR:
        trials += recipe.trials(world, 40) + recipe.revivals(world, 40) + recipe.findings(world, 40)
    assert all(isinstance(trial.settings, VariantConfig) for trial in trials)


def test_saes_of_the_full_world(script):
    full = script("study", "full")
    settings = [full.variant(label, 100, 1) for label in full.FORMS]
    assert {own.sae.n_features for own in settings} == {4096}


def test_runs_on_the_real_model(script):
    real = script("study", "real")
    asked = argparse.Namespace(width=4608, tokens=819_200)
    for cell in real.PLAN[: len(real.KINDS)]:
        config = real.settings(cell, asked)
        assert set(config.variants) == set(real.METHODS)
        assert RunConfig.model_validate(config.model_dump()) == config


def test_lines_of_results_hold_what_their_trials_are_trained_with_again(script):
    trials = script("study", "trials")
    found = [line.get("trial", {}) for path in trials.RESULTS.glob("*.jsonl") for line in trials.read(path.stem)]
    kept = [trials.Trial(**trial) for trial in found if trial.get("architecture", "control") != "control"]
    assert kept and all(isinstance(trial.settings, VariantConfig) for trial in kept)


def test_contenders_of_the_pipeline(script):
    pipeline = script("benchmarks", "pipeline")
    ours = [name for name, case in pipeline.CASES.items() if "layers" not in case]
    for architecture in ("relu", "topk"):
        for name in ours:
            config = pipeline.config_of(name, architecture, None)
            assert config.sae.architecture == architecture
            assert len(config.sites) == (1 if name.startswith("deepest") else 3)
            assert RunConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("losses", [False, True])
def test_contenders_of_the_step(script, losses):
    step, ours = script("benchmarks", "step"), script("benchmarks/peers", "unbraid_steps")
    asked = argparse.Namespace(lr=3e-4, threads=1, distinct_batches=1, losses=losses, device="cpu")
    for architecture in step.ARCHITECTURES:
        for shape in step.SHAPES:
            settings = json.loads(json.dumps(step.settings_of(architecture, shape, asked)))
            assert ours.config_of(settings).sae.architecture == architecture


def test_penalties_that_are_timed_and_judged(script):
    quality = script("benchmarks", "decorrelation_quality")
    for changes in [*quality.SELDOM.values(), {}, dict(quality.SPARING), dict(quality.SPARING_ROWS)]:
        assert isinstance(DecorrelationConfig(**changes), DecorrelationConfig)
