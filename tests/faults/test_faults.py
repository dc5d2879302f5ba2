"""Everything else that can go wrong: what the user sees, and proof that nothing was lost.

The first line of each docstring is a row of docs/reliability.md: the fault | what the user sees | what is
kept. `docs/reliability.py` writes the table from them.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from fake_source import FakeSource

import unbraid
from unbraid import recipes, run
from unbraid.activations import live
from unbraid.activations.buffer import ActivationBuffer
from unbraid.activations.cache import harvest
from unbraid.config import (
    BufferConfig,
    ModelConfig,
    OptimiserConfig,
    RunConfig,
    SAEConfig,
    TrainingConfig,
    validated,
)
from unbraid.errors import ActivationError, CheckpointError, TextError, TrainingError, UnbraidError
from unbraid.text.documents import TOO_LONG
from unbraid.text.generated import GeneratedSource
from unbraid.text.hub import HubSource
from unbraid.training.checkpoint import list_checkpoints, read_checkpoint
from unbraid.training.loop import train_saes
from unbraid.training.run_folder import RunFolder
from unbraid.training.stopping import TrainingInterrupted

CPU = torch.device("cpu")


class Silent:
    def filling(self, rows, capacity):
        pass

    def step(self, step, record):
        pass


def small() -> RunConfig:
    return RunConfig(
        model=ModelConfig(sites=["resid_post.0"], batch_contexts=4),
        buffer=BufferConfig(contexts=32),
        sae=SAEConfig(n_features=32, lambda1=0.02),
        optimiser=OptimiserConfig(lr=1e-2, warmup_steps=4),
        training=TrainingConfig(tokens=20 * 32, batch_tokens=32, checkpoint_every=5, log_every=5),
    )


def train(folder: Path, source: FakeSource | None = None, config: RunConfig | None = None) -> dict[str, torch.Tensor]:
    config = config or small()
    run_folder = RunFolder(folder) if (folder / "config.json").exists() else RunFolder.create(folder, config)
    trained = train_saes(run_folder, config, source or FakeSource(200, d_model=16), CPU, Silent())
    return dict(trained.trainers[0].sae.state_dict())


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def tmpfs(tmp_path):
    """A file system of one MiB, where this user may mount one."""
    place = tmp_path / "small-disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield place
    subprocess.run(["mount", "-o", "remount,rw", str(place)], check=False)
    subprocess.run(["umount", str(place)], check=True)


def test_disk_full(tmpfs, tmp_path):
    """disk full | "checkpoint of step n needs x MiB but ... has y MiB free; free some space" before anything is written
    | every earlier checkpoint"""
    with pytest.raises(CheckpointError, match=r"step 5 needs [\d.]+ MiB but .* free some space"):
        train(tmpfs / "run")
    assert list((tmpfs / "run" / "checkpoints").iterdir()) == []


def test_read_only_folder(tmpfs):
    """read-only folder | "cannot write the run folder ...; choose another --run" before a model loads | nothing was
    begun"""
    subprocess.run(["mount", "-o", "remount,ro", str(tmpfs)], check=True)
    with pytest.raises(TrainingError, match="cannot write the run folder"):
        RunFolder.create(tmpfs / "run", small())


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damaged_checkpoint(tmp_path, damage):
    """truncated or bit-flipped checkpoint | "checkpoint ... is damaged (file does not match its checksum); delete that
    folder to resume from an earlier one" | the earlier checkpoint, from which the run ends with the same bytes"""
    whole = train(tmp_path / "whole")
    steps: list[int] = []

    class Count(Silent):
        def step(self, step, record):
            steps.append(step)

    cut = RunFolder.create(tmp_path / "cut", small())
    with pytest.raises(TrainingInterrupted):
        train_saes(cut, small(), FakeSource(200, d_model=16), CPU, Count(), lambda: len(steps) == 12)
    newest = list_checkpoints(cut.checkpoints)[-1]
    victim = next(newest.glob("sae-*.safetensors"))
    content = bytearray(victim.read_bytes())
    content[-5] ^= 4
    victim.write_bytes(content if damage == "flipped" else content[:-5])
    with pytest.raises(CheckpointError, match=r"is damaged .* delete that folder"):
        train(tmp_path / "cut")
    shutil.rmtree(newest)
    assert_equal(train(tmp_path / "cut"), whole)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite(tmp_path, value):
    """NaN or Inf activations | "activations at SITE are not finite (first at context c, position t)" before a step uses
    them | the weights and every checkpoint before"""
    source = FakeSource(200, d_model=16)
    source.spoil = {700: value}
    with pytest.raises(ActivationError, match=r"activations at resid_post\.0 are not finite"):
        train(tmp_path / "run", source)
    _, state = read_checkpoint(list_checkpoints(tmp_path / "run" / "checkpoints")[-1])
    assert state["step"] >= 5
    source.spoil = {}
    assert_equal(train(tmp_path / "run", source), train(tmp_path / "clean", FakeSource(200, d_model=16)))


