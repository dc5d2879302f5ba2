"""Transcoders: every architecture from x to y, against plain formulas, against SAEs, and with a skip connection."""

import pytest
import torch
from published_codes import published_codes
from sae_settings import sae_settings
from torch import Tensor

import unbraid
from unbraid.config import DecorrelationConfig, OptimiserConfig, SAEConfig, VariantConfig
from unbraid.errors import ActivationError, ConfigError
from unbraid.formats import save
from unbraid.randomness import generator
from unbraid.sae import SAE, Codes, build
from unbraid.training.normalisation import Normalisation
from unbraid.training.sae_trainer import Target, train_step, trainer_from_settings

B, D, M, N, K = 64, 24, 17, 96, 6
NAMES = ("topk", "batch_topk", "relu", "jumprelu", "gated", "matryoshka")
CASES = {name: {} for name in NAMES} | {
    "jumprelu-tanh": {"architecture": "jumprelu", "jumprelu_sparsity": "tanh"},
    "matryoshka-detached": {"architecture": "matryoshka", "matryoshka_detach": True, "matryoshka_weights": 0.5},
}


def case(name: str, skip: bool) -> tuple[SAE, Tensor, Tensor]:
    """A transcoder with biases and skip away from zero, and a batch of x and y, in float64."""
    chance = torch.Generator().manual_seed(7)
    settings = {"architecture": name, "n_features": N, "k": K, "bandwidth": 0.2, "skip": skip} | CASES[name]
    sae = build(sae_settings(**settings), D, chance, d_out=M).double()
    with torch.no_grad():
        for parameter_name, parameter in sae.named_parameters():
            if parameter.ndim == 1 or parameter_name == "W_skip":
                parameter += 0.05 * torch.randn(parameter.shape, generator=chance)
        if sae.architecture == "jumprelu":
            sae.threshold.abs_().add_(0.05)
    x_BD, y_BM = (torch.randn(B, width, generator=chance).double() / width**0.5 for width in (D, M))
    return sae, x_BD, y_BM


