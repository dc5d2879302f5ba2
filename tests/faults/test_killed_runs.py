"""Killed at any instant and resumed, a run ends with the bytes of one never interrupted."""

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from unbraid import recipes
from unbraid.cli import main
from unbraid.config import RunConfig, validated
from unbraid.training.checkpoint import list_checkpoints
from unbraid.training.progress import RunProgress

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["unbraid.cli", "unbraid.run", "transformers.models.llama.modeling_llama"])
"""Each run is a process of its own, killed as a whole; only the seconds of importing are spent once."""


def final_bytes(run: Path) -> dict[str, bytes]:
    """Everything a run promises to repeat: weights, metrics, figures and settings, but no wall-clock figure."""
    last = list_checkpoints(run / "checkpoints")[-1].name
    patterns = ("saes/*/*", "metrics.jsonl", "figures/*", "config.json", f"checkpoints/{last}/sae-*.safetensors")
    files = {path.relative_to(run): path.read_bytes() for pattern in patterns for path in sorted(run.glob(pattern))}
    summary = json.loads((run / "summary.json").read_text())
    del summary["seconds"]
    for measured in summary["saes"].values():
        del measured["updates_per_second"]
    return {str(name): content for name, content in files.items()} | {"summary.json": json.dumps(summary).encode()}


def start(run: Path, settings: Path) -> ForkServerProcess:
    words = ["resume", str(run)] if (run / "config.json").exists() else ["train", str(settings), "--run", str(run)]
    process = PROCESSES.Process(target=main, args=(words,))
    process.start()
    return process


def ends_within(process: ForkServerProcess, seconds: float | None) -> bool:
    process.join(seconds)
    assert process.exitcode in (None, 0)
    return process.exitcode == 0


def finish(run: Path, settings: Path) -> float:
    began = time.monotonic()
    assert ends_within(start(run, settings), None)
    return time.monotonic() - began


def writes_a_checkpoint(run: Path) -> bool:
    return any((run / "checkpoints").glob(".step_*.partial"))


def kill(process: ForkServerProcess, run: Path, chance: random.Random, seconds: float, aimed: bool) -> bool:
    """Kill after a random time, if `aimed` somewhere in the next checkpoint write; False if the run ends before."""
    if ends_within(process, chance.uniform(0, seconds)):
        return False
    assert process.pid is not None
    while aimed:
        if ends_within(process, 0.001):
            return False
        if writes_a_checkpoint(run):
            if ends_within(process, chance.uniform(0, 0.05)):
                return False
            os.kill(process.pid, signal.SIGSTOP)
            if writes_a_checkpoint(run):
                break
            os.kill(process.pid, signal.SIGCONT)
    process.kill()
    process.join()
    return True


@dataclass
class Kills:
    """How often runs were killed, and how often that left half a checkpoint behind."""

    anywhere: int = 0
    inside_a_write: int = 0


def kill_until_finished(
    run: Path, settings: Path, chance: random.Random, seconds: float, kills: Kills, most: int
) -> float:
    """Start, kill, start again, until the run is complete; how long its last part took, if less than `seconds`.

    Every second kill is aimed at a checkpoint write.
    """
    while kills.anywhere < most:
        began = time.monotonic()
        if not kill(start(run, settings), run, chance, seconds, aimed=kills.anywhere % 2 == 1):
            return min(seconds, time.monotonic() - began)
        kills.anywhere += 1
        kills.inside_a_write += writes_a_checkpoint(run)
        if not (run / "config.json").exists():
            shutil.rmtree(run, ignore_errors=True)
    return min(seconds, finish(run, settings))


def write_settings(path: Path, config: RunConfig, **training: object) -> Path:
    data = config.model_dump(mode="json")
    data["training"] |= {"checkpoint_every": 4, "threads": 1} | training
    path.write_text(json.dumps(validated(RunConfig, data, "test").model_dump(mode="json")))
    return path


def assert_killed_runs_end_equal(folder: Path, settings: Path, most: int, most_per_run: int) -> Kills:
    seconds = finish(folder / "whole", settings)
    expected = final_bytes(folder / "whole")
    assert any("sae_weights" in name for name in expected) and any("figure1.png" in name for name in expected)
    chance, kills, number = random.Random(0), Kills(), 0
    while kills.anywhere < most:
        run = folder / f"killed-{number}"
        seconds = kill_until_finished(run, settings, chance, seconds, kills, min(most, kills.anywhere + most_per_run))
        found = final_bytes(run)
        assert found.keys() == expected.keys()
        assert [name for name in expected if found[name] != expected[name]] == []
        print(f"{kills.anywhere} kills, {kills.inside_a_write} inside a checkpoint write: {run.name} ends equal")
        shutil.rmtree(run)
        number += 1
    return kills


