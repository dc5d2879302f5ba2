"""Training on worlds: the same SAE again, alone or beside others."""

import pytest
import torch
from sae_settings import sae_settings

from unbraid.config import DecorrelationConfig, OptimiserConfig, VariantConfig
from unbraid.decorrelation.penalty import SelectiveDecorrelation
from unbraid.errors import TrainingError
from unbraid.synthetic import build_world
from unbraid.synthetic.learning import train_on_world


def variant(seed: int = 3, architecture: str = "topk", lambda2: float = 0.1) -> VariantConfig:
    return VariantConfig(
        seed=seed,
        sae=sae_settings(architecture, n_features=16, k=2),
        decorrelation=DecorrelationConfig(lambda2=lambda2, space="decoder"),
        optimiser=OptimiserConfig(lr=3e-3, warmup_steps=2),
    )


def test_an_sae_trained_beside_others_is_the_one_trained_alone():
    world = build_world("unit")
    variants = [variant(lambda2=0.0), variant(architecture="relu"), variant()]
    beside = train_on_world(world, variants, samples=2048, batch=256)
    for settings, sae in zip(variants, beside, strict=True):
        (alone,) = train_on_world(world, [settings], samples=2048, batch=256)
        assert all(torch.equal(sae.state_dict()[name], value) for name, value in alone.state_dict().items())
    assert not torch.equal(beside[0].W_dec, beside[2].W_dec)
    x_BD, _ = world.sample(64, torch.Generator().manual_seed(0))
    assert beside[0].encode(x_BD).shape == (64, 16)


def test_a_penalty_of_your_own_takes_the_place_of_the_settings():
    world = build_world("unit")
    (expected,) = train_on_world(world, [variant(lambda2=0.3)], samples=2048, batch=256)
    own = SelectiveDecorrelation(space="decoder")
    settings = [variant(lambda2=0.3).model_copy(update={"decorrelation": DecorrelationConfig(lambda2=0.3)})] * 2
    by_own, by_settings = train_on_world(world, settings, samples=2048, batch=256, penalties=[own, None])
    assert torch.equal(by_own.W_dec, expected.W_dec) and not torch.equal(by_settings.W_dec, expected.W_dec)


def test_training_on_a_world_refuses_no_step_and_seeds_that_differ():
    world = build_world("unit")
    with pytest.raises(TrainingError, match="gives no step"):
        train_on_world(world, [variant()], samples=10, batch=256)
    with pytest.raises(TrainingError, match=r"seeds \[3, 4\]"):
        train_on_world(world, [variant(), variant(seed=4)], samples=2048, batch=256)
