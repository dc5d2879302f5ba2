"""How a run stops: by signals, by errors in one of several SAEs, by services that fail."""

import signal
import warnings

import pytest
import torch
from fake_source import FakeSource

from unbraid import recipes
from unbraid.activations import cache
from unbraid.activations.ahead import Ahead
from unbraid.activations.rows import RefillInterrupted
from unbraid.config import BufferConfig, ModelConfig, OptimiserConfig, RunConfig, SAEConfig, TrainingConfig
from unbraid.errors import ActivationError, TrainingError
from unbraid.training import fit
from unbraid.training.checkpoint import list_checkpoints
from unbraid.training.loggers import Loggers
from unbraid.training.loop import train_saes
from unbraid.training.run_folder import RunFolder
from unbraid.training.stopping import StopRequest, TrainingInterrupted, process_as_found, stop_on_signals

CPU = torch.device("cpu")


class Silent:
    def filling(self, rows, capacity):
        pass

    def step(self, step, record):
        pass


def config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(sites=["resid_post.0"], batch_contexts=4),
        buffer=BufferConfig(contexts=32),
        sae=SAEConfig(n_features=32, lambda1=0.02, dead_after_tokens=100_000),
        optimiser=OptimiserConfig(lr=1e-2, warmup_steps=4),
        training=TrainingConfig(tokens=24 * 32, batch_tokens=32, log_every=5, checkpoint_every=10),
        variants={"a": {}, "b": {"seed": 3}},
    )


def train(folder, source=None, stop=None):
    run = RunFolder(folder) if (folder / "config.json").exists() else RunFolder.create(folder, config())
    source = source or FakeSource(400, d_model=16)
    return train_saes(run, config(), source, CPU, Silent(), *([stop] if stop else []))


def weights(trained) -> dict[str, torch.Tensor]:
    return {f"{t.name}.{name}": tensor for t in trained.trainers for name, tensor in t.sae.state_dict().items()}


def assert_same(first, second) -> None:
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Stalling(FakeSource):
    """Text that stalls after some chunks, where a signal arrives."""

    def __init__(self, after: int):
        super().__init__(400, d_model=16)
        self.after = after

    def chunks(self, position, held_out=False):
        for chunk in super().chunks(position, held_out):
            if self.passes > self.after:
                signal.raise_signal(signal.SIGINT)
                pytest.fail("the signal did not end the waiting")
            yield chunk


def test_a_signal_ends_the_waiting_for_text_and_the_run_resumes_to_the_same_bytes(tmp_path):
    whole = train(tmp_path / "whole")
    with (
        pytest.raises(TrainingInterrupted, match=r"stopped after step \d+ of 24") as stopped,
        stop_on_signals() as stop,
    ):
        train(tmp_path / "cut", Stalling(12), stop)
    assert stopped.value.exit_code == 130
    assert list_checkpoints(tmp_path / "cut" / "checkpoints")
    assert_same(train(tmp_path / "cut"), whole)


def test_a_signal_before_the_first_step_leaves_nothing_to_save(tmp_path):
    with pytest.raises(TrainingInterrupted, match="nothing to save yet"), stop_on_signals() as stop:
        train(tmp_path / "cut", Stalling(2), stop)


def test_a_signal_outside_the_waiting_is_only_noted():
    stop = StopRequest()
    before = signal.getsignal(signal.SIGINT)
    try:
        stop.take(signal.SIGINT, None)
        assert stop()
        with pytest.raises(RefillInterrupted), stop.waiting():
            stop.take(signal.SIGINT, None)
    finally:
        signal.signal(signal.SIGINT, before)


def test_handlers_are_put_back_however_training_ends():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="x"), stop_on_signals():
        raise ValueError("x")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_source_that_has_stalled_for_good_does_not_keep_a_stopped_reader(monkeypatch):
    import threading

    from unbraid.activations import ahead

    monkeypatch.setattr(ahead, "LONGEST_WAIT_SECONDS", 0.01)
    hold = threading.Event()

    class Stalled(FakeSource):
        def chunks(self, position, held_out=False):
            yield next(super().chunks(position))
            hold.wait()

    chunks = Ahead(Stalled(64), depth=2).chunks(None)
    next(chunks)
    chunks.close()
    hold.set()


def test_an_sae_that_made_a_step_in_which_its_neighbour_failed_does_not_repeat_it(tmp_path, monkeypatch):
    whole = train(tmp_path / "whole")
    step_of = fit.train_step

    def failing(trainer, x_BD, step, *rest):
        if step == 7 and trainer.name.endswith("_b"):
            raise TrainingError("broken")
        return step_of(trainer, x_BD, step, *rest)

    with monkeypatch.context() as broken, pytest.raises(TrainingError, match="broken; the run stands after step 7"):
        broken.setattr(fit, "train_step", failing)
        train(tmp_path / "cut")
    assert list_checkpoints(tmp_path / "cut" / "checkpoints")[-1].name == "step_7"
    assert_same(train(tmp_path / "cut"), whole)


def test_an_error_in_the_first_step_leaves_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "train_step", lambda *_: (_ for _ in ()).throw(TrainingError("broken")))
    with pytest.raises(TrainingError, match=r"broken$"):
        train(tmp_path / "cut")
    assert not list_checkpoints(tmp_path / "cut" / "checkpoints")


def test_threads_and_random_states_are_put_back():
    import random

    import numpy as np

    threads = torch.get_num_threads()
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    with process_as_found(threads + 1):
        assert torch.get_num_threads() == threads + 1
        torch.rand(3), np.random.rand(3), random.random()
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1] and random.getstate() == states[2]


class Service:
    def __init__(self, broken: bool):
        self.broken, self.taken, self.closed = broken, [], False

    def log(self, step, values):
        self.taken.append(step)
        if self.broken:
            raise ConnectionError("no route to host")

    def close(self, failed):
        self.closed = True


def test_a_logger_that_fails_is_left_out_with_one_warning_and_the_others_go_on():
    broken, sound = Service(True), Service(False)
    loggers = Loggers([broken, sound])
    with pytest.warns(
        UserWarning, match=r"logger Service failed \(ConnectionError: no route to host\).*training goes on"
    ):
        loggers.step(5, {"saes": {"a": {"l0": 3}}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loggers.step(6, {"saes": {"a": {"l0": 3}}})
        loggers.step(7, None)
    assert broken.taken == [5] and sound.taken == [5, 6]


def test_a_signal_ends_a_harvest_that_waits_for_text(tmp_path, monkeypatch):
    tiny = recipes.tiny()
    opened = cache.LiveActivations

    class Stalled(opened):
        def chunks(self, position, held_out=False):
            yield next(super().chunks(position, held_out))
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("the signal did not end the waiting")

    monkeypatch.setattr(cache, "LiveActivations", Stalled)
    stopped = pytest.raises(ActivationError, match=r"harvest stopped with \d+ of .* run the same command")
    with stopped, stop_on_signals() as stop:
        cache.harvest(tiny, tmp_path / "cache", CPU, should_stop=stop)
    monkeypatch.setattr(cache, "LiveActivations", opened)
    assert cache.harvest(tiny, tmp_path / "cache", CPU)["complete"]