def plain_loss(sae: SAE, x_BD: Tensor, y_BM: Tensor, dead: Tensor) -> Tensor:
    """All losses written out on whole matrices, for autograd alone."""
    config, u_BN = sae.config, x_BD @ sae.W_enc
    skip_BM = 0.0 if sae.W_skip is None else x_BD @ sae.W_skip
    f_BN, sparsity, gate_BN = published_codes(sae, u_BN)
    extra = u_BN.new_zeros(())
    if gate_BN is not None:
        still_BM = (sae.b_dec + skip_BM).detach()
        extra = (y_BM - gate_BN @ sae.W_dec.detach() - still_BM).square().sum(1).mean()
    y_hat_BM = f_BN @ sae.W_dec + sae.b_dec + skip_BM
    loss = (y_BM - y_hat_BM).square().sum(1).mean()
    if sae.architecture == "matryoshka":
        start, inside_BM = 0, sae.b_dec + skip_BM
        for end in (N // 16, N // 4):
            level_BM = inside_BM + f_BN[:, start:end] @ sae.W_dec[start:end]
            extra = extra + config.matryoshka_weights * (y_BM - level_BM).square().sum(1).mean()
            start, inside_BM = end, level_BM.detach() if config.matryoshka_detach else level_BM
    return loss + 0.04 * sparsity + extra + plain_revival(sae, x_BD, (y_BM - y_hat_BM).detach(), dead)


def plain_revival(sae: SAE, x_BD: Tensor, residual_BM: Tensor, dead: Tensor) -> Tensor:
    offset_N = sae.b_gate if sae.architecture == "gated" else sae.b_enc
    offset_N = offset_N - sae.threshold if sae.architecture == "jumprelu" else offset_N
    pre_BA = x_BD @ sae.W_enc[:, dead] + offset_N[dead]
    if sae.config.has_k:
        top = pre_BA.relu().topk(min(D // 2, len(dead)), dim=1)
        f_BA = torch.zeros_like(pre_BA).scatter(1, top.indices, top.values)
        return sae.config.revival_weight * (residual_BM - f_BA @ sae.W_dec[dead]).square().sum(1).mean()
    return sae.config.revival_weight * (-pre_BA).relu().sum() / (B * N)


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
@pytest.mark.parametrize("name", CASES)
def test_both_paths_have_the_gradients_of_plain_formulas(name, skip, path):
    sae, x_BD, y_BM = case(name, skip)
    x_BD.requires_grad_()
    dead_N = torch.arange(N) % 7 == 0
    out = sae.training_forward(x_BD, dead_N, path=path, y_BM=y_BM)
    assert out.path == path and out.x_hat_BD.shape == (B, M)
    mine = out.reconstruction + 0.04 * out.sparsity + out.auxiliary
    theirs = plain_loss(sae, x_BD, y_BM, dead_N.nonzero().squeeze(1))
    assert abs(float(mine.detach() - theirs.detach())) < 1e-10
    names, wanted = [*dict(sae.named_parameters()), "x"], [*sae.parameters(), x_BD]
    for key, own, plain in zip(
        names, *(torch.autograd.grad(loss, wanted, allow_unused=True) for loss in (mine, theirs)), strict=True
    ):
        assert own is not None and plain is not None, key
        assert float(plain.abs().max()) > 0, key
        assert (own - plain).abs().max() <= 1e-10 * plain.abs().max().clamp(min=1), key


def settings_of(name: str, **changes) -> VariantConfig:
    sae = sae_settings(**{"architecture": name, "n_features": N, "k": K, "lambda1": 0.02} | changes)
    none = DecorrelationConfig(method="none")
    return VariantConfig(seed=0, sae=sae, optimiser=OptimiserConfig(warmup_steps=0), decorrelation=none)


def trained(name: str, batches, target: Target | None, steps: int, freeze: bool = True, **changes) -> SAE:
    settings, cpu = settings_of(name, **changes), torch.device("cpu")
    trainer = trainer_from_settings(name, (0,), settings, 0, Normalisation.none(D), cpu, steps=steps, target=target)
    if freeze:
        trainer.sae.b_dec.requires_grad_(False)
    if target is not None:  # A transcoder's encoder is drawn apart.
        with torch.no_grad():
            trainer.sae.encoder_ND.copy_(trainer.sae.W_dec * trainer.sae.initial_encoder_norm())
    for step in range(steps):
        x_BD, y_BM = trainer.rows(batches[step])
        train_step(trainer, x_BD, step, 3e-3, log=step % 5 == 0, y_BM=y_BM)
    return trainer.sae


@pytest.mark.parametrize("name", NAMES)
def test_predicting_the_input_with_a_frozen_decoder_bias_trains_the_weights_of_the_sae(name):
    batches = [[torch.randn(128, D, generator=generator(0, "rows", step)) / D**0.5] * 2 for step in range(20)]
    one = trained(name, batches, None, 20)
    other = trained(name, batches, Target((1,), Normalisation.none(D)), 20)
    assert not one.is_transcoder and other.is_transcoder
    assert one.state_dict().keys() == other.state_dict().keys()
    for key, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key]), key


def pairs(rows: int = 20_000) -> tuple[Tensor, Tensor]:
    """x with a large mean, and y = x A + c."""
    x_RD = torch.randn(rows, D, generator=generator(0, "x")) * torch.linspace(0.5, 2, D) + 30
    return x_RD, x_RD @ torch.randn(D, M, generator=generator(0, "A")) - 5


def r2(y_RM: Tensor, y_hat_RM: Tensor) -> float:
    return float(1 - (y_RM - y_hat_RM).square().sum() / (y_RM - y_RM.mean(0)).square().sum())


def test_a_linear_task_is_solved_by_the_skip_connection_alone():
    x_RD, y_RM = pairs()
    settings = VariantConfig(
        seed=0,
        sae=SAEConfig(architecture="topk", n_features=N, k=1, skip=True),
        optimiser=OptimiserConfig(lr=3e-2, warmup_steps=0),
        decorrelation=DecorrelationConfig(method="none"),
    )
    sae = unbraid.fit(settings, {"x -> y": (x_RD, y_RM)}, batch_tokens=40)["sae"]
    alone = x_RD @ sae.W_skip
    assert r2(y_RM, alone + (y_RM - alone).mean(0)) > 0.999
    assert r2(y_RM, sae(x_RD)) > 0.999


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
@pytest.mark.parametrize("name", NAMES)
def test_folding_mean_and_scale_of_both_ends_changes_units_only_and_files_keep_it(name, skip, tmp_path):
    x_RD, y_RM = (rows.double() for rows in pairs(500))
    reads, writes = Normalisation.of(x_RD), Normalisation.of(y_RM)
    sae, _, _ = case(name, skip)
    with torch.no_grad():
        f_RN, y_hat_RM = sae.encode(reads(x_RD)), sae(reads(x_RD))
    sae.fold(reads.mean_D, reads.scale, writes.mean_D, writes.scale)
    torch.testing.assert_close(sae.encode(x_RD), f_RN / writes.scale)
    torch.testing.assert_close(sae(x_RD), y_hat_RM / writes.scale + writes.mean_D)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(N).double())
    metadata = {"hook_name": "blocks.6.mlp.hook_in", "hook_name_out": "blocks.6.hook_mlp_out"}
    loaded = unbraid.load(save(sae, tmp_path / "sae", metadata=metadata))
    assert loaded.metadata["hook_name_out"] == "blocks.6.hook_mlp_out"
    torch.testing.assert_close(loaded.encode(x_RD), sae.encode(x_RD), rtol=0, atol=0)
    torch.testing.assert_close(loaded(x_RD), sae(x_RD), rtol=0, atol=1e-12)