def broken_model(monkeypatch, layer: int, forward, *sites: str) -> RunConfig:
    """The tiny recipe with a model whose block `layer` does something else."""
    config = recipes.tiny()
    config = config.model_copy(update={"model": config.model.model_copy(update={"sites": list(sites)})})
    source = run.open_activations(config, CPU)
    source.model.blocks[layer].forward = forward
    monkeypatch.setattr(run, "open_activations", lambda *_: source)
    return config


def test_a_site_that_never_fires(tmp_path, monkeypatch):
    """a site that never fires | "site SITE of MODEL never fired" | no step was taken, only settings written"""
    config = broken_model(monkeypatch, 1, lambda hidden_states, **_: hidden_states, "attn_out.1", "resid_post.1")
    with pytest.raises(UnbraidError, match=r"site attn_out\.1 of random:llama never fired"):
        unbraid.train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_model_returning_the_wrong_shape(tmp_path, monkeypatch):
    """a model that returns the wrong shape | the site, its shape and the [contexts, T, D] expected | no step was taken,
    nothing but the settings written"""
    config = broken_model(monkeypatch, 0, lambda hidden_states, **_: hidden_states[:, 1:], "resid_post.0")
    with pytest.raises(UnbraidError, match=r"site resid_post\.0 .* expected activations .* \[16, 32, 64\]"):
        unbraid.train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_out_of_memory_in_the_model_pass(tmp_path, monkeypatch):
    """out of memory in a model pass | a warning that the pass is halved, once a halving | every context, in order: the
    run goes on"""
    config = recipes.tiny()
    config = config.model_copy(update={"training": config.training.model_copy(update={"tokens": 5_120})})
    source = run.open_activations(config, CPU)
    inner = source.model.blocks[0].forward

    def forward(hidden_states, *args, **kwargs):
        if len(hidden_states) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(hidden_states, *args, **kwargs)

    source.model.blocks[0].forward = forward
    monkeypatch.setattr(run, "open_activations", lambda *_: source)
    with pytest.warns(UserWarning, match="out of memory in a model pass over 16 contexts"):
        finished = unbraid.train(config, tmp_path / "run")
    assert finished.summary["steps"] == {"planned": 20, "executed": 20}


class Failing(FakeSource):
    """A source whose text raises, or ends, after some chunks."""

    def __init__(self, *args, fail_after: int, error: Exception | None, **settings):
        super().__init__(*args, **settings)
        self.fail_after, self.error = fail_after, error

    def chunks(self, position, held_out=False):
        for chunk in super().chunks(position, held_out):
            if self.passes > self.fail_after:
                if self.error is None:
                    return
                raise self.error
            yield chunk


