"""Dictionaries of several sites: the published formulas, scales of each site's own, and what cannot be one."""

import pytest
import torch
from sae_settings import sae_settings
from torch import Tensor
from torch.nn import functional as F

import unbraid
from unbraid.config import OptimiserConfig, RunConfig, SAEConfig, VariantConfig, validated
from unbraid.config.decorrelation import DecorrelationConfig
from unbraid.errors import ActivationError, ConfigError, EvaluationError, FormatError
from unbraid.formats import save
from unbraid.randomness import generator
from unbraid.sae import ARCHITECTURES
from unbraid.sae.build import build
from unbraid.sae.crosscoder import exclusive_features, relative_norms
from unbraid.sae.site_norms import summed_norms
from unbraid.sites import Route
from unbraid.training.normalisation import Normalisation
from unbraid.training.sae_trainer import ends, train_step, trainer_from_settings
from unbraid.training.start import start_from

WIDTHS, N, K = [6, 10, 4], 40, 5
D = sum(WIDTHS)
SIZES = [1.0, 30.0, 0.05]
"""Of each site's activations."""


def rows(number: int = 600) -> list[Tensor]:
    """Activations of three sites that share what causes them, of very different sizes, with means of their own."""
    cause_RC = F.relu(torch.randn(number, 12, generator=generator(0, "causes"), dtype=torch.float64))
    drawn = (torch.randn(12, width, generator=generator(1, "sites", width), dtype=torch.float64) for width in WIDTHS)
    return [size * (cause_RC @ mix + 3.0) for size, mix in zip(SIZES, drawn, strict=True)]


def case(name: str, d_out: int | None = None, **changes):
    settings = sae_settings(**{"architecture": name, "n_features": N, "k": K} | changes)
    sae = build(settings, D, generator(0, "init"), d_out=d_out).double()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator(2, "off"), dtype=torch.float64))
        sae.W_dec.copy_(F.normalize(sae.W_dec, dim=1))
    return sae


@pytest.mark.parametrize("path", ["sparse", "dense"])
def test_loss_and_gradients_are_those_of_an_encoder_and_a_decoder_for_each_site(path):
    """f = TopK(sum_l (x_l - b_l) W_enc_l + b_enc), y_l = f W_dec_l + b_l, loss = mean sum_l ||x_l - y_l||^2."""
    sae = case("topk")
    parts = [x / x.square().sum(1).mean().sqrt() / 3**0.5 for x in (x - x.mean(0) for x in rows(64))]
    sae.metadata["widths_out"] = WIDTHS
    out = sae.training_forward(torch.cat(parts, 1), path=path)
    (out.reconstruction + out.auxiliary).backward()

    encoders = [part.detach().requires_grad_() for part in sae.encoder_ND.split(WIDTHS, 1)]
    decoders = [part.detach().requires_grad_() for part in sae.by_site(sae.W_dec)]
    offsets = [part.detach().requires_grad_() for part in sae.by_site(sae.b_dec)]
    pre = sum((x - b) @ w.T for x, b, w in zip(parts, offsets, encoders, strict=True)) + sae.b_enc.detach()
    kept = pre.topk(K, dim=1)
    f_BN = torch.zeros_like(pre).scatter(1, kept.indices, kept.values.relu())
    errors = [x - (f_BN @ w + b) for x, b, w in zip(parts, offsets, decoders, strict=True)]
    loss = sum(error.square().sum(1).mean() for error in errors)
    loss.backward()
    assert out.reconstruction.item() == pytest.approx(loss.item(), rel=1e-10)
    for whole, one_by_one in ((sae.encoder_ND.grad, encoders), (sae.W_dec.grad, decoders), (sae.b_dec.grad, offsets)):
        torch.testing.assert_close(whole, torch.cat([part.grad for part in one_by_one], -1), rtol=1e-10, atol=1e-12)


def test_each_site_has_the_same_share_of_the_training_units():
    parts = rows()
    both = Normalisation.side_by_side([Normalisation.of(x) for x in parts])
    units = both(torch.cat(parts, 1)).split(WIDTHS, 1)
    for part in units:
        assert part.square().sum(1).mean() == pytest.approx(1 / 3, rel=1e-6)
        assert part.mean(0).abs().max() < 1e-6


