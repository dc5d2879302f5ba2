"""Decoder rows that learn less from tokens of large error: against the formula, on both paths, and interrupted."""

import pytest
import torch
from sae_settings import sae_settings

from unbraid.config import DecorrelationConfig, OptimiserConfig, SAEConfig, VariantConfig
from unbraid.errors import ConfigError
from unbraid.sae import SAE, Codes, build
from unbraid.sae.build import ARCHITECTURES
from unbraid.sae.robust import DECAY, FLOOR
from unbraid.synthetic import build_world
from unbraid.synthetic.learning import train_on_world

B, D, N, K, POWER = 64, 24, 96, 6, 1.5
CASES = {name: {} for name in ARCHITECTURES} | {
    "matryoshka-frequency": {
        "architecture": "matryoshka",
        "matryoshka_widths": [5, 20, 50, 96],
        "matryoshka_order": "frequency",
        "reorder_from": 1,
        "reorder_every": 1,
        "matryoshka_detach": True,
        "matryoshka_weights": [0.5, 0.25, 2.0],
    },
}


def case(name: str, **changes) -> tuple[SAE, list[torch.Tensor]]:
    """An SAE with biases away from zero, and three batches, in float64."""
    chance = torch.Generator().manual_seed(7)
    settings = {"architecture": name, "n_features": N, "k": K, "robust": POWER} | CASES[name] | changes
    sae = build(sae_settings(**settings), D, chance).double()
    with torch.no_grad():
        for parameter in sae.parameters():
            if parameter.ndim == 1:
                parameter += 0.05 * torch.randn(parameter.shape, generator=chance)
        if sae.architecture == "jumprelu":
            sae.threshold.abs_().add_(0.05)
    return sae, [(torch.randn(B, D, generator=chance) / D**0.5).double() for _ in range(3)]


def gradients(sae: SAE, x_BD: torch.Tensor, path) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Of all losses; also the codes and the tokens' errors."""
    out = sae.training_forward(x_BD, None, torch.Generator().manual_seed(3), path=path)
    names = [name for name, _ in sae.named_parameters()]
    total = out.reconstruction + 0.04 * out.sparsity + out.auxiliary
    grads = dict(zip(names, torch.autograd.grad(total, [*sae.parameters()]), strict=True))
    f_BN = out.codes.to_dense() if isinstance(out.codes, Codes) else out.codes
    return grads, f_BN.detach(), (x_BD - out.x_hat_BD).detach().square().sum(1)


@pytest.mark.parametrize("path", ["sparse", "dense"])
@pytest.mark.parametrize("name", CASES)
def test_decoder_gradients_follow_the_formula_to_1e_10_and_others_stay(name, path):
    robust, batches = case(name)
    plain, _ = case(name, robust=0.0)
    robust.begin_step(99, 100)
    fired_N, error_N, weight_N = torch.zeros(3, N, dtype=torch.float64)
    for x_BD in batches:
        theirs, f_BN, error_B = gradients(plain, x_BD, path)
        found, own_BN, _ = gradients(robust, x_BD, path)
        assert torch.equal(own_BN, f_BN)
        fires_BN = (f_BN > 0).double()
        fired_N = DECAY * fired_N + fires_BN.sum(0)
        error_N = DECAY * error_N + error_B @ fires_BN
        w_BN = (error_B[:, None] / (error_N / fired_N.clamp(min=1e-30)).clamp(min=1e-30) + FLOOR) ** -POWER
        weight_N = DECAY * weight_N + (w_BN * fires_BN).sum(0)
        v_BN = w_BN * fired_N / weight_N.clamp(min=1e-30)
        wanted = decoder_gradient(plain, x_BD, f_BN, v_BN)
        unweighed = decoder_gradient(plain, x_BD, f_BN, torch.ones_like(v_BN))
        rest = theirs["W_dec"] - unweighed
        assert (unweighed - wanted).abs().max() > 1e-3  # the weights matter
        assert (found["W_dec"] - rest - wanted).abs().max() <= 1e-10
        for parameter in set(found) - {"W_dec"}:
            assert (found[parameter] - theirs[parameter]).abs().max() <= 1e-10, parameter


def decoder_gradient(sae: SAE, x_BD: torch.Tensor, f_BN: torch.Tensor, v_BN: torch.Tensor) -> torch.Tensor:
    """sum_b v_bn f_bn dL/dx_hat_b over the levels that hold feature n, all dense."""
    config, order = sae.config, torch.arange(N)
    ends, weights = [N], [1.0]
    if sae.architecture == "matryoshka":
        ends = config.matryoshka_widths or [N // 16, N // 4, N]
        own = config.matryoshka_weights
        weights = [*(own if isinstance(own, list) else [own] * (len(ends) - 1)), 1.0]
        if config.matryoshka_order == "frequency":
            order = sae.position_N.argsort()
    gradient_ND, start = torch.zeros(N, D, dtype=torch.float64), 0
    detached = getattr(config, "matryoshka_detach", False)
    for end, weight in zip(ends, weights, strict=True):
        inside = order[:end]
        g_BD = -2 * weight * (x_BD - f_BN[:, inside] @ sae.W_dec[inside] - sae.b_dec).detach() / B
        learns = inside if not detached or end == N else order[start:end]
        gradient_ND[learns] += (f_BN * v_BN)[:, learns].T @ g_BD
        start = end
    return gradient_ND


def test_before_its_time_nothing_is_changed():
    robust, (x_BD, *_) = case("topk")
    plain, _ = case("topk", robust=0.0)
    robust.begin_step(40, 100)
    for name, theirs in gradients(plain, x_BD, "sparse")[0].items():
        assert torch.equal(gradients(robust, x_BD, "sparse")[0][name], theirs)
    robust.begin_step(60, 100)
    assert robust.robust.power == pytest.approx(POWER / 2)


@pytest.mark.parametrize("architecture", ["matryoshka", "relu"])
def test_an_interrupted_training_ends_with_the_same_bytes(tmp_path, architecture):
    world, kind = build_world("small"), {"k": 3} if architecture == "matryoshka" else {"lambda1": 0.02}
    settings = VariantConfig(
        seed=0,
        sae=SAEConfig(architecture=architecture, n_features=32, robust=1.0, robust_from=0.2, robust_until=0.6, **kind),
        decorrelation=DecorrelationConfig(method="none"),
        optimiser=OptimiserConfig(lr=1e-3, warmup_steps=2),
    )

    class Interrupted(Exception):
        pass

    def stop(step, trainers):
        if step == 14:
            raise Interrupted

    whole = train_on_world(world, [settings], 24 * 64, 64)[0]
    with pytest.raises(Interrupted):
        train_on_world(world, [settings], 24 * 64, 64, stop, checkpoints=tmp_path, checkpoint_every=6)
    again = train_on_world(world, [settings], 24 * 64, 64, checkpoints=tmp_path, checkpoint_every=6)[0]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def test_what_contradicts_itself_is_refused():
    with pytest.raises(ConfigError, match=r"robust_until is 0\.3"):
        SAEConfig(architecture="topk", robust=1.0, robust_from=0.5, robust_until=0.3)
    with pytest.raises(ConfigError, match="frozen"):
        SAEConfig(architecture="topk", robust=1.0, frozen="decoder")