def test_a_stream_that_raises(tmp_path):
    """a stream that raises for good | the stream's error after bounded retries | every checkpoint before; a later
    resume ends with the same bytes"""
    with pytest.raises(TextError, match="gone"):
        train(tmp_path / "run", Failing(200, d_model=16, fail_after=20, error=TextError("the data set is gone")))
    assert list_checkpoints(tmp_path / "run" / "checkpoints")
    assert_equal(train(tmp_path / "run"), train(tmp_path / "whole"))


def test_a_stream_that_ends_early(tmp_path):
    """a text that ends early | "the text was used up after s of n steps" and the training.tokens that would fit | the
    run ends with the SAEs of the steps it made"""
    short = Failing(200, d_model=16, fail_after=20, error=None)
    trained = train_saes(RunFolder.create(tmp_path / "run", small()), small(), short, CPU, Silent())
    assert 5 < trained.steps < 20
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == f"step_{trained.steps}"


def test_a_text_that_ends_before_the_first_step(tmp_path):
    """a text too small for one step | "the text is used up: it gave r rows, which is 0 steps" | nothing was begun"""
    short = Failing(200, d_model=16, fail_after=1, error=None)
    with pytest.raises(TextError, match=r"the text is used up: it gave \d+ rows, which is 0 steps"):
        train(tmp_path / "run", short)


def test_clock_jumps(tmp_path, monkeypatch):
    """a clock that jumps | at most an odd rate in the display | the same bytes: no result depends on a clock"""
    whole = train(tmp_path / "whole")
    jumps = itertools.cycle([0.0, -5e5, 1e6, -2e6])
    for clock in ("time", "monotonic", "perf_counter"):
        real = getattr(time, clock)
        monkeypatch.setattr(time, clock, lambda real=real: real() + next(jumps))
    assert_equal(train(tmp_path / "jumpy"), whole)


def test_two_runs_in_one_folder(tmp_path):
    """two runs in one folder | "another process is training in ...; wait for it or choose another run folder" | the
    first run goes on untouched"""
    folder = RunFolder.create(tmp_path / "run", small())
    with folder.lock():
        code = f"from unbraid.run import resume; resume({str(folder.path)!r})"
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert "another process is training in" in second.stderr
    with folder.lock():
        pass


def test_a_start_that_was_killed(tmp_path):
    """SIGKILL before the settings were written | nothing | nothing was begun; the same command starts anew"""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.json.partial").write_text("{")
    train(tmp_path / "run")


def test_a_buffer_restored_after_a_failure_repeats_nothing():
    """a refill that fails half-way | the error of the source | the buffer as it was before the refill"""
    source = Failing(200, fail_after=10**9, error=TextError("broken"))
    buffer = ActivationBuffer(source, BufferConfig(contexts=16), 16, seed=0)
    buffer.fill()
    source.fail_after = source.passes + 1
    tensors, data = buffer.state()
    with pytest.raises(TextError, match="broken"):
        while True:
            tensors, data = buffer.state()
            buffer.next_batch()
    after, after_data = buffer.state()
    assert after_data == data
    assert all(torch.equal(tensors[name], after[name]) for name in tensors)


class Stream:
    """A streamed data set of generated documents; `before(n)` is called ahead of the n-th document read, ever."""

    reads = 0

    def __init__(self, before, documents: int = 400):
        self.before, self.documents, self.place = before, documents, 0

    def __iter__(self):
        while self.place < self.documents:
            Stream.reads += 1
            self.before(Stream.reads)
            self.place += 1
            yield {"text": GENERATED.text(self.place)}

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


GENERATED = GeneratedSource(seed=3)


def train_on_a_stream(folder: Path, monkeypatch, open_stream, **settings) -> unbraid.Run:
    """The tiny recipe on a streamed data set, a few steps long."""
    config = recipes.tiny()
    text = config.text.model_copy(update={"source": "hub", "dataset": "some/where"})
    training = config.training.model_copy(update={"tokens": 5_120, "held_out_tokens": 256})
    config = config.model_copy(update={"text": text, "training": training})
    hub = HubSource(text, open_stream=open_stream, pause=lambda seconds: None, **settings)
    monkeypatch.setattr(live, "open_source", lambda _: hub)
    return unbraid.train(config, folder)


def results(run: unbraid.Run) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in sorted(run.path.glob("saes/*/sae_weights.safetensors"))}


