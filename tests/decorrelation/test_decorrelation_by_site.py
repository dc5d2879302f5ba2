"""Decoder rows compared at each site: against autograd through the matrices, and in a run."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import unbraid
from unbraid import recipes
from unbraid.config import DecorrelationConfig, OptimiserConfig, VariantConfig, overridden
from unbraid.decorrelation.build import build
from unbraid.decorrelation.by_site import BySite
from unbraid.decorrelation.penalty import SelectiveConfig, SelectiveDecorrelation
from unbraid.decorrelation.selection import live_pairs
from unbraid.decorrelation.window import chance_level
from unbraid.errors import ConfigError

WIDTHS = (3, 5, 2)


def decoder(n_features: int, seed: int = 0) -> torch.Tensor:
    """Rows of several lengths; one of them hardly writes into the second site."""
    rows_NM = torch.randn(n_features, sum(WIDTHS), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    rows_NM[0] *= 7
    rows_NM[1, 3:8] *= 1e-12
    return rows_NM


@given(st.integers(3, 40), st.sampled_from([0.05, 0.3, 1.0]), st.sampled_from(["both", "rarer"]), st.integers(0, 1000))
def test_value_and_gradient_are_those_of_each_sites_share_in_the_cosine(n_features, fraction, push, seed):
    config = SelectiveConfig(space="decoder", path="tiled", fraction=fraction, push=push)
    leaf, other = decoder(n_features, seed).requires_grad_(), decoder(n_features, seed).requires_grad_()
    firing_N = torch.randperm(n_features, generator=torch.Generator().manual_seed(seed)) + 1
    codes_BN = (torch.arange(n_features + 1)[:, None] < firing_N).double()
    penalty, stats = BySite(config, WIDTHS, seed=0)(codes_BN, decoder=leaf)
    penalty.backward()

    first, second = torch.triu_indices(n_features, n_features, 1)
    norms_N = other.norm(dim=1)
    rarer_first = (firing_N[first] < firing_N[second]).double()
    expected, moved, excluded, taus = torch.zeros(()), torch.zeros(()), 0.0, []
    nominal = max(1, round(fraction * live_pairs(n_features)))
    for part in other.split(WIDTHS, 1):
        overlap = (part[first] * part[second]).sum(1) / (norms_N[first] * norms_N[second])
        taus.append(float(overlap.detach().mean() + overlap.detach().std(correction=0)))
        _, chosen = overlap.detach().topk(nominal)
        chosen = chosen[overlap.detach()[chosen] - taus[-1] > 1e-11]
        expected = expected + overlap[chosen].sum() / nominal / 3
        excluded += taus[-1] * len(chosen) / nominal / 3
        # A pair's whole push goes to one row: the other is a constant, and there are two pushes.
        still = other.detach().split(WIDTHS, 1)[len(taus) - 1]
        one = (part[first] * still[second]).sum(1) / (norms_N[first] * norms_N.detach()[second])
        two = (still[first] * part[second]).sum(1) / (norms_N.detach()[first] * norms_N[second])
        moved = moved + 2 * (rarer_first * one + (1 - rarer_first) * two)[chosen].sum() / nominal / 3
    (gradient,) = torch.autograd.grad(expected if push == "both" else moved, other)
    assert penalty.item() == pytest.approx(expected.item() - excluded, abs=1e-10)
    assert stats.tau == pytest.approx(sum(taus) / 3, abs=1e-10)
    assert stats.nominal == 3 * nominal
    torch.testing.assert_close(leaf.grad, gradient, rtol=0, atol=1e-9)
    assert leaf.grad.norm(dim=1).mul(norms_N.detach()).max() < 10, "a short row at a site is not steep"


def test_shares_of_all_sites_add_up_to_the_cosine():
    rows_NM = decoder(30)
    config = SelectiveConfig(space="decoder", path="tiled", fraction=1.0, threshold="fixed", tau=0.0)
    site_by_site = BySite(config, WIDTHS, seed=0)
    for one in site_by_site.sites:
        assert isinstance(one, SelectiveDecorrelation)
    unit = torch.nn.functional.normalize(rows_NM, dim=1)
    found = sum(part @ part.T for part in unit.split(WIDTHS, 1))
    torch.testing.assert_close(found, unit @ unit.T)
    whole = SelectiveDecorrelation(1.0, space="decoder", path="tiled", threshold="fixed", tau=0.0)
    value, _ = BySite(config, (sum(WIDTHS),), seed=0)(decoder=rows_NM)
    assert float(value) == pytest.approx(float(whole(decoder=rows_NM)[0]), rel=1e-12)


def test_a_floor_of_chance_is_what_random_rows_reach_at_a_site():
    draws = torch.Generator().manual_seed(3)
    rows_NM = torch.nn.functional.normalize(torch.randn(2000, 120, generator=draws, dtype=torch.float64), dim=1)
    part = rows_NM[:, :40]
    largest = float((part @ part.T).fill_diagonal_(0).max())
    config = SelectiveConfig(space="decoder", path="tiled", fraction=1e-3, floor="chance")
    _, stats = BySite(config, (40, 80), seed=0)(decoder=rows_NM)
    levels = [chance_level(2000, 120**2 / width) for width in (40, 80)]
    assert stats.tau == pytest.approx(sum(levels) / 2)
    assert levels[0] == pytest.approx(largest, rel=0.5)


def test_what_is_remembered_goes_on_exactly():
    config = SelectiveConfig(space="decoder", fraction=0.02, scan_rows=16, neighbours=4, push="rarer", interval=2)
    codes_BN = (torch.rand(64, 40, generator=torch.Generator().manual_seed(1)) < 0.2).double()
    one = BySite(config, WIDTHS, seed=0)
    for step in range(7):
        one(codes_BN, decoder=decoder(40, step))
    other = BySite(config, WIDTHS, seed=0)
    other.load_state_dict(one.state_dict())
    for step in range(7, 12):
        rows_NM = decoder(40, step)
        (value, stats), (again, its) = one(codes_BN, decoder=rows_NM), other(codes_BN, decoder=rows_NM)
        assert torch.equal(value, again) and torch.equal(stats.pairs, its.pairs) and stats.scalars() == its.scalars()
    assert stats.path == "neighbours"
    advanced = BySite(config, WIDTHS, seed=0)
    called = BySite(config, WIDTHS, seed=0)
    for step in range(5):
        called(codes_BN, decoder=decoder(40, step))
        advanced.advance(codes_BN, decoder=decoder(40, step))
    for name, tensor in called.state_dict().items():
        assert torch.equal(tensor, advanced.state_dict()[name]), name


def test_it_is_used_where_several_sites_are_predicted_and_refused_elsewhere():
    config = SelectiveConfig(space="decoder", by_site=True)
    assert isinstance(build(config, 40, 0, widths=WIDTHS), BySite)
    assert isinstance(build(config, 40, 0, widths=(10,)), SelectiveDecorrelation), "one site beside several in a run"
    assert isinstance(build(SelectiveConfig(space="decoder"), 40, 0, widths=WIDTHS), SelectiveDecorrelation)
    with pytest.raises(ConfigError, match=r"decorrelation\.by_site is set, and is read for other activations"):
        variant = VariantConfig(
            seed=0,
            sae=unbraid.SAEConfig(architecture="topk", n_features=16, k=2),
            optimiser=OptimiserConfig(),
            decorrelation=config,
        )
        unbraid.fit(variant, torch.randn(512, 8), batch_tokens=64)
    with pytest.raises(ConfigError, match="a list in which several are predicted"):
        overridden(recipes.tiny(), {"decorrelation.space": "decoder", "decorrelation.by_site": True}, "test")


@pytest.mark.parametrize("route", ["a + b", "c -> a + b"])
def test_training_pushes_rows_apart_at_each_site_and_logs_it(route):
    draws = torch.Generator().manual_seed(0)
    causes = torch.rand(16384, 30, generator=draws) * (torch.rand(16384, 30, generator=draws) < 0.1)
    mixed = {
        name: causes @ torch.randn(30, width, generator=draws) for name, width in zip("abc", (12, 6, 8), strict=True)
    }
    activations = {route: tuple(mixed[name] for name in route if name in mixed)}
    sae = unbraid.SAEConfig(architecture="topk", n_features=96, k=4)
    pushed = SelectiveConfig(space="decoder", by_site=True, fraction=0.05, path="tiled", lambda2=3.0)
    tops, logged = {}, []
    for name, penalty in (("pushed", pushed), ("free", DecorrelationConfig(method="none"))):
        one = VariantConfig(seed=0, sae=sae, optimiser=OptimiserConfig(warmup_steps=0), decorrelation=penalty)
        fitted = unbraid.fit(
            one, activations, batch_tokens=128, log_every=16, callback=lambda *given: logged.append(given)
        )
        unit_NM = torch.nn.functional.normalize(fitted["sae"].W_dec, dim=1)
        tops[name] = [
            float((part @ part.T).triu(1).flatten().topk(100)[0].mean()) for part in unit_NM.split([12, 6], 1)
        ]
    assert all(pushed < free - 0.01 for pushed, free in zip(tops["pushed"], tops["free"], strict=True)), tops
    records = [record["sae"]["decorrelation"] for _, record in logged if record is not None]
    assert all(0 < record["above_tau"] <= 1 for record in records if record["path"] == "tiled")
    assert {record["path"] for record in records} == {"tiled", "none"}
