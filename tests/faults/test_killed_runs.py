"""Killed at any instant and resumed, a run ends with the bytes of one never interrupted."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unbraid import recipes
from unbraid.config import RunConfig, validated
from unbraid.training.checkpoint import list_checkpoints

COMMAND = [sys.executable, "-m", "unbraid"]


def final_bytes(run: Path) -> dict[str, bytes]:
    """Everything a run promises to repeat: weights, metrics, figures and settings, but no wall-clock figure."""
    last = list_checkpoints(run / "checkpoints")[-1].name
    patterns = ("saes/*/*", "metrics.jsonl", "figures/*", "config.json", f"checkpoints/{last}/sae-*.safetensors")
    return {str(path.relative_to(run)): path.read_bytes() for pattern in patterns for path in sorted(run.glob(pattern))}


def start(run: Path, settings: Path) -> subprocess.Popen:
    words = ["resume", str(run)] if (run / "config.json").exists() else ["train", str(settings), "--run", str(run)]
    return subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(run: Path, settings: Path) -> float:
    began = time.monotonic()
    process = start(run, settings)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    return time.monotonic() - began


def kill_until_finished(run: Path, settings: Path, chance: random.Random, seconds: float, most: int) -> int:
    """Start, kill after a random time, start again, until the run is complete; the number of kills."""
    kills = 0
    while kills < most:
        process = start(run, settings)
        try:
            said, _ = process.communicate(timeout=chance.uniform(0, seconds))
            assert process.returncode == 0, said
            return kills
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            if not (run / "config.json").exists():
                shutil.rmtree(run, ignore_errors=True)
    finish(run, settings)
    return kills


def write_settings(path: Path, config: RunConfig, **training: object) -> Path:
    data = config.model_dump(mode="json")
    data["training"] |= {"checkpoint_every": 4, "threads": 1} | training
    path.write_text(json.dumps(validated(RunConfig, data, "test").model_dump(mode="json")))
    return path


def assert_killed_runs_end_equal(folder: Path, settings: Path, kills: int, most_per_run: int) -> None:
    seconds = finish(folder / "whole", settings)
    expected = final_bytes(folder / "whole")
    assert any("sae_weights" in name for name in expected) and any("figure1.png" in name for name in expected)
    chance, done, number = random.Random(0), 0, 0
    while done < kills:
        run = folder / f"killed-{number}"
        done += kill_until_finished(run, settings, chance, seconds, min(most_per_run, kills - done))
        found = final_bytes(run)
        assert found.keys() == expected.keys()
        assert [name for name in expected if found[name] != expected[name]] == []
        shutil.rmtree(run)
        number += 1


def test_kill_at_random_instants(tmp_path):
    """SIGKILL at any instant, checkpoint writes included | nothing, then `unbraid resume` goes on | final weights,
    metrics and figures are those of an uninterrupted run, byte for byte"""
    settings = write_settings(tmp_path / "settings.json", recipes.tiny(), tokens=10_240)
    assert_killed_runs_end_equal(tmp_path, settings, kills=4, most_per_run=4)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kill_at_fifty_random_instants_of_a_smollm2_run(tmp_path):
    """SIGKILL at 50 random instants of a run on SmolLM2-135M | as above | as above"""
    config = recipes.demo()
    data = config.model_dump(mode="json")
    data["model"]["sites"] = ["resid_post.0", "resid_post.1"]
    data["buffer"]["contexts"] = 48
    data["sae"] |= {"n_features": 256, "dead_after_tokens": 5_000}
    settings = write_settings(
        tmp_path / "settings.json",
        validated(RunConfig, data, "test"),
        tokens=16_384,
        batch_tokens=256,
        held_out_tokens=1_024,
    )
    assert_killed_runs_end_equal(tmp_path, settings, kills=50, most_per_run=10)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_polite_signals(tmp_path, number):
    """SIGTERM or Ctrl-C | "stopped after step n; a checkpoint was written; go on with `unbraid resume`", exit code
    128 + signal | everything up to the last finished step"""
    settings = write_settings(tmp_path / "settings.json", recipes.tiny(), tokens=25_600, checkpoint_every=0)
    finish(tmp_path / "whole", settings)
    process = start(tmp_path / "cut", settings)
    metrics = tmp_path / "cut" / "metrics.jsonl"
    while not metrics.exists() or metrics.stat().st_size == 0:
        assert process.poll() is None
    process.send_signal(number)
    said, _ = process.communicate()
    assert process.returncode == 128 + number, said
    assert "a checkpoint was written; go on with `unbraid resume" in said and "Traceback" not in said
    assert len(list((tmp_path / "cut" / "checkpoints").glob("step_*"))) == 1
    finish(tmp_path / "cut", settings)
    assert final_bytes(tmp_path / "cut") == final_bytes(tmp_path / "whole")