@pytest.mark.parametrize("d_out", [None, D], ids=["crosscoder", "transcoder"])
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_folding_scales_of_each_site_changes_units_only_and_files_keep_it(name, d_out, tmp_path):
    parts = rows()
    x_RD = torch.cat(parts, 1)
    units = Normalisation.side_by_side([Normalisation.of(x) for x in parts])
    sae = case(name, d_out, **({"skip": True} if d_out else {}))
    with torch.no_grad():
        f_RN, y_hat_RM = sae.encode(units(x_RD)), sae(units(x_RD))
    sae.fold(units.mean_D, units.scale, units.mean_D, units.scale)
    found = sae.encode(x_RD)
    fires = f_RN > 0
    assert torch.equal(found > 0, fires) and fires.any()
    unit = (f_RN[fires] / found[fires]).unique()
    torch.testing.assert_close(
        unit, unit[:1].expand_as(unit), msg="codes change by one number, which keeps their order"
    )
    torch.testing.assert_close(sae(x_RD), y_hat_RM / units.scale + units.mean_D)
    loaded = unbraid.load(save(sae, tmp_path / "sae", metadata={"widths_out": WIDTHS}))
    torch.testing.assert_close(loaded(x_RD), sae(x_RD), rtol=0, atol=1e-12)
    assert [part.shape[1] for part in loaded.by_site(loaded.W_dec)] == WIDTHS


def fitted(activations, **settings):
    config = VariantConfig(
        seed=0,
        sae=SAEConfig(architecture="topk", n_features=N, k=K, **settings),
        optimiser=OptimiserConfig(lr=3e-3, warmup_steps=0),
        decorrelation=DecorrelationConfig(method="none"),
    )
    return unbraid.fit(config, activations, batch_tokens=50)["sae"]


def test_a_crosscoder_learns_every_site_whatever_its_size():
    parts = [x.float() for x in rows(20_000)]
    crosscoder = fitted({"a + b + c": tuple(parts)})
    assert not crosscoder.is_transcoder and crosscoder.d_in == crosscoder.d_out == D
    for x, y in zip(parts, crosscoder.by_site(crosscoder(torch.cat(parts, 1))), strict=True):
        assert 1 - (x - y).square().sum() / (x - x.mean(0)).square().sum() > 0.8


def test_one_layer_of_a_cross_layer_transcoder_reads_one_site_and_predicts_two():
    x, y, z = (x.float() for x in rows(20_000))
    transcoder = fitted({"x -> y + z": (x, y, z)})
    assert transcoder.is_transcoder and (transcoder.d_in, transcoder.d_out) == (6, 14)
    for wanted, found in zip((y, z), transcoder.by_site(transcoder(x)), strict=True):
        assert 1 - (wanted - found).square().sum() / (wanted - wanted.mean(0)).square().sum() > 0.5


def published_codes(parts: list[Tensor], encoders: list[Tensor], bias: Tensor, decoders: list[Tensor]) -> Tensor:
    """f of the published crosscoder, whose top k are chosen by activation times summed decoder norms."""
    pre = (sum(x @ w.T for x, w in zip(parts, encoders, strict=True)) + bias).relu()
    kept = (pre * sum(w.norm(dim=1) for w in decoders)).topk(K, dim=1).indices
    return torch.zeros_like(pre).scatter(1, kept, pre.gather(1, kept))


