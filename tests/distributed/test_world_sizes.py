"""What a run learns does not depend on how many processes train it, nor on how many go on with it."""

import numpy as np
import pytest
import split_training
from gloo import on_ranks

from unbraid.distributed.mesh import shards_per_sae
from unbraid.distributed.ranks import ALONE


def assert_same_run(found: list[dict], expected: dict) -> None:
    """Weights to 1e-5 relative, the pairs of every step identical."""
    weights = {name: tensor for rank in found for name, tensor in rank["weights"].items()}
    assert weights.keys() == expected["weights"].keys()
    for name, tensor in expected["weights"].items():
        assert np.linalg.norm(weights[name] - tensor) <= 1e-5 * np.linalg.norm(tensor), name
    pairs = {seed: steps for rank in found for seed, steps in rank["pairs"].items()}
    assert pairs == expected["pairs"]
    assert all(len(steps) == split_training.SPLIT["steps"] for steps in pairs.values())


ARCHITECTURES = ("relu", "topk", "batch_topk")


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list[dict]:
    """Runs of one process, an architecture each."""
    return split_training.train_runs(ALONE, str(tmp_path_factory.mktemp("alone")), ARCHITECTURES)


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_any_number_of_ranks_learns_the_same_weights_and_selects_the_same_pairs(size, alone, tmp_path):
    found = on_ranks(size, split_training.train_runs, str(tmp_path), ARCHITECTURES)
    for runs, expected in zip(zip(*found, strict=True), alone, strict=True):
        assert sum(len(pairs) for steps in expected["pairs"].values() for pairs in steps) > 500
        assert_same_run(list(runs), expected)
        assert all(run["log lines"] == split_training.SPLIT["steps"] // 5 + 1 for run in (expected, runs[0]))


def test_trained_on_four_resumed_on_two_then_on_one_is_trained_on_one(tmp_path):
    """Checkpoints are cut anew for however many read them: weights, moments, windows, selections."""
    rows = {"space": "decoder", "push": "rarer", "scan_rows": 16, "refresh": 3, "fraction": 0.05}
    variants = {"each": {}, "window": {"decorrelation.window": 4, "decorrelation.measure": "pearson"}}
    variants |= {"rows": {f"decorrelation.{name}": value for name, value in rows.items()}}
    config = split_training.run_config({"architecture": "topk"}, variants, feature_shards=4)
    (alone,) = on_ranks(1, split_training.train_run, str(tmp_path / "1"), config)
    moved, steps = str(tmp_path / "moved"), split_training.SPLIT["steps"]
    parts = [on_ranks(4, split_training.train_run, moved, config, 17)[0]]
    parts.append(on_ranks(2, split_training.train_run, moved, config, 16)[0])
    (last,) = on_ranks(1, split_training.train_run, moved, config)
    for seed, expected in alone["pairs"].items():
        found = [pairs for part in (*parts, last) for pairs in part["pairs"][seed]]
        assert len(found) == steps and found == expected
    for name, tensor in alone["weights"].items():
        assert np.linalg.norm(last["weights"][name] - tensor) <= 1e-5 * np.linalg.norm(tensor), name
    assert len((tmp_path / "moved" / "metrics.jsonl").read_text().splitlines()) == steps // 5 + 1


def test_saes_are_dealt_out_to_cells_and_end_with_the_bytes_of_one_process(tmp_path):
    """Sites x variants on a grid: nothing is summed across cells, so not a bit differs."""
    config = split_training.run_config({"architecture": "topk"}, {"a": {}, "b": {"seed": 3}})
    (alone,) = on_ranks(1, split_training.train_run, str(tmp_path / "1"), config)
    found = on_ranks(2, split_training.train_run, str(tmp_path / "2"), config)
    assert [sorted({name.split(".W_dec")[0] for name in rank["weights"] if "W_dec" in name}) for rank in found] == [
        ["resid_post.0_a"],
        ["resid_post.0_b"],
    ]
    weights = found[0]["weights"] | found[1]["weights"]
    assert all(np.array_equal(weights[name], tensor) for name, tensor in alone["weights"].items())
    assert (tmp_path / "1" / "metrics.jsonl").read_bytes() == (tmp_path / "2" / "metrics.jsonl").read_bytes()


def test_model_passes_are_shared_and_every_rank_gets_the_same_chunks(tmp_path):
    (alone,) = on_ranks(1, split_training.chunks_of_tiny, 7)
    for found in on_ranks(3, split_training.chunks_of_tiny, 7):
        assert len(found) == len(alone) == 9
        for (tokens, activations, position), (t, a, p) in zip(found, alone, strict=True):
            assert np.array_equal(tokens, t) and position == p
            assert all(np.array_equal(one, other) for one, other in zip(activations, a, strict=True))


@pytest.mark.parametrize(
    "size, saes, most, shards",
    [(1, 6, None, 1), (4, 6, None, 1), (4, 2, None, 2), (4, 1, None, 4), (4, 6, 4, 4), (6, 1, 4, 3)],
)
def test_the_grid_is_filled_before_saes_are_split(size, saes, most, shards):
    assert shards_per_sae(size, saes, most) == shards
