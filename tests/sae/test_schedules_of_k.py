"""k on its way down, and features ordered by how often they fire: exact values, and a training that is interrupted."""

import pytest
import torch
from sae_settings import sae_settings

import unbraid
from unbraid.config import DecorrelationConfig, OptimiserConfig, SAEConfig, VariantConfig, validated
from unbraid.errors import ConfigError
from unbraid.formats import dictionary_learning, sae_lens
from unbraid.randomness import generator
from unbraid.sae import SAE, build
from unbraid.sae.topk import on_the_way
from unbraid.synthetic import build_world
from unbraid.synthetic.learning import train_on_world

N, D, B = 64, 16, 32
RECIPE = {
    "architecture": "matryoshka",
    "n_features": 16,
    "k": 2,
    "k_start": 6,
    "matryoshka_widths": [2, 4, 8, 16],
    "matryoshka_order": "frequency",
    "reorder_from": 4,
    "reorder_every": 3,
    "matryoshka_detach": True,
    "matryoshka_weights": 0.5,
}


def batch(seed: int = 0, rows: int = B) -> torch.Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed)) / D**0.5


def made(**settings) -> SAE:
    return build(sae_settings(**({"n_features": N, "k": 4} | settings)), D, torch.Generator().manual_seed(0))


def active(sae: SAE, step: int, steps: int) -> float:
    sae.begin_step(step, steps)
    out = sae.training_forward(batch())
    return float(((out.codes.to_dense() if out.path == "sparse" else out.codes) > 0).sum()) / B


@pytest.mark.parametrize(
    ("shape", "half"), [("linear", 10.0), ("geometric", 8.0), ("cosine", 10.0)], ids=["linear", "geometric", "cosine"]
)
def test_k_falls_from_start_to_end_over_its_share_of_the_steps(shape, half):
    sae = made(architecture="batch_topk", k_start=16, k_fall=0.5, k_shape=shape)
    assert active(sae, 0, 100) == 16
    assert active(sae, 25, 100) == half
    assert active(sae, 50, 100) == active(sae, 99, 100) == 4
    assert on_the_way(16, 4, shape, 0.25) > on_the_way(16, 4, shape, 0.3)


def test_topk_rounds_k_and_batch_topk_does_not():
    topk = made(architecture="topk", k_start=8)
    assert active(topk, 10, 100) == pytest.approx(8, abs=0.5) and topk.training_k == pytest.approx(7.6)
    assert active(made(architecture="batch_topk", k_start=8), 10, 100) == round(7.6 * B) / B


def test_inference_keeps_the_final_k():
    sae = made(architecture="topk", k_start=16)
    sae.begin_step(0, 10)
    assert (sae.encode(batch()) > 0).sum(1).max() <= 4


def test_levels_hold_the_features_that_fire_most():
    sae = made(architecture="matryoshka", matryoshka_order="frequency", reorder_from=3, reorder_every=10)
    frequency_N = torch.zeros(N)
    for step in range(3):
        assert torch.equal(sae.position_N, torch.arange(N))
        codes = sae.training_forward(batch(step), path="sparse").codes.to_dense()
        frequency_N = 0.99 * frequency_N + 0.01 * (codes > 0).float().mean(0)
    in_order = frequency_N[sae.position_N.argsort()]
    assert (in_order.diff() <= 1e-9).all() and not torch.equal(sae.position_N, torch.arange(N))
    before = sae.position_N.clone()
    sae.training_forward(batch(9), path="dense")
    assert torch.equal(sae.position_N, before)


def test_a_detached_level_trains_only_the_features_it_adds():
    sae = made(architecture="matryoshka", matryoshka_widths=[8, 24, N], matryoshka_detach=True)
    out = sae.training_forward(batch(), path="sparse")
    (out.auxiliary).backward()
    plain = made(architecture="matryoshka", matryoshka_widths=[8, N], matryoshka_detach=True)
    plain.training_forward(batch(), path="sparse").auxiliary.backward()
    torch.testing.assert_close(sae.W_dec.grad[:8], plain.W_dec.grad[:8])
    assert (sae.W_dec.grad[8:24] != 0).any() and (sae.W_dec.grad[24:] == 0).all()


def test_what_only_training_needs_is_not_among_the_weights():
    recipe, plain = build(SAEConfig(**RECIPE), D, generator(0)), made(architecture="matryoshka", n_features=16)
    assert recipe.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("form", ["sae_lens", "dictionary_learning"])
def test_a_trained_recipe_is_a_plain_sae_in_every_layout(tmp_path, form):
    sae, x_BD = build(SAEConfig(**RECIPE), D, generator(0)), batch(5)
    for step in range(6):
        sae.training_forward(batch(step))
    {"sae_lens": sae_lens, "dictionary_learning": dictionary_learning}[form].save(sae, tmp_path / "sae")
    loaded = unbraid.load(tmp_path / "sae")
    torch.testing.assert_close(loaded.encode(x_BD), sae.encode(x_BD))
    assert loaded.config == sae.config


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"matryoshka_weights": [0.5]}, "2 inner levels"),
        ({"matryoshka_weights": -0.5}, "at least 0"),
        ({"matryoshka_widths": [4, N], "matryoshka_weights": [0.5, 0.5]}, "1 inner levels"),
        ({"k_start": 2}, "k falls from it"),
        ({"k_start": N + 1}, "k falls from it"),
    ],
)
def test_weights_that_fit_no_level_and_a_k_that_does_not_fall_are_refused(wrong, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        validated(SAEConfig, {"architecture": "matryoshka", "n_features": N, "k": 4} | wrong, "sae")


class Killed(Exception):
    """The process ended here."""


def test_a_training_killed_between_orderings_with_k_falling_ends_with_the_same_bytes(tmp_path):
    world, penalty = build_world("unit"), DecorrelationConfig(space="decoder", lambda2=0.0)
    settings = VariantConfig(
        seed=1, sae=SAEConfig(**RECIPE), decorrelation=penalty, optimiser=OptimiserConfig(lr=3e-3, warmup_steps=2)
    )

    def killed(done: int, trainers: list) -> None:
        if done == 9:
            raise Killed

    whole = train_on_world(world, [settings], 16 * 128, 128)[0]
    with pytest.raises(Killed):
        train_on_world(world, [settings], 16 * 128, 128, killed, checkpoints=tmp_path, checkpoint_every=8)
    resumed = train_on_world(world, [settings], 16 * 128, 128, checkpoints=tmp_path)[0]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert torch.equal(whole.position_N, resumed.position_N) and torch.equal(whole.frequency_N, resumed.frequency_N)