@pytest.mark.parametrize("name", ["topk", "relu"])
def test_rows_whose_norms_sum_to_one_weigh_sparsity_as_published(name):
    """Codes and L1 penalty are those of the published formula, whatever sizes it gives rows and codes."""
    parts = [x.float() for x in rows(4_000)]
    units = Normalisation.side_by_side([Normalisation.of(x) for x in parts])
    variant = VariantConfig(
        seed=0,
        sae=sae_settings(architecture=name, n_features=N, k=K, row_norm="sum"),
        optimiser=OptimiserConfig(lr=1e-2, warmup_steps=0),
        decorrelation=DecorrelationConfig(space="decoder", lambda2=0.1, fraction=0.1),
    )
    trainer = trainer_from_settings("one", (0, 1, 2), variant, 0, units, torch.device("cpu"), steps=40)
    sae, first = trainer.sae, trainer.sae.W_dec.detach().clone()
    for step in range(40):
        x_BD, _ = trainer.rows([x[100 * step : 100 * (step + 1)] for x in parts])
        train_step(trainer, x_BD, step, 1e-2, log=False)
    sums = summed_norms(sae.W_dec, WIDTHS)
    torch.testing.assert_close(sums, torch.ones(N, 1))
    assert not torch.equal(first, sae.W_dec) and (sae.W_dec.norm(dim=1) < 0.99).any()
    x_BD = trainer.rows([x[:200] for x in parts])[0]
    # Any other sizes of rows and codes with the same products are the same to the published formula.
    size_N1 = torch.rand(N, 1, generator=generator(3, "sizes")) + 0.5
    encoders = [part / size_N1 for part in sae.encoder_ND.split(WIDTHS, 1)]
    decoders = [part * size_N1 for part in sae.W_dec.split(WIDTHS, 1)]
    bias_N = (sae.b_enc - sae.encoder_ND @ sae.b_dec) / size_N1.squeeze(1)
    if name == "topk":
        found = published_codes(list(x_BD.split(WIDTHS, 1)), encoders, bias_N, decoders)
        torch.testing.assert_close(sae.encode(x_BD), found * size_N1.squeeze(1), rtol=1e-4, atol=1e-5)
    else:
        out = sae.training_forward(x_BD, path="dense")
        f_BN = (sum(x @ w.T for x, w in zip(x_BD.split(WIDTHS, 1), encoders, strict=True)) + bias_N).relu()
        published = (f_BN * sum(w.norm(dim=1) for w in decoders)).sum(1).mean()
        assert out.sparsity.item() == pytest.approx(published.item(), rel=1e-4)
    raw = torch.cat([x[:200] for x in parts], 1)
    y_hat = sae(x_BD)
    trainer.fold()
    torch.testing.assert_close(sae(raw), y_hat / units.scale.float() + units.mean_D, rtol=1e-3, atol=1e-3)


def test_a_start_from_elsewhere_takes_rows_whose_norms_sum_to_one_and_computes_the_same(tmp_path):
    parts = [x.float() for x in rows(600)]
    start = fitted({"a + b + c": tuple(parts)})
    path = save(start, tmp_path / "start", metadata=start.metadata)
    variant = VariantConfig(
        seed=0,
        sae=SAEConfig(architecture="topk", n_features=N, k=K, row_norm="sum", start_from=str(path)),
        optimiser=OptimiserConfig(),
        decorrelation=DecorrelationConfig(method="none"),
    )
    units = Normalisation.side_by_side([Normalisation.of(x) for x in parts])
    trainer = trainer_from_settings("one", (0, 1, 2), variant, 0, units, torch.device("cpu"), steps=10)
    start_from(trainer)
    torch.testing.assert_close(summed_norms(trainer.sae.W_dec, WIDTHS), torch.ones(N, 1))
    x_RD = torch.cat(parts, 1)
    wanted = units(start(x_RD))
    fires = (trainer.sae.encode(units(x_RD)) > 0) == (start.encode(x_RD) > 0)
    same = fires.all(1)
    assert same.double().mean() > 0.3, "a top-k ranks features by other sizes now"
    torch.testing.assert_close(trainer.sae(units(x_RD))[same], wanted[same], rtol=1e-3, atol=1e-3)


def test_the_setting_is_refused_where_one_site_is_predicted():
    topk = SAEConfig(architecture="topk", n_features=N, k=K, row_norm="sum")
    with pytest.raises(ConfigError, match="those of several sites that are predicted"):
        unbraid.fit(topk, torch.randn(512, 8), batch_tokens=64)
    with pytest.raises(ConfigError, match="a list in which several are predicted"):
        validated(RunConfig, {"model": {"sites": ["resid_post.0"]}, "sae": {"row_norm": "sum"}}, "test")
    with pytest.raises(ConfigError, match=r"sae\.frozen"):
        validated(
            RunConfig,
            {"model": {"sites": ["resid_post.0 + resid_post.1"]}, "sae": {"row_norm": "sum", "frozen": "near"}},
            "test",
        )


