"""The sparse and the dense path against each other and against the published losses written out for autograd."""

import pytest
import torch
from published_codes import published_codes
from sae_settings import sae_settings
from torch import Tensor

from unbraid.config import OptimiserConfig
from unbraid.sae import SAE, Codes, build
from unbraid.sae.build import ARCHITECTURES
from unbraid.training.optimiser import SAEOptimiser

B, D, N, K = 64, 24, 96, 6
CASES = {name: {} for name in ARCHITECTURES} | {
    "jumprelu-wide-window": {"architecture": "jumprelu", "bandwidth": 0.2},
    "jumprelu-tanh": {"architecture": "jumprelu", "jumprelu_sparsity": "tanh", "bandwidth": 0.2},
    "matryoshka-widths": {"architecture": "matryoshka", "matryoshka_widths": [5, 20, 50, 96]},
    "matryoshka-weights": {"architecture": "matryoshka", "matryoshka_weights": [0.7, 0.2]},
    "matryoshka-detached": {"architecture": "matryoshka", "matryoshka_detach": True, "matryoshka_weights": 0.5},
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


def case(name: str, **changes) -> tuple[SAE, Tensor]:
    """An SAE with biases away from zero, and a batch, in float64."""
    generator = torch.Generator().manual_seed(7)
    settings = {"architecture": name, "n_features": N, "k": K} | CASES[name] | changes
    sae = build(sae_settings(**settings), D, generator).double()
    with torch.no_grad():
        for parameter in sae.parameters():
            if parameter.ndim == 1:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        if sae.architecture == "jumprelu":
            sae.threshold.abs_().add_(0.05)
    return sae, (torch.randn(B, D, generator=generator) / D**0.5).double()


def dense(codes: Codes | Tensor) -> Tensor:
    return codes.to_dense() if isinstance(codes, Codes) else codes


def total_loss(sae: SAE, x_BD: Tensor, path, dead_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """All losses, and a penalty on the codes like decorrelation's: smooth, on active entries."""
    out = sae.training_forward(x_BD, dead_N, torch.Generator().manual_seed(3), path=path)
    assert out.path == path
    values = out.codes.values if isinstance(out.codes, Codes) else out.codes
    penalty = (values.square() * values.detach().cos()).sum() / len(x_BD)
    return out.reconstruction + 0.04 * out.sparsity + out.auxiliary + 0.3 * penalty, dense(out.codes)


def gradients(sae: SAE, loss: Tensor, x_BD: Tensor) -> dict[str, Tensor]:
    names = [name for name, _ in sae.named_parameters()]
    grads = torch.autograd.grad(loss, [*sae.parameters(), x_BD])
    return dict(zip([*names, "x"], grads, strict=True))


@pytest.mark.parametrize("with_dead", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_gradients_of_both_paths_agree_to_1e_10(name, with_dead):
    sae, x_BD = case(name)
    x_BD.requires_grad_()
    dead_N = torch.arange(N) % 7 == 0 if with_dead else None
    results = {}
    for path in ("dense", "sparse"):
        loss, codes = total_loss(sae, x_BD, path, dead_N)
        results[path] = gradients(sae, loss, x_BD) | {"loss": loss, "codes": codes}
    assert 0 < (results["dense"]["codes"] > 0).double().mean() < 1
    for key, theirs in results["dense"].items():
        assert (results["sparse"][key] - theirs).abs().max() <= 1e-10 * theirs.abs().max().clamp(min=1), key


def published_loss(sae: SAE, x_BD: Tensor) -> Tensor:
    """Reconstruction + 0.04 * sparsity + own losses + the penalty above, from the papers' formulas, all dense."""
    config, seen_BD = sae.config, x_BD
    if sae.architecture == "denoising":
        noise = torch.randn(x_BD.shape, generator=torch.Generator().manual_seed(3), dtype=x_BD.dtype)
        seen_BD = x_BD + config.corruption * x_BD.square().mean().sqrt() * noise
    u_BN = (seen_BD - sae.b_dec) @ sae.W_enc
    f_BN, sparsity, gate_BN = published_codes(sae, u_BN)
    extra = u_BN.new_zeros(())
    if gate_BN is not None:
        extra = (x_BD - gate_BN @ sae.W_dec.detach() - sae.b_dec.detach()).square().sum(1).mean()
    extra = extra + (x_BD - f_BN @ sae.W_dec - sae.b_dec).square().sum(1).mean()
    if sae.architecture == "matryoshka":
        extra = extra + published_levels(sae, x_BD, f_BN)
    values = f_BN * (f_BN > 0)
    return extra + 0.04 * sparsity + 0.3 * (values.square() * values.detach().cos()).sum() / len(x_BD)


def published_levels(sae: SAE, x_BD: Tensor, f_BN: Tensor) -> Tensor:
    """The losses of Matryoshka's inner levels."""
    config, loss = sae.config, x_BD.new_zeros(())
    *inner, _ = config.matryoshka_widths or [N // 16, N // 4, N]
    weights = config.matryoshka_weights
    order = torch.arange(N)
    if config.matryoshka_order == "frequency":
        order = (f_BN > 0).sum(0).argsort(descending=True, stable=True)
    start, inside_BD = 0, sae.b_dec
    for level, end in enumerate(inner):
        level_BD = inside_BD + f_BN[:, order[start:end]] @ sae.W_dec[order[start:end]]
        weight = weights[level] if isinstance(weights, list) else weights
        loss = loss + weight * (x_BD - level_BD).square().sum(1).mean()
        start, inside_BD = end, level_BD.detach() if config.matryoshka_detach else level_BD
    return loss


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("name", CASES)
def test_both_paths_have_the_gradients_of_the_published_losses(name, path):
    sae, x_BD = case(name)
    x_BD.requires_grad_()
    loss, _ = total_loss(sae, x_BD, path)
    expected = published_loss(sae, x_BD)
    assert abs(float(loss.detach() - expected.detach())) < 1e-10
    mine, theirs = gradients(sae, loss, x_BD), gradients(sae, expected, x_BD)
    for key, wanted in theirs.items():
        assert (mine[key] - wanted).abs().max() <= 1e-10 * wanted.abs().max().clamp(min=1), key


@pytest.mark.parametrize("name", CASES)
def test_fifty_steps_end_with_the_same_weights_on_both_paths(name):
    ends = []
    for path in ("dense", "sparse"):
        sae, _ = case(name, dead_after_tokens=1)
        sae.float()
        optimiser = SAEOptimiser(sae, OptimiserConfig())
        generator = torch.Generator().manual_seed(11)
        for _ in range(50):
            x_BD = torch.randn(256, D, generator=generator) / D**0.5
            out = sae.training_forward(x_BD, torch.arange(N) < 10, generator, path=path)
            optimiser.zero_grad()
            (out.reconstruction + 0.04 * out.sparsity + out.auxiliary).backward()
            optimiser.step(1e-3)
        ends.append({key: value.detach() for key, value in sae.state_dict().items()})
    for key, theirs in ends[0].items():
        assert (ends[1][key] - theirs).norm() <= 1e-4 * theirs.norm(), key


@pytest.mark.parametrize("name", CASES)
def test_no_gradient_reaches_features_that_did_not_fire(name):
    sae, x_BD = case(name)
    out = sae.training_forward(x_BD, None, torch.Generator().manual_seed(3), path="sparse")
    out.reconstruction.backward()
    silent = ~(dense(out.codes) > 0).any(0)
    assert (sae.W_dec.grad[silent] == 0).all() and (sae.encoder_ND.grad[silent] == 0).all()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_density_below_the_crossover_takes_the_sparse_path(name):
    sae, x_BD = case(name, k=2)
    with torch.no_grad():
        for bias in ("b_enc", "b_gate"):
            if hasattr(sae, bias) and not sae.architecture.startswith(("topk", "batch", "matry")):
                getattr(sae, bias).fill_(-0.5)
    assert sae.training_forward(x_BD, None, torch.Generator()).path == "sparse"
    wide, x_BD = case(name, k=60)
    assert wide.training_forward(x_BD, None, torch.Generator()).path == "dense"


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_batch_on_which_nothing_fires_still_has_a_gradient(name, path):
    sae, x_BD = case(name)
    with torch.no_grad():
        for bias in ("b_enc", "b_gate"):
            if hasattr(sae, bias):
                getattr(sae, bias).fill_(-9.0)
    loss, codes = total_loss(sae, x_BD, path, torch.ones(N, dtype=torch.bool))
    loss.backward()
    assert not codes.any()
    assert all(torch.isfinite(p.grad).all() for p in sae.parameters() if p.grad is not None)
    assert sae.b_dec.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bfloat16_autocast_changes_codes_by_rounding_only_and_keeps_float32_weights(name):
    sae, x_BD = case(name)
    sae, x_BD = sae.float(), x_BD.float()
    exact = sae.training_forward(x_BD, None, torch.Generator().manual_seed(3), path="sparse")
    for path in ("sparse", "dense"):
        with torch.autocast("cpu", torch.bfloat16):
            out = sae.training_forward(x_BD, torch.arange(N) < 9, torch.Generator().manual_seed(3), path=path)
        (out.reconstruction + out.sparsity + out.auxiliary).backward()
        assert out.x_hat_BD.dtype == dense(out.codes).dtype == torch.float32
        assert (out.x_hat_BD - exact.x_hat_BD).norm() < 0.1 * exact.x_hat_BD.norm()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in sae.parameters())
