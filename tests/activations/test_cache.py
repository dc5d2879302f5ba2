"""Harvested activations: the same batches as live, and no damaged, foreign or unfinished shard is ever trained on."""

import itertools
import json

import pytest
import torch

from unbraid import recipes
from unbraid.activations import cache
from unbraid.activations.buffer import ActivationBuffer
from unbraid.activations.cache import CachedActivations, harvest
from unbraid.activations.live import LiveActivations
from unbraid.config import RunConfig, validated
from unbraid.errors import ActivationError, TextError

CPU = torch.device("cpu")


def small(**settings) -> RunConfig:
    data = recipes.tiny().model_dump()
    data["training"] |= {"tokens": 12_800, "held_out_tokens": 512}
    for path, value in settings.items():
        group, name = path.split("__")
        data[group][name] = value
    return validated(RunConfig, data, "test")


@pytest.fixture(scope="module")
def harvested(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "tiny"
    harvest(small(), folder, CPU)
    return folder


def batches(source, config: RunConfig, number: int = 50):
    planned = config.steps * config.training.batch_tokens
    buffer = ActivationBuffer(source, config.buffer, config.training.batch_tokens, config.seed, planned_rows=planned)
    return [buffer.next_batch() for _ in range(number)]


def test_training_from_a_cache_sees_the_batches_live_training_sees(harvested):
    live = batches(LiveActivations(small(), CPU), small())
    cached = batches(CachedActivations(small(), harvested), small())
    for live_batch, cached_batch in zip(live, cached, strict=True):
        assert all(torch.equal(first, second) for first, second in zip(live_batch, cached_batch, strict=True))


def test_held_out_chunks_are_the_live_ones(harvested):
    live = LiveActivations(small(), CPU).chunks(None, held_out=True)
    for chunk, expected in zip(CachedActivations(small(), harvested).chunks(None, held_out=True), live, strict=False):
        assert torch.equal(chunk.tokens_BT, expected.tokens_BT)
        assert torch.equal(chunk.activations[1], expected.activations[1])


def test_a_cache_can_be_entered_at_any_chunk(harvested):
    source = CachedActivations(small(), harvested)
    every = list(source.chunks(None))
    for start in (0, 3, len(every) - 1):
        rest = list(source.chunks(every[start].position))
        assert [chunk.position for chunk in rest] == [chunk.position for chunk in every[start + 1 :]]
        if rest:
            assert torch.equal(rest[0].activations[0], every[start + 1].activations[0])


def test_one_site_of_a_cache_can_be_used_alone(harvested):
    config = small(model__sites=["resid_post.1"])
    chunk = next(CachedActivations(config, harvested).chunks(None))
    both = next(CachedActivations(small(), harvested).chunks(None))
    assert torch.equal(chunk.activations[0], both.activations[1])


def test_an_interrupted_harvest_goes_on_to_the_same_bytes(harvested, tmp_path):
    asked = itertools.count()
    with pytest.raises(ActivationError, match="run the same command to go on"):
        harvest(small(), tmp_path / "cut", CPU, should_stop=lambda: next(asked) >= 13)
    with pytest.raises(ActivationError, match="unfinished"):
        CachedActivations(small(), tmp_path / "cut")
    harvest(small(), tmp_path / "cut", CPU)
    whole, cut = CachedActivations(small(), harvested), CachedActivations(small(), tmp_path / "cut")
    for first, second in zip(whole.chunks(None), cut.chunks(None), strict=False):
        assert first.position == second.position
        assert torch.equal(first.activations[0], second.activations[0])


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "foreign"])
def test_a_damaged_or_foreign_shard_is_named_and_refused(tmp_path, damage):
    harvest(small(), tmp_path / "cache", CPU)
    shard = tmp_path / "cache" / "training_00001.safetensors"
    content = bytearray(shard.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    elif damage == "truncate":
        shard.write_bytes(content[:-100])
    elif damage == "remove":
        shard.unlink()
    else:
        shard.write_bytes((tmp_path / "cache" / "training_00000.safetensors").read_bytes())
    with pytest.raises(ActivationError, match=r"training_00001\.safetensors"):
        CachedActivations(small(), tmp_path / "cache")


@pytest.mark.parametrize(
    ("setting", "value", "named"),
    [
        ("text__context_length", 16, "text"),
        ("text__shuffle_seed", 5, "text"),
        ("model__name", "random:gpt2", "model"),
        ("model__batch_contexts", 8, "model"),
        ("buffer__dtype", "bfloat16", "stored_dtype"),
    ],
)
def test_a_cache_made_with_other_settings_is_refused(harvested, setting, value, named):
    with pytest.raises(ActivationError, match=f"harvested with {named} ="):
        CachedActivations(small(**{setting: value}), harvested)


def test_a_site_that_was_not_harvested_is_named(harvested):
    with pytest.raises(ActivationError, match=r"not mlp_out\.0"):
        CachedActivations(small(model__sites=["mlp_out.0"]), harvested)


def test_a_newer_format_is_refused_with_advice(harvested, tmp_path):
    manifest = json.loads((harvested / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"format_version": 9}))
    with pytest.raises(ActivationError, match=r"format version 9.*upgrade"):
        CachedActivations(small(), tmp_path)


def test_a_cache_that_ends_before_the_run_says_how_far_it_goes(harvested):
    config = small(training__tokens=25_600)
    with pytest.raises(TextError, match=r"the text is used up: it gave .* 5\d steps"):
        batches(CachedActivations(config, harvested), config, 100)


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("keep me")
    with pytest.raises(ActivationError, match="not empty and holds no harvest"):
        harvest(small(), tmp_path, CPU)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_a_full_disk_stops_the_harvest_before_the_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "free_bytes", lambda _: 0)
    with pytest.raises(ActivationError, match=r"shard training_00000 needs .* free some room"):
        harvest(small(), tmp_path / "cache", CPU)


def test_bfloat16_shards_give_the_batches_of_a_bfloat16_buffer(tmp_path):
    config = small(buffer__dtype="bfloat16")
    harvest(config, tmp_path / "cache", CPU)
    live, cached = LiveActivations(config, CPU), CachedActivations(config, tmp_path / "cache")
    for first, second in zip(batches(live, config, 10), batches(cached, config, 10), strict=True):
        assert torch.equal(first[0], second[0])