def test_files_name_the_class_that_saelens_has_for_it(tmp_path):
    import json

    found = {}
    for name in NAMES:
        for skip in (False, True):
            folder = save(case(name, skip)[0].float(), tmp_path / f"{name}{skip}")
            config = json.loads((folder / "cfg.json").read_text())
            assert (config["d_in"], config["d_out"], config["apply_b_dec_to_input"]) == (D, M, False)
            found[name, skip] = config["architecture"]
    assert found["relu", False] == "transcoder" and found["relu", True] == "skip_transcoder"
    for name in ("batch_topk", "jumprelu", "matryoshka"):
        assert (found[name, False], found[name, True]) == ("jumprelu_transcoder", "jumprelu_skip_transcoder")
    assert found["topk", False] == "topk_transcoder"  # unbraid's own


def test_the_skip_connection_trains_as_any_weight_and_starts_at_nothing():
    sae = build(SAEConfig(architecture="topk", n_features=N, k=K, skip=True), D, torch.Generator(), d_out=M)
    assert sae.W_skip is not None and not sae.W_skip.any() and sae.W_skip.shape == (D, M)
    assert sae.encoder_ND.shape == (N, D) and sae.W_dec.shape == (N, M) and sae.b_dec.shape == (M,)


def test_what_cannot_be_a_transcoder_is_refused():
    x_RD, y_RM = pairs(600)
    topk = SAEConfig(architecture="topk", n_features=N, k=K)
    for wrong, words in {
        "no pair": (
            {"x -> y": x_RD},
            r"expected something for each of the 2 names, in this order, as in \{\"x -> y\": \(x, y\)\}",
        ),
        "rows": ({"x -> y": (x_RD, y_RM[:5])}, "expected as many of each"),
        "one name": ({"x": y_RM, "x -> y": (x_RD, y_RM)}, "name 'x' twice"),
    }.values():
        with pytest.raises(ActivationError, match=words):
            unbraid.fit(topk, wrong, batch_tokens=100)
    with pytest.raises(ConfigError, match="the same two ends"):
        unbraid.fit(topk, {"x -> x": (x_RD, x_RD)}, batch_tokens=100)
    with pytest.raises(ConfigError, match=r"sae\.skip is set, and is read for other activations: a transcoder's"):
        unbraid.fit(SAEConfig(architecture="topk", n_features=N, k=K, skip=True), x_RD, batch_tokens=100)
    sae = build(topk, D, torch.Generator(), d_out=M)
    with pytest.raises(ActivationError, match=r"expected \[4, 17\]"):
        sae.training_forward(torch.randn(4, D))


def test_codes_of_either_path_are_the_same_type_as_an_saes():
    sae, x_BD, y_BM = case("topk", True)
    assert isinstance(sae.training_forward(x_BD, path="sparse", y_BM=y_BM).codes, Codes)
