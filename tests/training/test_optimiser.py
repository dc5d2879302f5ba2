"""The optimiser against Adam written out, its geometry, its refusals and its state."""

import math

import pytest
import torch
from sae_settings import sae_settings

from unbraid.config import OptimiserConfig
from unbraid.errors import TrainingError
from unbraid.sae import SAE, build
from unbraid.training.optimiser import NEAR, SAEOptimiser

D, N = 12, 600


def make(architecture: str = "topk", seed: int = 0) -> SAE:
    config = sae_settings(architecture, n_features=N, k=4)
    return build(config, D, torch.Generator().manual_seed(seed))


def give_gradients(sae: SAE, seed: int, size: float = 0.01) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in sae.parameters():
        parameter.grad = size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def adam_by_hand(weights, moments, gradients, step, lr, config):
    """One step for every tensor, in float64, decoder made tangent before and unit after."""
    gradients = dict(gradients)
    W = weights["W_dec"]
    gradients["W_dec"] = gradients["W_dec"] - (gradients["W_dec"] * W).sum(1, keepdim=True) * W
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
    shrink = 1.0 if config.clip_norm is None else min(1.0, config.clip_norm / norm)
    b1, b2 = config.betas
    for name, g in gradients.items():
        g = g * shrink
        m, v = moments[name]
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        moments[name] = (m, v)
        weights[name] = weights[name] - lr * (m / (1 - b1**step)) / ((v / (1 - b2**step)).sqrt() + config.eps)
        if name == "threshold":
            weights[name] = weights[name].clamp(min=0)
    weights["W_dec"] = weights["W_dec"] / weights["W_dec"].norm(dim=1, keepdim=True)
    return norm


@pytest.mark.parametrize("clip_norm", [None, 0.5, 100.0])
@pytest.mark.parametrize("architecture", ["topk", "gated", "jumprelu"])
def test_steps_are_those_of_adam_on_the_sphere(architecture, clip_norm):
    config = OptimiserConfig(clip_norm=clip_norm, betas=(0.8, 0.99))
    sae = make(architecture).double()
    optimiser = SAEOptimiser(sae, config)
    weights = {name: p.detach().clone() for name, p in sae.named_parameters()}
    moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in weights.items()}
    for step in range(1, 5):
        give_gradients(sae, step)
        gradients = {name: p.grad.clone() for name, p in sae.named_parameters()}
        norm = adam_by_hand(weights, moments, gradients, step, 1e-3 * step, config)
        assert optimiser.step(1e-3 * step) == pytest.approx(norm, rel=1e-6)
        optimiser.zero_grad()
        for name, parameter in sae.named_parameters():
            torch.testing.assert_close(parameter.detach(), weights[name], rtol=1e-6, atol=1e-9)


def test_decoder_rows_stay_on_the_unit_sphere_however_large_the_steps():
    sae = make()
    optimiser = SAEOptimiser(sae, OptimiserConfig())
    for step in range(50):
        give_gradients(sae, step, size=10.0)
        optimiser.step(0.3)
        assert (sae.W_dec.norm(dim=1) - 1).abs().max() <= 1e-5