@pytest.mark.parametrize("fault", ["raises", "stalls", "ends early"])
def test_a_stream_that_comes_back(tmp_path, monkeypatch, fault):
    """a stream that raises, stalls or ends early, and comes back | a warning with the document it had reached and the
    pause before the next attempt | everything: the stream goes on at that very document, the run ends with the same
    bytes"""
    sound = train_on_a_stream(tmp_path / "sound", monkeypatch, lambda: Stream(lambda number: None))
    Stream.reads = 0
    hold = threading.Event()

    def before(number):
        if number == 90:
            if fault == "raises":
                raise ConnectionError("reset")
            if fault == "stalls":
                hold.wait()

    def open_stream():
        return Stream(before, 90 if fault == "ends early" and Stream.reads == 0 else 400)

    try:
        with pytest.warns(UserWarning, match=r"cannot read document (89|90) of .*trying again in 1 s"):
            faulty = train_on_a_stream(tmp_path / "faulty", monkeypatch, open_stream, patience=1.0, expected=400)
    finally:
        hold.set()
    assert len(results(sound)) == 4 and results(sound) == results(faulty)


def train_on_half_rubbish(folder: Path, most_skipped: float) -> unbraid.Run:
    """The tiny recipe on a file in which every second document cannot be used."""
    rubbish = itertools.cycle(
        [b'{"text": ""}', b'{"text": 3}', b'{"text": "%s"}' % (b"x" * 60_000), b'{"text": "\xff"}']
    )
    lines = [json.dumps({"text": GENERATED.text(number)}).encode() + b"\n" + next(rubbish) for number in range(400)]
    (folder / "text.jsonl").write_bytes(b"\n".join(lines))
    data = recipes.tiny().model_dump()
    data["text"] |= {"source": "files", "paths": [str(folder / "text.jsonl")], "max_document_characters": 50_000}
    data["text"]["max_skipped_fraction"] = most_skipped
    data["training"] |= {"tokens": 5_120, "held_out_tokens": 256}
    return unbraid.train(validated(RunConfig, data, "test"), folder / "run")


def test_documents_that_cannot_be_used(tmp_path):
    """documents that are empty, too large, not text or not UTF-8 | how many of each were left out; above
    text.max_skipped_fraction "n of the first m documents cannot be used" and the run stops | every other document"""
    finished = train_on_half_rubbish(tmp_path, 0.6)
    documents = finished.summary["documents"]
    assert set(documents["skipped"]) == {"empty", "not text", TOO_LONG, "not UTF-8"}
    assert 0 < documents["used"] <= documents["seen"] - sum(documents["skipped"].values())
    assert "some were left out" in run.warnings_of(finished.summary, finished.config)[0]
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(TextError, match=r"documents cannot be used \(.* empty, .*raise text\.max_skipped_fraction"):
        train_on_half_rubbish(tmp_path, 0.4)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign"])
def test_a_damaged_shard(tmp_path, damage):
    """truncated, bit-flipped or foreign shard of a cache | "shard ... is truncated, altered or foreign" before training
    starts | nothing but the settings was written; every other shard"""
    config = recipes.tiny()
    config = config.model_copy(update={"training": config.training.model_copy(update={"tokens": 5_120})})
    harvest(config, tmp_path / "cache", CPU)
    victim, other, *_ = sorted((tmp_path / "cache").glob("*.safetensors"))
    content = bytearray(victim.read_bytes())
    content[-5] ^= 4
    victim.write_bytes({"flipped": content, "truncated": content[:-5], "foreign": other.read_bytes()}[damage])
    with pytest.raises(ActivationError, match=rf"{victim.name}' is truncated, altered or foreign"):
        unbraid.train(config.model_copy(update={"cache": str(tmp_path / "cache")}), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
