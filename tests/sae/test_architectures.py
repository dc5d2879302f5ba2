"""What every SAE promises a caller, and what each architecture promises beyond it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_settings import sae_settings

from unbraid.config import OptimiserConfig, SAEConfig, validated
from unbraid.errors import ActivationError, ConfigError
from unbraid.sae import SAE, Codes, build
from unbraid.sae.build import ARCHITECTURES
from unbraid.training.optimiser import SAEOptimiser

D, N, K = 16, 64, 4


def make(architecture: str, seed: int = 0, **settings) -> SAE:
    settings = {"n_features": N, "k": K} | settings
    return build(sae_settings(architecture, **settings), D, torch.Generator().manual_seed(seed))


def batch(rows: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed)) / D**0.5


def train(sae: SAE, steps: int, lr: float = 1e-3, lambda1: float = 0.04, rows: int = 128) -> SAEOptimiser:
    optimiser = SAEOptimiser(sae, OptimiserConfig())
    for step in range(steps):
        out = sae.training_forward(batch(rows, step), None, torch.Generator().manual_seed(step))
        optimiser.zero_grad()
        (out.reconstruction + lambda1 * out.sparsity + out.auxiliary).backward()
        optimiser.step(lr)
    return optimiser


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_weight_starts_at_zero_and_the_seed_decides_them_all(name):
    sae, again, other = make(name), make(name), make(name, seed=1)
    assert (sae.W_dec.norm(dim=1) - 1).abs().max() < 1e-6
    assert (sae.encoder_ND.norm(dim=1) > 0.01).all() and (sae.W_dec != 0).all()
    for key, tensor in sae.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key])
    assert not torch.equal(sae.W_dec, other.W_dec)


def test_the_decoder_bias_starts_at_zero_and_the_encoder_at_a_multiple_of_the_decoder():
    config = SAEConfig(architecture="relu", n_features=N, decoder_init_norm=0.25)
    sae = build(config, D, torch.Generator().manual_seed(0))
    assert not sae.b_dec.any() and sae.b_dec.dtype == torch.float32
    torch.testing.assert_close(sae.encoder_ND, 0.25 * sae.W_dec)


@pytest.mark.parametrize("name", ["relu", "topk", "batch_topk"])
def test_the_encoder_starts_at_the_multiple_of_the_decoder_that_reconstructs_best(name):
    config = sae_settings(name, n_features=1024, k=32)
    x_BD = torch.randn(256, 128, generator=torch.Generator().manual_seed(1)) / 128**0.5

    def loss(factor: float) -> float:
        sae = build(config, 128, torch.Generator().manual_seed(0))
        with torch.no_grad():
            sae.encoder_ND *= factor
        return sae.training_forward(x_BD).reconstruction.item()

    assert loss(1.0) < min(loss(0.8), loss(1.25))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_encode_and_decode_take_any_leading_dimensions(name):
    sae = make(name)
    train(sae, 2)
    x = batch(12)
    f = sae.encode(x)
    assert f.shape == (12, N) and (f >= 0).all()
    for shape in ((3, 4), (2, 2, 3), (12,)):
        torch.testing.assert_close(sae.encode(x.view(*shape, D)), f.view(*shape, N))
        torch.testing.assert_close(sae(x.view(*shape, D)), sae.decode(f).view(*shape, D))
    torch.testing.assert_close(sae.encode(x[0]), f[0])
    assert sae.encode(x[:0]).shape == (0, N)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_rows_codes_do_not_depend_on_its_neighbours(name):
    sae = make(name)
    train(sae, 5)
    x = batch(50)
    together = sae.encode(x)
    for row in (0, 17, 49):
        torch.testing.assert_close(sae.encode(x[row : row + 1])[0], together[row])
    torch.testing.assert_close(sae.encode(torch.cat([x[:1], 100 * x[1:]]))[0], together[0])


@pytest.mark.parametrize("scale", [0.05, 37.0])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_folding_mean_and_scale_changes_no_reconstruction(name, scale):
    sae = make(name)
    with torch.no_grad():
        for parameter in sae.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)).abs()
    train(sae, 5)
    x, mean_D = batch(40), torch.linspace(-3, 5, D)
    codes, wanted = sae.encode(x), mean_D + sae(x) / scale
    assert codes.any()
    sae.fold(mean_D, scale)
    raw = mean_D + x / scale
    assert (sae(raw) - wanted).norm() <= 1e-5 * wanted.norm()
    torch.testing.assert_close(sae.encode(raw) * scale, codes, rtol=1e-4, atol=1e-4)
    assert (sae.W_dec.norm(dim=1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training_lowers_the_loss_and_keeps_decoder_rows_on_the_unit_sphere(name):
    sae = make(name)
    losses = []
    optimiser = SAEOptimiser(sae, OptimiserConfig())
    truth_ND = torch.eye(D).roll(1, 1)[: D // 2]
    for step in range(60):
        x_BD = batch(128, step).relu()[:, : D // 2] @ truth_ND
        out = sae.training_forward(x_BD, None, torch.Generator().manual_seed(step))
        losses.append(out.reconstruction.item())
        optimiser.zero_grad()
        (out.reconstruction + 0.01 * out.sparsity + out.auxiliary).backward()
        optimiser.step(1e-2)
        assert (sae.W_dec.norm(dim=1) - 1).abs().max() <= 1e-5
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_state_dict_alone_restores_the_sae(name):
    sae, fresh = make(name), make(name, seed=5)
    train(sae, 3)
    fresh.load_state_dict(sae.state_dict())
    x = batch(20)
    assert torch.equal(fresh.encode(x), sae.encode(x))
    one, two = (s.training_forward(x, None, torch.Generator().manual_seed(0)) for s in (sae, fresh))
    assert torch.equal(one.x_hat_BD, two.x_hat_BD)


@pytest.mark.parametrize("name", ["relu", "topk", "gated", "jumprelu", "sparse_filtering"])
def test_training_codes_are_the_inference_codes_where_rows_are_independent(name):
    sae = make(name)
    train(sae, 3)
    x = batch(30)
    for path in ("dense", "sparse"):
        codes = sae.training_forward(x, path=path).codes
        torch.testing.assert_close(codes.to_dense() if isinstance(codes, Codes) else codes, sae.encode(x))


@pytest.mark.parametrize("shape", [(0, D), (4, D + 1), (2, 2, D)])
def test_a_batch_of_the_wrong_shape_is_refused_with_the_shape_expected(shape):
    with pytest.raises(ActivationError, match=rf"expected \[B, {D}\]"):
        make("topk").training_forward(torch.zeros(shape))


def test_more_active_features_than_features_are_refused():
    with pytest.raises(ConfigError, match=r"sae\.k is 65"):
        make("topk", k=65)
    assert (make("topk", k=N).encode(batch(3)) > 0).any()


@pytest.mark.parametrize("widths", [[], [0, 64], [8, 8, 64], [32, 8, 64], [8, 32]])
def test_matryoshka_widths_that_do_not_nest_are_refused(widths):
    with pytest.raises(ConfigError, match="matryoshka_widths"):
        validated(SAEConfig, {"architecture": "matryoshka", "n_features": 64, "matryoshka_widths": widths}, "test")


# --- TopK ---


def test_topk_keeps_exactly_the_k_largest():
    sae, x = make("topk"), batch(30)
    f = sae.encode(x)
    assert ((f > 0).sum(1) == K).all()
    torch.testing.assert_close(f.sum(1), sae.preactivations(x).topk(K, dim=1).values.sum(1))


def test_topk_drops_entries_that_are_not_positive():
    sae = make("topk", k=60)
    codes = sae.training_forward(batch(30), path="sparse").codes
    assert (codes.values > 0).all() and codes.values.numel() < 30 * 60


# --- BatchTopK and Matryoshka ---


@pytest.mark.parametrize("name", ["batch_topk", "matryoshka"])
def test_batch_topk_shares_b_times_k_entries_among_the_rows(name):
    sae = make(name)
    codes = sae.training_forward(batch(100), path="sparse").codes
    assert codes.values.numel() == 100 * K
    assert codes.offsets.diff().unique().numel() > 1
    dense = sae.preactivations(batch(100)).relu()
    torch.testing.assert_close(codes.values.sum(), dense.flatten().topk(100 * K).values.sum())


@pytest.mark.parametrize("name", ["batch_topk", "matryoshka"])
def test_one_training_batch_is_enough_for_an_inference_threshold(name):
    sae, x = make(name), batch(200)
    smallest = sae.training_forward(x, path="sparse").codes.values.min().item()
    assert sae.threshold.item() == pytest.approx(smallest)
    assert (sae.encode(x) > 0).sum() == 200 * K - 1


@pytest.mark.parametrize("name", ["batch_topk", "matryoshka"])
def test_the_inference_threshold_gives_k_active_features_after_a_short_run(name):
    sae = make(name)
    train(sae, 40, lr=3e-4)
    active = (sae.encode(batch(2000, 999)) > 0).sum(1).float().mean().item()
    assert active == pytest.approx(K, rel=0.1)


def test_the_inference_threshold_is_a_running_mean_of_each_batchs_smallest_value():
    sae, expected = make("batch_topk", threshold_decay=0.75), None
    for seed in range(4):
        codes = sae.training_forward(batch(64, seed), path="sparse").codes
        smallest = codes.values.min().item()
        expected = smallest if expected is None else 0.75 * expected + 0.25 * smallest
    assert sae.threshold.item() == pytest.approx(expected, rel=1e-5)
    assert "threshold" in sae.state_dict()


def test_matryoshka_sums_the_losses_of_its_prefixes():
    sae, x = make("matryoshka", matryoshka_widths=[8, 32, 64]), batch(50)
    out = sae.training_forward(x, path="sparse")
    f = out.codes.to_dense()
    losses = [(x - f[:, :w] @ sae.W_dec[:w] - sae.b_dec).square().sum(1).mean() for w in (8, 32, 64)]
    torch.testing.assert_close(out.auxiliary, losses[0] + losses[1])
    torch.testing.assert_close(out.reconstruction, losses[2])


# --- JumpReLU ---


@given(st.integers(0, 10_000), st.sampled_from([0.02, 0.3]), st.sampled_from(["dense", "sparse"]))
def test_jumprelu_thresholds_have_the_straight_through_gradients_of_the_paper(seed, bandwidth, path):
    sae = make("jumprelu", bandwidth=bandwidth, initial_threshold=0.1).double()
    x = batch(40, seed).double()
    out = sae.training_forward(x, path=path)
    by_reconstruction = torch.autograd.grad(out.reconstruction, sae.threshold, retain_graph=True)[0]
    by_sparsity = torch.autograd.grad(out.sparsity, sae.threshold)[0]

    pre = sae.preactivations(x).detach()
    inside = ((pre - 0.1).abs() < bandwidth / 2).double()
    f = pre * (pre > 0.1)
    g_f = -2 * (x - f @ sae.W_dec - sae.b_dec) @ sae.W_dec.T / len(x)
    torch.testing.assert_close(by_reconstruction, -(0.1 / bandwidth) * (inside * g_f).sum(0), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(by_sparsity, -inside.sum(0) / bandwidth / len(x), rtol=1e-6, atol=1e-9)
    assert out.sparsity.item() == pytest.approx((f > 0).sum(1).double().mean().item())


def test_jumprelu_thresholds_never_become_negative():
    sae = make("jumprelu", initial_threshold=1e-6, bandwidth=0.5)
    train(sae, 20, lr=3e-2, lambda1=0.0)
    assert (sae.threshold >= 0).all() and (sae.threshold == 0).any()


# --- Gated ---


def test_the_gates_reconstruction_leaves_the_decoder_alone():
    sae, x = make("gated"), batch(40)
    for path in ("dense", "sparse"):
        sae.zero_grad()
        sae.training_forward(x, path=path).auxiliary.backward()
        assert sae.W_dec.grad is None or not sae.W_dec.grad.any()
        assert sae.b_gate.grad.any() and sae.encoder_ND.grad.any()


# --- Comparators ---


def test_denoising_corrupts_what_the_encoder_sees_and_reconstructs_the_clean_input():
    sae, clean = make("denoising", corruption=0.5), make("relu")
    x = batch(400)
    seen = sae.corrupted(x, torch.Generator().manual_seed(0))
    noise, signal = (seen - x).square().mean().sqrt(), x.square().mean().sqrt()
    assert noise.item() == pytest.approx(0.5 * signal.item(), rel=0.05)
    out = sae.training_forward(x, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(out.reconstruction, (x - clean(seen)).square().sum(1).mean())
    torch.testing.assert_close(sae.encode(x), clean.encode(x))


def test_sparse_filtering_does_not_mind_how_strongly_a_feature_fires():
    sae, x = make("sparse_filtering"), batch(40)
    codes = sae.training_forward(x, path="sparse").codes
    louder = codes.with_values(codes.values * torch.where(codes.indices % 2 == 0, 3.0, 1.0))
    torch.testing.assert_close(sae.sparsity(codes), sae.sparsity(louder))
    one_each = Codes.from_dense(torch.eye(8))
    assert sae.sparsity(one_each).item() == pytest.approx(1.0)
