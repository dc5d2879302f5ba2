"""Loggers get what metrics.jsonl gets, change nothing, go on after a resume, and are refused early when missing."""

import importlib.util
import json
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import unbraid
from unbraid import recipes, run
from unbraid.config import RunConfig, overridden
from unbraid.errors import ConfigError, TrainingError
from unbraid.training import loggers
from unbraid.training.loggers import LOGGERS

# Their warnings are theirs: the promise here is that the numbers arrive.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
LOSS = "resid_post.1_twin/loss"


def config(*names: str) -> RunConfig:
    settings = {"training.tokens": 5120, "training.checkpoint_every": 10, "training.loggers": list(names)}
    if set(names) & {"wandb", "trackio"}:
        settings["training.log_project"] = "test"
    return overridden(recipes.tiny(), settings)[0]


def expected(folder: Path, name: str = LOSS) -> dict[int, float]:
    """Step -> value of `name` in the run's own log."""
    sae, _, metric = name.partition("/")
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: pytest.approx(line["saes"][sae][metric], rel=1e-6) for line in lines}


def read_tensorboard(folder: Path, name: str = LOSS) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def log_records(data: bytes) -> Iterator[bytes]:
    """Records of a .wandb file: LevelDB's log format after a header of 7 bytes."""
    at, record = 7, b""
    while at + 7 <= len(data):
        left_in_block = 32768 - at % 32768
        if left_in_block < 7:
            at += left_in_block
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def read_wandb(folder: Path, name: str = LOSS) -> list[tuple[int, float]]:
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # The process that writes the file has ended, and with it the last line is there.
    found: list[tuple[int, float]] = []
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        for data in log_records(path.read_bytes()):
            record = Record.FromString(data)
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            if name in items:
                found.append((int(items["step"]), float(items[name])))
    return found


def read_trackio(folder: Path, name: str = LOSS) -> list[tuple[int, float]]:
    from trackio.sqlite_storage import SQLiteStorage

    run_name = f"{folder.name}-{(folder / 'tracking_id').read_text()}"
    return [(log["step"], log[name]) for log in SQLiteStorage.get_logs("test", run_name) if name in log]


READERS = {"tensorboard": read_tensorboard, "wandb": read_wandb, "trackio": read_trackio}


@pytest.fixture(autouse=True, scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))
        if "wandb" in sys.modules:  # What it read of the environment before is forgotten.
            sys.modules["wandb"].teardown()
        yield


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> unbraid.Run:
    return unbraid.train(config(), tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.parametrize("name", LOGGERS)
def test_a_logger_gets_every_line_and_the_held_out_metrics_and_the_run_keeps_its_bytes(name, plain, tmp_path: Path):
    logged = unbraid.train(config(name), tmp_path / "run")
    for file in ("metrics.jsonl", "saes/resid_post.1_twin/sae_weights.safetensors"):
        assert (logged.path / file).read_bytes() == (plain.path / file).read_bytes()
    assert dict(READERS[name](logged.path)) == expected(plain.path)
    held_out = READERS[name](logged.path, "held_out/resid_post.1_twin/r2")
    assert held_out == [(20, pytest.approx(plain.summary["saes"]["resid_post.1_twin"]["r2"], rel=1e-6))]


@pytest.mark.parametrize("name", LOGGERS)
def test_a_resumed_run_goes_on_in_the_same_place(name, plain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    steps: list[int] = []

    class Killed(LOGGERS[name]):
        def log(self, step, values):
            super().log(step, values)
            steps.append(step)
            if step == 15:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(LOGGERS, name, Killed)
        unbraid.train(config(name), tmp_path / "run")
    assert steps == [1, 5, 10, 15]
    resumed = unbraid.resume(tmp_path / "run")
    found = READERS[name](resumed.path)
    assert dict(found) == expected(plain.path), "step 15 was taken twice, with the same value"
    if name == "tensorboard":
        assert len(found) == len(dict(found)), "what is repeated replaces what was there"


def test_a_logger_that_is_not_installed_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name))
    monkeypatch.setattr(run, "open_activations", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(ConfigError, match=r"'wandb'.*not installed.*pip install 'unbraid\[wandb\]'"):
        unbraid.train(config("wandb"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def nothing_begins(tmp_path: Path, monkeypatch):
    """No model is loaded and no folder made, whatever a test does."""
    monkeypatch.setattr(run, "open_activations", lambda *_: pytest.fail("the model was loaded"))
    yield tmp_path / "run"
    assert not (tmp_path / "run").exists()


def test_wandb_that_cannot_start_is_refused_before_the_model_loads(nothing_begins: Path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def refuse(verify):
        assert verify, "the key must be shown to the server"
        raise wandb.errors.UsageError("No API key configured")

    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(wandb, "login", refuse)
    for begin in (unbraid.train, run.plan):
        with pytest.raises(ConfigError, match=r"wandb, which could not start \(No API key.*WANDB_MODE=offline"):
            begin(config("wandb"), nothing_begins)


def test_trackio_that_cannot_write_is_refused_before_the_model_loads(nothing_begins: Path, monkeypatch):
    (nothing_begins.parent / "file").write_text("")
    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", nothing_begins.parent / "file" / "trackio")
    with pytest.raises(ConfigError, match=r"trackio, which could not start .*set TRACKIO_DIR"):
        unbraid.train(config("trackio"), nothing_begins)


def test_a_tensorboard_that_does_not_import_is_refused_before_the_model_loads(nothing_begins: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"tensorboard, which could not start .*pip install --upgrade tensorboard"):
        unbraid.train(config("tensorboard"), nothing_begins)


@pytest.mark.parametrize("error", [RuntimeError("broken\npipe"), OSError(5, "no"), ValueError()])
def test_a_logger_that_breaks_down_when_it_starts_is_one_message(tmp_path: Path, monkeypatch, error):
    class Broken(LOGGERS["tensorboard"]):
        def __init__(self, *_):
            raise error

    monkeypatch.setitem(LOGGERS, "tensorboard", Broken)
    with pytest.raises(ConfigError, match=r"tensorboard, which could not start \([^\n]*\); expected"):
        unbraid.train(config("tensorboard"), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    monkeypatch.undo()


def test_a_resumed_run_asks_its_loggers_before_the_model_loads(tmp_path: Path, monkeypatch, plain):
    folder = Path(shutil.copytree(plain.path, tmp_path / "run"))
    (folder / "summary.json").unlink()
    monkeypatch.setattr(LOGGERS["tensorboard"], "check", lambda: pytest.fail("asked"))
    monkeypatch.setattr(run, "open_activations", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(pytest.fail.Exception, match="asked"):
        unbraid.resume(folder, changes={"training.loggers": ["tensorboard"]})


def test_an_interrupted_run_is_closed_as_failed(tmp_path: Path, monkeypatch):
    closed: list[bool] = []

    class Remembered(LOGGERS["tensorboard"]):
        def close(self, failed):
            super().close(failed)
            closed.append(failed)

    monkeypatch.setitem(LOGGERS, "tensorboard", Remembered)
    unbraid.train(config("tensorboard"), tmp_path / "whole")

    def stop(*_args, **_kwargs):
        raise TrainingError("stopped")

    monkeypatch.setattr(run, "train_saes", stop)
    with pytest.raises(TrainingError):
        unbraid.train(config("tensorboard"), tmp_path / "stopped")
    assert closed == [False, True]