def test_a_gradient_along_the_rows_moves_nothing():
    sae = make()
    optimiser = SAEOptimiser(sae, OptimiserConfig(clip_norm=None))
    before = sae.W_dec.detach().clone()
    sae.W_dec.grad = 5 * sae.W_dec.detach().clone()
    sae.encoder_ND.grad = torch.zeros_like(sae.encoder_ND)
    assert optimiser.step(1e-8) < 1e-4
    torch.testing.assert_close(sae.W_dec.detach(), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("parameter", ["W_dec", "b_dec"])
def test_a_gradient_that_is_not_finite_stops_before_any_weight_changes(poison, parameter):
    sae = make()
    optimiser = SAEOptimiser(sae, OptimiserConfig())
    give_gradients(sae, 0)
    optimiser.step(1e-3)
    before = {name: tensor.clone() for name, tensor in (sae.state_dict() | optimiser.state_tensors()).items()}
    give_gradients(sae, 1)
    getattr(sae, parameter).grad.view(-1)[3] = poison
    with pytest.raises(TrainingError, match="no weight was changed"):
        optimiser.step(1e-3)
    after = sae.state_dict() | optimiser.state_tensors()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_saved_state_continues_to_the_same_bytes():
    one, two = make(), make()
    first, second = SAEOptimiser(one, OptimiserConfig()), SAEOptimiser(two, OptimiserConfig())
    for step in range(6):
        give_gradients(one, step)
        first.step(1e-3)
        if step == 2:
            two.load_state_dict(one.state_dict())
            second.load_state_tensors({name: tensor.clone() for name, tensor in first.state_tensors().items()})
        if step > 2:
            give_gradients(two, step)
            second.step(1e-3)
    for name, tensor in (one.state_dict() | first.state_tensors()).items():
        assert torch.equal(tensor, (two.state_dict() | second.state_tensors())[name]), name


def test_state_of_another_architecture_or_shape_is_refused():
    optimiser, state = SAEOptimiser(make(), OptimiserConfig()), SAEOptimiser(make(), OptimiserConfig()).state_tensors()
    with pytest.raises(TrainingError, match=r"b_gate"):
        optimiser.load_state_tensors(SAEOptimiser(make("gated"), OptimiserConfig()).state_tensors())
    with pytest.raises(TrainingError, match=r"W_dec\.exp_avg.*\(3, 12\).*\(600, 12\)"):
        optimiser.load_state_tensors(state | {"W_dec.exp_avg": torch.zeros(3, D)})


def test_parameters_without_a_gradient_are_left_alone():
    sae = make("relu")
    optimiser = SAEOptimiser(sae, OptimiserConfig())
    sae.encoder_ND.grad = torch.full_like(sae.encoder_ND, 0.1)
    before = sae.b_dec.detach().clone()
    assert optimiser.step(1e-2) > 0
    assert torch.equal(sae.b_dec, before) and not torch.equal(sae.encoder_ND, sae.W_dec)


@pytest.mark.parametrize("frozen", ["decoder", "near", "encoder"])
def test_what_is_frozen_stays_as_drawn_or_near_it_and_the_rest_learns(frozen):
    sae = build(sae_settings("topk", n_features=N, k=4, frozen=frozen), D, torch.Generator().manual_seed(0))
    optimiser = SAEOptimiser(sae, OptimiserConfig())
    start = {name: p.detach().clone() for name, p in sae.named_parameters()}
    for step in range(60):
        give_gradients(sae, step % 3, 1.0)
        optimiser.step(3e-2)
    moved = {name for name, p in sae.named_parameters() if not torch.equal(p, start[name])}
    assert moved == set(start) - {{"decoder": "W_dec", "encoder": "encoder_ND", "near": ""}[frozen]}
    cosine_N = (sae.W_dec * start["W_dec"]).sum(1)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(N), atol=1e-5)
    if frozen == "near":
        assert (cosine_N > NEAR - 1e-5).all() and (cosine_N < NEAR + 1e-3).double().mean() > 0.5
    if frozen == "encoder":
        assert (cosine_N < NEAR).any()


def test_rows_that_must_stay_near_go_on_from_a_checkpoint():
    settings = sae_settings("topk", n_features=N, k=4, frozen="near")
    one, two = (build(settings, D, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    first, second = SAEOptimiser(one, OptimiserConfig()), SAEOptimiser(two, OptimiserConfig())
    for step in range(30):
        give_gradients(one, step, 1.0)
        first.step(3e-2)
        if step == 10:
            two.load_state_dict(one.state_dict())
            second.load_state_tensors({name: tensor.clone() for name, tensor in first.state_tensors().items()})
        if step > 10:
            give_gradients(two, step, 1.0)
            second.step(3e-2)
    assert torch.equal(one.W_dec, two.W_dec)