def test_routes_name_several_sites_at_either_end():
    crosscoder = Route.parse("resid_post.2+resid_post.5 +  resid_post.8")
    assert str(crosscoder) == "resid_post.2 + resid_post.5 + resid_post.8" and not crosscoder.is_transcoder
    assert crosscoder.folder == "resid_post.2--and--resid_post.5--and--resid_post.8"
    one_layer = Route.parse("mlp_in.3 -> mlp_out.3 + mlp_out.4")
    assert one_layer.is_transcoder and [str(site) for site in one_layer.ends] == ["mlp_in.3", "mlp_out.3", "mlp_out.4"]
    units = [Normalisation(torch.zeros(2), scale) for scale in (1.0, 2.0, 4.0)]
    inputs, reads, target = ends(one_layer, one_layer.ends, units)
    assert inputs == (0,) and reads.scale == 1.0
    assert target is not None and target.sites == (1, 2) and len(target.normalise.mean_D) == 4


@pytest.mark.parametrize(
    ("text", "words"),
    {
        "resid_post.2 + resid_post.2": "names a site twice at one end",
        "resid_post.2 + ": "is not understood",
        "resid_post.2 + resid_post.3 -> resid_post.3 + resid_post.2": "has the same two ends",
        "resid_post.2 -> resid_post.3 -> resid_post.4": "has 3 ends",
    }.items(),
)
def test_what_is_no_route_is_refused(text, words):
    with pytest.raises(ConfigError, match=words):
        Route.parse(text)


def test_what_does_not_fit_several_names_is_refused(tmp_path):
    parts = tuple(x.float() for x in rows())
    topk = SAEConfig(architecture="topk", n_features=N, k=K)
    with pytest.raises(ActivationError, match="expected something for each of the 3 names"):
        unbraid.fit(topk, {"a + b + c": parts[:2]}, batch_tokens=100)
    with pytest.raises(ConfigError, match="stands on several sites"):
        _ = Route.parse("resid_post.2 + resid_post.3").reads
    for wrong in ([3, 4], "6", [6, 10, -4, 8], []):
        folder = save(case("topk"), tmp_path / "sae", metadata={"widths_out": wrong})
        with pytest.raises(FormatError, match="widths_out is"):
            unbraid.load(folder)


def test_features_of_one_site_alone_are_told_from_shared_ones():
    """Two things that only the second place has: two features write there alone, and none of a copy of the first."""
    fires_RC = torch.rand(40_000, 16, generator=generator(3, "fires")) < 0.06
    cause_RC = fires_RC * (1 + torch.rand(40_000, 16, generator=generator(3, "causes")))
    mix = torch.linalg.qr(torch.randn(24, 16, generator=generator(4, "mix")))[0].T
    base, tuned = cause_RC[:, :14] @ mix[:14], cause_RC @ mix
    config = VariantConfig(
        seed=0,
        sae=SAEConfig(architecture="batch_topk", n_features=20, k=1),
        optimiser=OptimiserConfig(lr=3e-3, warmup_steps=0),
        decorrelation=DecorrelationConfig(method="none"),
    )
    found = unbraid.fit(config, {"base + tuned": (base, tuned), "base + copy": (base, base.clone())}, batch_tokens=100)
    differing, alike = found["base--and--tuned_sae"], found["base--and--copy_sae"]
    first, second = exclusive_features(differing)
    assert len(first) == 0 and len(second) == 2
    rows = differing.by_site(differing.W_dec)[1][second]
    assert (F.normalize(rows, dim=1) @ mix[14:].T).amax(0).min() > 0.99
    assert [len(one) for one in exclusive_features(alike)] == [0, 0]
    assert relative_norms(alike).min() > 0.5
    with pytest.raises(EvaluationError, match="predicts one site"):
        exclusive_features(case("topk"))
