"""An SAE split by features over gloo processes learns what it learns whole."""

import numpy as np
import pytest
import split_training
import torch
from gloo import on_ranks

from unbraid.config import SAEConfig
from unbraid.distributed.ranks import Ranks
from unbraid.distributed.shard import Shard
from unbraid.errors import ConfigError
from unbraid.randomness import generator
from unbraid.sae import build, first_weights

N = 30
SETTINGS = {"n_features": N, "k": 5, "lambda1": 0.02, "dead_after_tokens": 144, "bandwidth": 0.05}

BY_FREQUENCY = {
    "matryoshka_order": "frequency",
    "reorder_from": 3,
    "reorder_every": 2,
    "matryoshka_detach": True,
    "matryoshka_weights": 0.5,
}


ROBUST = {"robust": 1.0, "robust_from": 0.0, "robust_until": 0.5}


def assert_close(found: dict, expected: dict, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        scale = np.linalg.norm(expected[name])
        assert np.linalg.norm(found[name] - expected[name]) <= tolerance * max(scale, 1e-12), name


@pytest.mark.parametrize("size", [3])
def test_a_split_sae_learns_the_weights_of_a_whole_one_on_every_path_in_float64(size):
    """Every architecture that can be split, dead features included, to the rounding of float64."""
    jobs = [
        ({"architecture": architecture, **more}, path)
        for architecture, more in [
            ("relu", {}),
            ("topk", {"aux_k": 3}),
            ("batch_topk", {}),
            ("jumprelu", {}),
            ("jumprelu", {"jumprelu_sparsity": "tanh"}),
            ("gated", {}),
            ("matryoshka", {"matryoshka_widths": [4, 13, N]}),
            ("matryoshka", {"matryoshka_widths": [4, 13, N], **BY_FREQUENCY, **ROBUST}),
            ("denoising", {}),
        ]
        for path in ("sparse", "dense")
    ]
    everything = on_ranks(size, split_training.train_several, SETTINGS, jobs, 12, "float64")
    for job, *found in zip(jobs, *everything, strict=True):
        expected = split_training.train_split(Ranks(), SETTINGS | job[0], 12, job[1], "float64")
        for one in found:
            assert_close(one, expected, 1e-10)


def test_penalties_on_decoder_rows_split_over_ranks_push_as_on_one():
    rows = {"space": "decoder", "fraction": 0.1, "lambda2": 2.0}
    lists = rows | {"push": "rarer", "scan_rows": 8, "neighbours": 4, "interval": 2, "refresh": 3, "floor": 0.05}
    codes = {"space": "co-active", "fraction": 0.1, "lambda2": 2.0}
    penalties = [
        rows | {"path": "tiled"},
        rows | {"path": "tiled", "push": "rarer", "threshold": "running"},
        lists,
        lists | {"by_site": True},
        codes,
        codes | {"window": 3, "push": "rarer"},
        {"method": "orthogonal", "chunk": 11, "lambda2": 2.0},
    ]
    expected = split_training.train_penalised(Ranks(), penalties, 14)
    free = split_training.train_penalised(Ranks(), [rows | {"path": "tiled", "lambda2": 0.0}], 14)[0]
    for one in expected:
        assert np.abs(one["W_dec"] - free["W_dec"]).max() > 1e-3, "it pushes"
    for found in on_ranks(3, split_training.train_penalised, penalties, 14):
        for one, wanted in zip(found, expected, strict=True):
            steps = [name for name in wanted if name.startswith("step")]
            assert all(np.allclose(one.pop(name), wanted[name], 1e-9, 1e-12, equal_nan=True) for name in steps)
            assert_close(one, {name: tensor for name, tensor in wanted.items() if name not in steps}, 1e-9)


@pytest.mark.parametrize("ties", [False, True])
def test_the_top_k_of_all_ranks_is_the_top_k_of_one(ties):
    """Row by row and over a batch; among equals the earlier one, as on a single rank."""
    values_BN = torch.rand(20, 31, generator=generator(0, "values"))
    if ties:
        values_BN = (values_BN * 4).ceil() / 4
    flat = values_BN.flatten()
    for k in (1, 7, 31):
        order_BK = values_BN.sort(dim=1, descending=True, stable=True).indices[:, :k]
        expected_BN = torch.zeros(20, 31, dtype=torch.bool).scatter(1, order_BK, True).numpy()
        expected = flat.sort(descending=True, stable=True).indices[: 20 * k].sort().values.numpy()
        for rows, batch in on_ranks(3, split_training.tops_of_all, values_BN.numpy(), k):
            assert np.array_equal(rows, expected_BN)
            assert np.array_equal(batch, expected)


@pytest.mark.parametrize("width", [5, 70])
def test_first_weights_are_slices_of_the_whole_saes(width, monkeypatch):
    monkeypatch.setattr(first_weights, "ROWS_DRAWN", 16)
    config = SAEConfig(n_features=width)
    whole = build(config, 3, generator(0, "init")).W_dec
    assert torch.equal(
        whole, torch.nn.functional.normalize(torch.randn(width, 3, generator=generator(0, "init")), dim=1)
    )
    for rank in range(4):
        shard = Shard(width, _Seat(rank, 4))
        chance = generator(0, "init")
        assert torch.equal(build(config, 3, chance, shard=shard).W_dec, whole[shard.start : shard.end])


def test_what_cannot_be_split_is_refused():
    config = SAEConfig(architecture="sparse_filtering", n_features=8)
    with pytest.raises(ConfigError, match="cannot be split over 2 ranks"):
        build(config, 3, generator(0, "init"), shard=Shard(8, _Seat(0, 2)))


class _Seat(Ranks):
    """A place among ranks that never talk."""

    def __init__(self, rank: int, size: int):
        super().__init__()
        self.rank, self.size = rank, size
