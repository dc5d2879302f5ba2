"""Dead features: the auxiliary losses match their formulas, reach the encoder, and bring features back."""

import pytest
import torch
from sae_settings import sae_settings

from unbraid.config import DecorrelationConfig, OptimiserConfig, SAEConfig, VariantConfig
from unbraid.sae import SAE, build
from unbraid.sae.build import ARCHITECTURES
from unbraid.sae.dead import dead_after
from unbraid.synthetic import build_world
from unbraid.synthetic.learning import train_on_world
from unbraid.training.optimiser import SAEOptimiser

D, N, K = 16, 64, 4
TOPK_FAMILY = ["topk", "batch_topk", "matryoshka"]
THRESHOLDED = [name for name in ARCHITECTURES if name not in TOPK_FAMILY]


def make(architecture: str, **settings) -> SAE:
    settings = {"n_features": N, "k": K} | settings
    return build(sae_settings(architecture, **settings), D, torch.Generator().manual_seed(0))


def batch(rows: int = 64, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed)) / D**0.5


def own_losses(sae: SAE, x: torch.Tensor) -> torch.Tensor:
    return sae.training_forward(x, generator=torch.Generator().manual_seed(0)).auxiliary


@pytest.mark.parametrize("n_dead", [3, 20])
def test_aux_k_lets_the_largest_dead_features_explain_the_residual(n_dead):
    sae, x = make("topk", aux_k=5, aux_weight=0.5).double(), batch().double()
    dead = torch.zeros(N, dtype=torch.bool)
    dead[torch.randperm(N, generator=torch.Generator().manual_seed(4))[:n_dead]] = True
    out = sae.training_forward(x, dead)
    f = sae.preactivations(x).relu()[:, dead]
    kept = f.topk(min(5, n_dead), dim=1)
    f = torch.zeros_like(f).scatter(1, kept.indices, kept.values)
    residual = (x - out.x_hat_BD).detach()
    torch.testing.assert_close(out.auxiliary, 0.5 * (residual - f @ sae.W_dec[dead]).square().sum(1).mean())


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("name", TOPK_FAMILY)
def test_aux_k_gradients_reach_encoder_and_decoder_of_dead_features_only(name, path):
    sae, x = make(name), batch()
    dead = torch.arange(N) < 10
    without = own_losses(sae, x)
    auxiliary = sae.training_forward(x, dead, path=path).auxiliary - without.detach()
    (auxiliary - own_losses(sae, x) + without.detach()).backward()
    for weight in (sae.encoder_ND, sae.W_dec):
        assert weight.grad[dead].abs().sum(1).min() > 0
        assert weight.grad[~dead].abs().max() < 1e-6


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_without_dead_features_or_weight_there_is_no_auxiliary_loss(name):
    sae, x = make(name), batch()
    expected = own_losses(sae, x)
    for dead in (None, torch.zeros(N, dtype=torch.bool)):
        out = sae.training_forward(x, dead, torch.Generator().manual_seed(0))
        assert torch.equal(out.auxiliary, expected)
    everything = torch.ones(N, dtype=torch.bool)
    off = make(name, aux_weight=0.0).training_forward(x, everything, torch.Generator().manual_seed(0))
    assert torch.equal(off.auxiliary, expected)
    if name in TOPK_FAMILY:
        assert torch.equal(make(name, aux_k=0).training_forward(x, everything).auxiliary, expected)


@pytest.mark.parametrize("name", THRESHOLDED)
def test_features_below_their_threshold_are_pulled_up_by_their_distance(name):
    sae, x = make(name, aux_weight=0.5, corruption=0.0).double(), batch().double()
    bias = sae.b_gate if name == "gated" else sae.b_enc
    with torch.no_grad():
        bias[:10] -= 3
    dead = torch.arange(N) < 10
    extra = sae.training_forward(x, dead, torch.Generator()).auxiliary - own_losses(sae, x)
    below = (sae.threshold[:10] if name == "jumprelu" else 0) - sae.preactivations(x)[:, :10]
    torch.testing.assert_close(extra, 0.5 * below.relu().sum(1).mean() / N)


@pytest.mark.parametrize(
    ("settings", "run_tokens", "expected"),
    [
        ({"architecture": "batch_topk", "n_features": 4096, "k": 25}, 5_000_000, 50 * 4096 / 25),
        ({"architecture": "topk", "n_features": 16_384, "k": 64}, 1_000_000_000, 1_000_000),
        ({"architecture": "matryoshka", "n_features": 64, "k": 4}, 0, 800),
        ({"architecture": "relu", "n_features": 4096}, 5_000_000, 1_000_000),
        ({"architecture": "topk", "n_features": 64, "k": 4, "dead_after_tokens": 7}, 5_000_000, 7),
    ],
)
def test_a_feature_is_dead_when_it_fires_a_fiftieth_as_often_as_the_mean_or_a_thousandth_of_the_run_apart(
    settings, run_tokens, expected
):
    assert dead_after(SAEConfig(**settings), run_tokens) == round(expected)


@pytest.mark.slow
def test_features_that_fire_once_in_many_thousand_tokens_by_chance_are_revived():
    """On a world whose features are all common a feature that hardly fires is of no use, however recent its last time.

    Waiting for a long silence finds none of them: that is how a quarter of the features died on the full world.
    """
    world, left = build_world("unit"), {}
    for waits in (None, 500_000):
        sae = SAEConfig(architecture="batch_topk", n_features=48, k=2, dead_after_tokens=waits)
        settings = VariantConfig(
            seed=0,
            sae=sae,
            decorrelation=DecorrelationConfig(lambda2=0.0),
            optimiser=OptimiserConfig(lr=1e-2, warmup_steps=20),
        )
        trained = train_on_world(world, [settings], 400 * 256, 256)[0]
        x_BD, _ = world.sample(8192, torch.Generator().manual_seed(1))
        left[waits] = int(((trained.encode(x_BD) > 0).sum(0) < 8192 * 2 / 48 / 50).sum())
    assert left[None] <= 2 and left[500_000] >= 8


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_dead_features_come_back(name):
    sae = make(name, aux_weight=0.5)
    dead = torch.arange(N) < 10
    with torch.no_grad():
        if name in TOPK_FAMILY:
            sae.encoder_ND[dead] *= 0.1
        elif name == "gated":
            sae.b_gate[dead] -= 1.2
            sae.b_mag += 0.05
        else:
            sae.b_enc[dead] -= 1.2
    if hasattr(sae, "threshold"):
        sae.training_forward(batch())
    assert not (sae.encode(batch(500)) > 0)[:, dead].any()
    optimiser = SAEOptimiser(sae, OptimiserConfig())
    for step in range(300):
        out = sae.training_forward(batch(64, step), dead, torch.Generator().manual_seed(step))
        optimiser.zero_grad()
        (out.reconstruction + out.auxiliary).backward()
        optimiser.step(1e-2)
        fired = (out.codes.to_dense() if out.path == "sparse" else out.codes) > 0
        dead &= ~fired.any(0)
    assert not dead.any()
