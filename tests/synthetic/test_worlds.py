"""A world fires as its recipe says, repeats exactly, and the toy worlds have the answers of their formulas."""

import math

import pytest
import torch
from torch.nn import functional as F

from unbraid.config import WorldConfig, validated
from unbraid.errors import ConfigError
from unbraid.randomness import generator
from unbraid.synthetic import World, build_world, correlated_pair, parent_and_child
from unbraid.synthetic.worlds import spread_directions


@pytest.fixture(scope="module")
def unit() -> World:
    return build_world("unit")


def firing_rates(world: World, n: int, seed: int = 0) -> torch.Tensor:
    codes = world.sample_codes(n, generator(seed, "test"))
    return torch.bincount(codes.indices, minlength=world.n_features) / n


def draw_everything(world: World, n: int, chance: torch.Generator) -> torch.Tensor:
    """The recipe to the letter: draw every feature, then zero what the hierarchy forbids, level by level."""
    factors = torch.randn(n, world.loadings.shape[1], generator=chance)
    own_sd = (1 - world.loadings.square().sum(1)).sqrt()
    drive = factors @ world.loadings.T + own_sd * torch.randn(n, world.n_features, generator=chance)
    strength = (world.magnitude + world.magnitude_sd * torch.randn(n, world.n_features, generator=chance)).relu()
    f = strength * (drive > torch.special.ndtri(1 - world.conditional))
    for parent in range(world.n_features):  # ids are breadth first, so a parent is final before its children
        kids = world.children[parent][world.children[parent] >= 0]
        if not kids.numel():
            continue
        f[:, kids] *= (f[:, parent] / world.magnitude[parent])[:, None]
        lots = torch.rand(n, len(kids), generator=chance).masked_fill(f[:, kids] <= 0, -1)
        f[:, kids] *= F.one_hot(lots.argmax(1), len(kids))
    return f


def test_the_same_seed_gives_the_same_world_and_the_same_samples(unit):
    again = build_world("unit")
    assert torch.equal(unit.dictionary, again.dictionary) and torch.equal(unit.loadings, again.loadings)
    (x, a), (y, b) = unit.sample(5000, generator(1, "s")), again.sample(5000, generator(1, "s"))
    assert torch.equal(x, y) and torch.equal(a.indices, b.indices) and torch.equal(a.values, b.values)


def test_activations_are_the_codes_times_the_dictionary_plus_the_bias(unit):
    x, codes = unit.sample(500, generator(2, "s"))
    torch.testing.assert_close(x, codes.to_dense() @ unit.dictionary + unit.bias)
    assert (codes.values > 0).all()
    rows = codes.rows() * unit.n_features + codes.indices
    assert (rows.diff() > 0).all()


def test_a_child_fires_only_with_its_parent_and_never_with_a_sibling(unit):
    f = unit.sample_codes(20_000, generator(3, "s")).to_dense()
    child = (unit.parents >= 0).nonzero().squeeze(1)
    assert (f[:, child] > 0).any()
    assert not ((f[:, child] > 0) & (f[:, unit.parents[child]] == 0)).any()
    for kids in unit.children[unit.is_parent]:
        assert ((f[:, kids] > 0).sum(1) <= 1).all()


def test_drawing_children_only_where_parents_fired_is_the_recipe_to_the_letter(unit):
    n = 60_000
    f, g = unit.sample_codes(n, generator(4, "s")).to_dense(), draw_everything(unit, n, generator(5, "s"))
    p, q = (f > 0).float().mean(0), (g > 0).float().mean(0)
    z = (p - q) / ((p * (1 - p) + q * (1 - q)) / n).sqrt()
    assert z.abs().max() < 4.5 and z.std() < 1.3
    torch.testing.assert_close(f.sum(0) / (f > 0).sum(0), g.sum(0) / (g > 0).sum(0), rtol=0.08, atol=0.0)
    together = [((h > 0).float().T @ (h > 0).float()) / n for h in (f, g)]
    assert (together[0] - together[1]).abs().max() < 0.01


def test_features_without_parents_fire_at_their_zipf_rate(unit):
    top = unit.parents < 0
    p, n = unit.probability[top], 100_000
    z = (firing_rates(unit, n)[top] - p) / (p * (1 - p) / n).sqrt()
    assert z.abs().max() < 4.5
    assert unit.probability[0] == pytest.approx(0.4) and unit.probability[-1] == pytest.approx(0.01)


def test_batches_without_end_have_their_size():
    stream = parent_and_child().batches(3, generator(0, "s"))
    assert [next(stream).shape for _ in range(4)] == [(3, 2)] * 4


def test_the_short_gradient_of_the_dictionary_is_the_gradient_of_the_formula():
    start = F.normalize(torch.randn(12, 5, generator=generator(0, "d"), dtype=torch.float64), dim=1)
    slow = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([slow], lr=1e-2)
    for _ in range(5):
        optimiser.zero_grad()
        gram = slow @ slow.T
        loss = (gram - torch.diag(gram.diag())).square().sum()
        (loss + 12 * (gram.diag() - 1).square().sum()).backward()
        optimiser.step()
    torch.testing.assert_close(spread_directions(start, 5, 1e-2), F.normalize(slow.detach(), dim=1))


def test_directions_are_unit_and_further_apart_than_chance(unit):
    overlap = unit.dictionary @ unit.dictionary.T
    torch.testing.assert_close(overlap.diag(), torch.ones(64))
    random = F.normalize(torch.randn(64, 24, generator=generator(0, "r")), dim=1)
    assert overlap.square().sum() < (random @ random.T).square().sum()
    assert torch.linalg.norm(unit.bias) == pytest.approx(1.0)


def test_with_room_for_all_the_directions_are_orthonormal():
    rows = spread_directions(torch.randn(4, 6, generator=generator(0, "q")), 3, 1e-3)
    torch.testing.assert_close(rows @ rows.T, torch.eye(4), atol=1e-6, rtol=0)


def test_the_toy_parent_and_child_fire_as_their_formula_says():
    n = 100_000
    parent, child = firing_rates(parent_and_child(0.5, 0.3), n)
    assert abs(parent - 0.5) < 4.5 * math.sqrt(0.25 / n) and abs(child - 0.15) < 4.5 * math.sqrt(0.15 * 0.85 / n)


@pytest.mark.parametrize("correlation", [0.8, 0.0, -0.5])
def test_the_toy_pair_fires_together_as_its_formula_says(correlation):
    n = 100_000
    f = correlated_pair(correlation).sample_codes(n, generator(6, "s")).to_dense()
    both = (f > 0).all(1).float().mean()
    assert abs(both - (0.25 + math.asin(correlation) / (2 * math.pi))) < 4.5 * math.sqrt(0.25 / n)


def test_impossible_worlds_are_refused_with_a_reason():
    with pytest.raises(ConfigError, match="no world named 'huge'; expected one of unit, small"):
        build_world("huge")
    with pytest.raises(ConfigError, match="need 336 features"):
        validated(WorldConfig, {"n_features": 300, "roots": 16, "branching": 4, "depth": 2}, "world")
