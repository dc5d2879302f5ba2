"""`unbraid launch`, and whole runs under torchrun: the same results, also when a rank is killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from unbraid import cli, formats, recipes
from unbraid.config import overridden

PYTHON = [sys.executable, "-m", "unbraid"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def test_launch_prints_the_torchrun_line(capsys):
    cli.main(["launch", "--ranks", "4", "train", "tiny", "--run", "runs/a"])
    assert capsys.readouterr().out == (
        "torchrun --standalone --nproc-per-node=4 --max-restarts=3 -m -- unbraid train tiny --run runs/a\n"
    )
    cli.main(["launch", "--ranks", "8", "--nodes", "2", "--rendezvous", "head:29400", "resume", "runs/a"])
    assert capsys.readouterr().out == (
        "torchrun --nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=head:29400 --nproc-per-node=8 --max-restarts=3 "
        "-m -- unbraid resume runs/a\n"
    )


def test_launch_without_a_command_says_what_it_needs(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["launch", "--ranks", "4"])
    assert ended.value.code == 1
    assert "launch needs a command; such as" in capsys.readouterr().err


def settings(folder: Path, shards: int | None = 4) -> str:
    given = {"training.tokens": 40 * 256, "training.checkpoint_every": 10, "sae.architecture": "topk", "sae.k": 8}
    if shards is not None:
        given["training.feature_shards"] = shards
    config, _ = overridden(recipes.tiny(), given)
    path = folder / "settings.json"
    path.write_text(json.dumps(config.model_dump(mode="json")))
    return str(path)


def run_bytes(run: Path) -> dict[str, bytes]:
    patterns = ("saes/*/*", "metrics.jsonl", "figures/*")
    return {str(path.relative_to(run)): path.read_bytes() for each in patterns for path in sorted(run.glob(each))}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_rank_killed_mid_run_is_restarted_and_the_run_ends_with_the_bytes_of_an_unbroken_one(tmp_path):
    """Four ranks; one gets SIGKILL after a checkpoint; `torchrun --max-restarts` starts all again."""
    config = settings(tmp_path)
    launch = [*PYTHON, "launch", "--ranks", "4", "--max-restarts", "2", "--run", "train", config, "--run"]
    whole = subprocess.run([*launch, str(tmp_path / "whole")], capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    broken = tmp_path / "broken"
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen([*launch, str(broken)], stdout=said, stderr=subprocess.STDOUT)
        while not list((broken / "checkpoints").glob("step_*")):
            assert process.poll() is None, (tmp_path / "said").read_text()
            time.sleep(0.05)
        os.kill(worker_of(process.pid), signal.SIGKILL)
        assert process.wait() == 0, (tmp_path / "said").read_text()
    text = (tmp_path / "said").read_text()
    assert text.count("unbraid: rank ") == 1 and "lost contact with another rank" in text
    assert re.search(r"going on after step \d", text)
    assert run_bytes(broken) == run_bytes(tmp_path / "whole")
    config = settings(tmp_path, shards=None)
    alone = subprocess.run([*PYTHON, "train", config, "--run", str(tmp_path / "alone")], capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr
    for folder in sorted((tmp_path / "alone" / "saes").iterdir()):
        one, other = formats.load(folder), formats.load(broken / "saes" / folder.name)
        assert torch.linalg.vector_norm(one.W_dec - other.W_dec) <= 1e-4 * torch.linalg.vector_norm(one.W_dec)


def worker_of(launcher: int) -> int:
    """The last of the processes that a torchrun started."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return int(children[-1])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_is_wrong_with_a_run_is_said_once(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    command = [*TORCHRUN, "--nproc-per-node=3", "-m", "--", "unbraid", "train", "tiny", "--run", str(tmp_path / "full")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode != 0
    assert ended.stderr.count("unbraid: ") == 1
    assert "exists already; expected a new or empty folder" in ended.stderr
