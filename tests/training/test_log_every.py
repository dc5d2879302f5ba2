"""What is measured does not depend on how often it is logged, and what was not measured is null."""

import json
from pathlib import Path

import pytest
import torch
from fake_source import FakeSource
from sae_settings import sae_settings

from unbraid.config import BufferConfig, ModelConfig, OptimiserConfig, RunConfig, TrainingConfig
from unbraid.training.loop import train_saes
from unbraid.training.run_folder import RunFolder

STEPS = 22
SETTINGS = {
    "plain": {},
    "interval": {"interval": 4},
    "window": {"window": 4},
    "window, interval": {"window": 3, "interval": 2, "refresh": 5},
    "window, few supported": {"window": 4, "min_support": 3, "measure": "pearson"},
    "running threshold": {"threshold": "running"},
    "running threshold, interval": {"threshold": "running", "interval": 3},
    "running threshold, blocks": {"threshold": "running", "path": "blocks"},
    "decoder": {"space": "decoder", "fraction": 0.05, "scan_rows": 4},
    "decoder, interval": {"space": "decoder", "fraction": 0.05, "scan_rows": 16, "interval": 3, "refresh": 4},
    "decoder, running": {"space": "decoder", "fraction": 0.05, "scan_rows": 16, "threshold": "running"},
    "rarer": {"space": "decoder", "fraction": 0.05, "scan_rows": 16, "push": "rarer"},
    "co-active": {"space": "co-active", "fraction": 0.05},
    "co-active, window": {"space": "co-active", "fraction": 0.05, "window": 3, "push": "rarer", "interval": 2},
    "random pairs": {"method": "random_pairs", "window": 3},
    "static groups": {"method": "static_groups", "groups": 4, "threshold": "running", "interval": 3},
    "orthogonal": {"method": "orthogonal", "chunk": 8, "interval": 3},
    "global": {"method": "global", "interval": 3},
    "none": {"method": "none"},
}


class Silent:
    def filling(self, rows, capacity):
        pass

    def step(self, step, record):
        pass


def logged(folder: Path, log_every: int, decorrelation: dict, architecture: str) -> dict[int, dict]:
    """The lines of metrics.jsonl by step, of a penalised SAE, one whose penalty warms up, and a twin."""
    config = RunConfig(
        model=ModelConfig(sites=["resid_post.0"], batch_contexts=4),
        buffer=BufferConfig(contexts=32),
        sae=sae_settings(architecture, n_features=32, dead_after_tokens=100_000, lambda1=0.02, k=4),
        optimiser=OptimiserConfig(lr=1e-2, warmup_steps=4),
        training=TrainingConfig(tokens=STEPS * 32, batch_tokens=32, log_every=log_every, checkpoint_every=0),
        variants={
            "penalised": {f"decorrelation.{name}": value for name, value in decorrelation.items()},
            "late": {f"decorrelation.{name}": value for name, value in decorrelation.items()}
            | ({} if decorrelation == {"method": "none"} else {"optimiser.decorrelation_warmup_steps": 30}),
            "twin": {f"decorrelation.{name}": value for name, value in decorrelation.items()}
            | ({} if decorrelation == {"method": "none"} else {"decorrelation.lambda2": 0}),
        },
    )
    folder = RunFolder.create(folder, config)
    train_saes(folder, config, FakeSource(400, d_model=16), torch.device("cpu"), Silent())
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    return {line["step"]: line["saes"] for line in lines}


CASES = [(name, "topk") for name in SETTINGS] + [(name, "relu") for name in SETTINGS if "window" in name]


@pytest.mark.parametrize(("name", "architecture"), CASES)
def test_common_steps_log_the_same_bits_whatever_log_every_is(tmp_path, name, architecture):
    often = logged(tmp_path / "often", 1, SETTINGS[name], architecture)
    seldom = logged(tmp_path / "seldom", 20, SETTINGS[name], architecture)
    assert len(often) == STEPS and list(seldom) == [1, 20, STEPS]
    assert seldom == {step: often[step] for step in seldom}


def test_a_step_between_two_penalties_logs_null_and_never_zero(tmp_path):
    lines = logged(tmp_path / "run", 10, {"interval": 4}, "topk")
    measured = ("penalty", "tau", "correlation_mean", "correlation_std", "correlation_top", "pairs")
    for step, saes in lines.items():
        for record in saes.values():
            acts = (step - 1) % 4 == 0
            assert record["decorrelation"]["penalised"] == acts
            assert all((record[name] is not None) == acts for name in measured)


@pytest.mark.parametrize("settings", [{"window": 22}, {"space": "decoder", "scan_rows": 3, "interval": 2}])
def test_a_state_that_is_not_full_yet_logs_null(tmp_path, settings):
    for record in logged(tmp_path / "run", 20, settings, "topk")[20].values():
        assert record["decorrelation"]["path"] == "filling"
        numbers = {k: v for k, v in record["decorrelation"].items() if k not in ("path", "co_activations")}
        assert set(numbers.values()) <= {None, 0} and numbers["tau"] is None and numbers["n_live"] is None
        assert record["penalty"] is record["correlation_top"] is record["tau"] is None


@pytest.mark.parametrize("method", ["none", "global", "orthogonal"])
def test_a_method_without_a_threshold_logs_null_for_it(tmp_path, method):
    for record in logged(tmp_path / "run", 20, {"method": method}, "topk")[20].values():
        assert record["tau"] is record["correlation_top"] is record["pairs"] is None
        assert (record["correlation_mean"] is None) == (method != "global")
