"""The training text read several times: the same text in other batches, exactly resumed, live or from a cache."""

import json
import random
from pathlib import Path

import pytest
import torch
from rich.console import Console
from stopped_runs import Stop, stop_at

import unbraid
from unbraid import recipes
from unbraid.activations.cache import CachedActivations, harvest
from unbraid.activations.live import LiveActivations
from unbraid.activations.repeated import Repeated
from unbraid.config import RunConfig, overridden
from unbraid.errors import CheckpointError, TextError
from unbraid.training.stopping import TrainingInterrupted

CPU = torch.device("cpu")


def short_text(path: Path) -> dict[str, object]:
    """Settings of a text that gives some 3,000 rows."""
    rng = random.Random(0)
    words = ["river", "stone", "seven", "light", "paper", "cloud"]
    lines = [json.dumps({"text": " ".join(rng.choices(words, k=11))}) for _ in range(60)]
    path.write_text("\n".join(lines))
    return {"text.source": "files", "text.paths": [str(path)], "text.held_out_fraction": 0.2}


def small(path: Path, epochs: int, tokens: int = 6_400) -> RunConfig:
    run = {"training.tokens": tokens, "training.batch_tokens": 128, "training.held_out_tokens": 256}
    return overridden(
        recipes.tiny().model_copy(update={"variants": {"": {}}}),
        short_text(path) | run | {"training.epochs": epochs, "training.checkpoint_every": 7},
        "test",
    )[0]


def weights(run: unbraid.Run) -> list[bytes]:
    return [path.read_bytes() for path in sorted(run.path.glob("saes/*/sae_weights.safetensors"))]


def test_a_second_reading_gives_the_same_chunks_and_can_be_entered_anywhere(tmp_path):
    live = LiveActivations(small(tmp_path / "text.jsonl", 2), CPU)
    once, twice = list(live.chunks(None)), list(Repeated(live, 2).chunks(None))
    assert len(twice) == 2 * len(once) > 4
    for first, again in zip(once, twice[len(once) :], strict=True):
        assert torch.equal(first.activations[1], again.activations[1])
    assert len({json.dumps(chunk.position, sort_keys=True) for chunk in twice}) == len(twice)
    for start in (1, len(once) - 1, len(once), len(twice) - 1):
        rest = list(Repeated(live, 2).chunks(twice[start].position))
        assert [chunk.position for chunk in rest] == [chunk.position for chunk in twice[start + 1 :]]
    held_out = list(Repeated(live, 2).chunks(None, held_out=True))
    assert len(held_out) == len(list(live.chunks(None, held_out=True)))


def test_a_damaged_place_in_the_text_is_refused(tmp_path):
    repeated = Repeated(LiveActivations(small(tmp_path / "text.jsonl", 2), CPU), 2)
    with pytest.raises(CheckpointError, match="epoch 'two'; expected a number"):
        next(repeated.chunks({"epoch": "two"}))


def test_text_too_short_for_a_run_is_enough_when_it_is_read_again(tmp_path):
    with pytest.raises(TextError, match=r"raise training\.epochs to read it again"):
        unbraid.train(small(tmp_path / "text.jsonl", 1), tmp_path / "run", console=Console(quiet=True))
    with pytest.raises(TextError, match=r"in 2 readings \(training\.epochs\)"):
        unbraid.train(small(tmp_path / "text.jsonl", 2, 64_000), tmp_path / "run", console=Console(quiet=True))
    run = unbraid.train(small(tmp_path / "text.jsonl", 4), tmp_path / "run", console=Console(quiet=True))
    assert run.summary["steps"] == {"planned": 50, "executed": 50}


def test_a_run_stopped_in_its_second_reading_resumes_to_the_same_bytes(tmp_path):
    config = small(tmp_path / "text.jsonl", 4)
    whole = unbraid.train(config, tmp_path / "whole", console=Console(quiet=True))

    with pytest.raises((Stop, TrainingInterrupted)):
        unbraid.train(config, tmp_path / "cut", callbacks=[stop_at(38)], console=Console(quiet=True))
    assert weights(unbraid.resume(tmp_path / "cut", console=Console(quiet=True))) == weights(whole)


def test_a_cache_can_be_read_again_and_holds_no_more_text_than_one_reading(tmp_path):
    rows = LiveActivations(small(tmp_path / "text.jsonl", 1), CPU).count_rows(1 << 30)
    assert rows is not None
    config = small(tmp_path / "text.jsonl", 3, rows // 128 * 128)
    harvest(config, tmp_path / "cache", CPU)
    cached = config.model_copy(update={"cache": str(tmp_path / "cache")})
    run = unbraid.train(cached, tmp_path / "run", console=Console(quiet=True))
    assert run.summary["steps"]["executed"] == rows // 128
    source = CachedActivations(config, tmp_path / "cache")
    assert source.count_rows(0) < rows / 2
    once, twice = list(source.chunks(None)), list(Repeated(source, 2).chunks(None))
    assert len(twice) == 2 * len(once)
    assert len(list(Repeated(source, 2).chunks(twice[-2].position))) == 1
