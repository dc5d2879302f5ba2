"""Harvested activations: the same batches as live, and no damaged, foreign or unfinished shard is ever trained on."""

import itertools
import json
from pathlib import Path

import pytest
import torch

import unbraid
from unbraid import recipes
from unbraid.activations import cache
from unbraid.activations.buffer import ActivationBuffer
from unbraid.activations.cache import CachedActivations, harvest
from unbraid.activations.live import LiveActivations
from unbraid.config import RunConfig, validated
from unbraid.errors import ActivationError, TextError
from unbraid.files import held

CPU = torch.device("cpu")


def small(**settings) -> RunConfig:
    data = recipes.tiny().model_dump()
    data["training"] |= {"tokens": 25_600, "held_out_tokens": 512}
    for path, value in settings.items():
        group, name = path.split("__")
        data[group][name] = value
    return validated(RunConfig, data, "test")


@pytest.fixture(scope="module")
def harvested(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "tiny"
    harvest(small(), folder, CPU)
    return folder


def batches(source, config: RunConfig, number: int = 100):
    planned = config.steps * config.training.batch_tokens
    buffer = ActivationBuffer(source, config.buffer, config.training.batch_tokens, config.seed, planned_rows=planned)
    return [buffer.next_batch() for _ in range(number)]


def assert_same_first_hundred_batches(config: RunConfig, folder: Path) -> None:
    live = batches(LiveActivations(config, CPU), config)
    cached = batches(CachedActivations(config, folder), config)
    assert len(live) == len(cached) == 100
    for live_batch, cached_batch in zip(live, cached, strict=True):
        assert all(torch.equal(first, second) for first, second in zip(live_batch, cached_batch, strict=True))


def test_training_from_a_cache_sees_the_hundred_batches_live_training_sees(harvested):
    assert_same_first_hundred_batches(small(), harvested)


@pytest.mark.slow
def test_training_from_a_cache_sees_the_hundred_batches_live_training_sees_on_smollm2(tmp_path):
    data = recipes.demo().model_dump()
    data["model"]["sites"] = ["resid_post.0", "resid_post.2"]
    data["training"] |= {"tokens": 100 * 128, "batch_tokens": 128, "held_out_tokens": 256}
    config = validated(RunConfig, data, "test")
    harvest(config, tmp_path / "cache", CPU)
    assert_same_first_hundred_batches(config, tmp_path / "cache")


def test_a_run_from_a_cache_ends_with_the_bytes_of_a_live_run(harvested, tmp_path):
    live = unbraid.train(small(), tmp_path / "live").path
    cached = unbraid.train(small().model_copy(update={"cache": str(harvested)}), tmp_path / "cached").path
    weights = [path.relative_to(live) for path in live.glob("saes/*/sae_weights.safetensors")]
    assert len(weights) == 4
    for name in (Path("metrics.jsonl"), *weights):
        assert (live / name).read_bytes() == (cached / name).read_bytes()


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
    config = small(training__tokens=51_200)
    with pytest.raises(TextError, match=r"the text is used up: it gave .* 10\d steps"):
        batches(CachedActivations(config, harvested), config, 200)


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("keep me")
    with pytest.raises(ActivationError, match="not empty and holds no harvest"):
        harvest(small(), tmp_path, CPU)
    assert (tmp_path / "precious.txt").read_text() == "keep me"
    assert {path.name for path in tmp_path.iterdir()} <= {"precious.txt", ".lock"}


def test_two_harvests_into_one_folder_are_refused(tmp_path):
    with held(tmp_path), pytest.raises(ActivationError, match="another process is harvesting"):
        harvest(small(), tmp_path, CPU)


def test_a_cache_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ActivationError, match="cannot write the cache"):
        harvest(small(), tmp_path / "file" / "cache", CPU)


def test_a_full_disk_stops_the_harvest_before_the_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "free_bytes", lambda _: 0)
    with pytest.raises(ActivationError, match=r"shard training_00000 needs .* free some space"):
        harvest(small(), tmp_path / "cache", CPU)


def test_bfloat16_shards_give_the_batches_of_a_bfloat16_buffer(tmp_path):
    config = small(buffer__dtype="bfloat16")
    harvest(config, tmp_path / "cache", CPU)
    live, cached = LiveActivations(config, CPU), CachedActivations(config, tmp_path / "cache")
    for first, second in zip(batches(live, config, 10), batches(cached, config, 10), strict=True):
        assert torch.equal(first[0], second[0])