def test_kill_at_random_instants(tmp_path):
    """SIGKILL at any instant, checkpoint writes included | nothing, then `unbraid resume` goes on | final weights,
    metrics and figures are those of an uninterrupted run, byte for byte"""
    settings = write_settings(tmp_path / "settings.json", recipes.tiny(), tokens=10_240)
    assert assert_killed_runs_end_equal(tmp_path, settings, most=3, most_per_run=3).inside_a_write > 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kill_at_fifty_random_instants_of_a_smollm2_run(tmp_path):
    """SIGKILL at 50 random instants of a run on SmolLM2-135M | as above | as above"""
    config = recipes.demo()
    data = config.model_dump(mode="json")
    data["model"]["sites"] = ["resid_post.0", "resid_post.2"]
    data["buffer"]["contexts"] = 48
    data["sae"] |= {"n_features": 128, "dead_after_tokens": 2_000}
    settings = write_settings(
        tmp_path / "settings.json",
        validated(RunConfig, data, "test"),
        tokens=6_144,
        batch_tokens=256,
        held_out_tokens=256,
        checkpoint_every=1,
    )
    kills = assert_killed_runs_end_equal(tmp_path, settings, most=50, most_per_run=10)
    assert kills.anywhere == 50 and kills.inside_a_write >= 10


def test_a_killed_harvest(tmp_path):
    """SIGKILL at any instant of `unbraid harvest` | nothing, then the same command goes on | every finished shard; the
    cache ends with the same bytes"""
    settings = write_settings(tmp_path / "settings.json", recipes.tiny(), tokens=10_240, held_out_tokens=256)

    def begin(cache: Path) -> ForkServerProcess:
        process = PROCESSES.Process(target=main, args=(["harvest", str(settings), "--cache", str(cache)],))
        process.start()
        return process

    assert ends_within(begin(tmp_path / "whole"), None)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    for shard in ("training_00000", "training_00001"):
        process = begin(tmp_path / "cut")
        while not list((tmp_path / "cut").glob(f"*{shard}*")):
            assert not ends_within(process, 0.001)
        process.kill()
        process.join()
    assert ends_within(begin(tmp_path / "cut"), None)
    assert {path.name: path.read_bytes() for path in (tmp_path / "cut").iterdir()} == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_polite_signals(tmp_path, number):
    """SIGTERM or Ctrl-C | "stopped after step n; a checkpoint was written; go on with `unbraid resume`", exit code
    128 + signal | everything up to the last finished step"""
    settings = write_settings(tmp_path / "settings.json", recipes.tiny(), tokens=25_600, checkpoint_every=0)
    finish(tmp_path / "whole", settings)
    process = start_command(tmp_path / "cut", settings)
    process.send_signal(number)
    said, _ = process.communicate()
    assert process.returncode == 128 + number, said
    assert "a checkpoint was written; go on with `unbraid resume" in said and "Traceback" not in said
    assert len(list((tmp_path / "cut" / "checkpoints").glob("step_*"))) == 1
    finish(tmp_path / "cut", settings)
    assert final_bytes(tmp_path / "cut") == final_bytes(tmp_path / "whole")


def test_an_impatient_signal(tmp_path, monkeypatch, capsys):
    """Ctrl-C twice | "interrupted" at once, exit code 130 | every checkpoint before; a later resume ends with the same
    bytes"""
    settings = write_settings(tmp_path / "settings.json", recipes.tiny(), tokens=5_120)
    finish(tmp_path / "whole", settings)
    shown = RunProgress.step

    def step(progress, number, record):
        shown(progress, number, record)
        if number == 10:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stopped:
        patched.setattr(RunProgress, "step", step)
        main(["train", str(settings), "--run", str(tmp_path / "cut")])
    assert stopped.value.code == 130 and "interrupted" in capsys.readouterr().err
    finish(tmp_path / "cut", settings)
    assert final_bytes(tmp_path / "cut") == final_bytes(tmp_path / "whole")


def start_command(run: Path, settings: Path) -> subprocess.Popen:
    """`unbraid train` as a user starts it, a step or more into its training."""
    command = [sys.executable, "-m", "unbraid", "train", str(settings), "--run", str(run)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or metrics.stat().st_size == 0:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.01)
        assert process.returncode is None
    return process
