"""An SAE that knows the truth scores full marks, one that knows nothing scores at chance, and each planted defect moves
the metric that is meant to see it."""

import math

import pytest
import torch
from torch.nn import functional as F

from unbraid.errors import EvaluationError
from unbraid.evaluation.controls import LinearSAE, permuted_control, random_control
from unbraid.evaluation.ground_truth import GroundTruth, evaluate_ground_truth
from unbraid.randomness import generator
from unbraid.synthetic import World, build_world, correlated_pair, parent_and_child

N_SAMPLES = 16_384


class Oracle:
    """True dictionary, true codes: it remembers the tokens it will be shown. `edit` plants defects in the codes."""

    def __init__(self, world: World):
        self.world = world
        self.W_dec = world.dictionary.clone()
        x, codes = world.sample(N_SAMPLES, generator(0, "ground truth"))
        self.codes = codes.to_dense()
        self.row = {x[i].numpy().tobytes(): i for i in range(len(x))}

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.codes[[self.row[row.numpy().tobytes()] for row in x]]

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        return f @ self.W_dec + self.world.bias


@pytest.fixture(scope="module")
def world() -> World:
    return build_world("unit")


@pytest.fixture
def oracle(world) -> Oracle:
    return Oracle(world)


def judged(sae, world) -> GroundTruth:
    return evaluate_ground_truth(sae, world, N_SAMPLES)


def test_the_oracle_scores_full_marks(oracle, world):
    result = judged(oracle, world)
    for name in ("mcc", "f1", "precision", "recall", "accuracy", "uniqueness", "recovered", "r2", "shrinkage"):
        assert getattr(result, name) == pytest.approx(1.0, abs=1e-6), name
    assert result.absorption_gap == 0 and result.dead == 0 and result.parents_measured > 5
    assert result.hedging == pytest.approx(0, abs=1e-6) and result.composition == pytest.approx(0, abs=1e-6)
    assert result.l0 == result.true_l0


def test_the_random_control_scores_at_chance(world):
    x, codes = world.sample(4096, generator(1, "x"))
    scores = []
    for seed in range(3):
        control = random_control(Oracle(world), x, float(codes.l0), generator(seed, "random"))
        scores.append(judged(control, world))
    # Chance for the match of 64 random rows with 64 directions in 24 dimensions, simulated.
    rows = F.normalize(torch.randn(40, 64, 24, generator=generator(0, "chance")), dim=2)
    from unbraid.evaluation.ground_truth import matched_cosines

    chance = torch.stack([matched_cosines((r @ world.dictionary.T).abs()).mean() for r in rows])
    for score in scores:
        assert abs(score.mcc - chance.mean()) < 4 * chance.std()
        assert score.f1 < 0.35 and score.recovered < 0.05


def test_a_merged_pair_is_seen_by_match_detection_and_uniqueness(oracle, world):
    clean = judged(oracle, world)
    i, j = 0, 1
    oracle.W_dec[i] = F.normalize(world.dictionary[i] + world.dictionary[j], dim=0)
    oracle.W_dec[j] = oracle.W_dec[i]
    oracle.codes[:, i] += oracle.codes[:, j]
    oracle.codes[:, j] = oracle.codes[:, i]
    merged = judged(oracle, world)
    assert merged.mcc < clean.mcc and merged.f1 < clean.f1 and merged.uniqueness < clean.uniqueness
    assert merged.recovered < clean.recovered and merged.r2 < clean.r2


def test_an_absorbed_child_opens_the_gap_and_shows_as_composition(oracle, world):
    for parent in world.is_parent.nonzero().squeeze(1).tolist():
        kids = world.children[parent]
        absorbed = (oracle.codes[:, kids] > 0).any(1)
        oracle.codes[absorbed, parent] = 0
        oracle.W_dec[kids] = F.normalize(world.dictionary[kids] + 0.8 * world.dictionary[parent], dim=1)
    result = judged(oracle, world)
    assert result.absorption_gap == pytest.approx(1.0, abs=1e-6)
    assert result.composition > 0.5 and result.mcc < 1 and result.f1 < 1


def test_a_dead_half_is_counted_and_costs_recall(oracle, world):
    oracle.codes[:, ::2] = 0
    result = judged(oracle, world)
    assert result.dead == 32 and result.dead_fraction == 0.5
    assert result.recall == pytest.approx(0.5, abs=1e-6) and result.mcc == pytest.approx(1.0) and result.r2 < 1


def test_a_rotated_decoder_is_seen_by_match_and_reconstruction(oracle, world):
    turn = 0.1 * torch.randn(24, 24, generator=generator(0, "turn"))
    rotation = torch.linalg.matrix_exp(turn - turn.T)
    oracle.W_dec = oracle.W_dec @ rotation
    result = judged(oracle, world)
    assert result.mcc < 0.95 and result.r2 < 0.9


def test_a_permuted_decoder_keeps_the_match_and_loses_detection(oracle, world):
    result = judged(permuted_control(oracle, generator(0, "order")), world)
    assert result.mcc == pytest.approx(1.0, abs=1e-6) and result.f1 < 0.3 and result.r2 < 0


def test_the_batch_size_changes_nothing(world):
    sae = random_control(Oracle(world), world.sample(100, generator(1, "x"))[0], 4.0, generator(0, "r"))
    one, many = (evaluate_ground_truth(sae, world, 2000, batch=size).to_dict() for size in (1, 64))
    assert one.keys() == many.keys()
    for name, value in one.items():
        assert value == pytest.approx(many[name], rel=1e-6, abs=1e-6), name


def test_a_narrow_sae_on_a_correlated_pair_hedges_by_exactly_its_least_squares_slope():
    world = correlated_pair(0.8)
    slope = 2 * math.asin(0.8) / math.pi
    row = F.normalize(torch.tensor([[1.0, slope]]), dim=1)
    x, _ = world.sample(200_000, generator(2, "x"))
    fires = (x[:, 0] > 0.5).double()
    # The formula is the least-squares fit of both directions on "the first fires", with an intercept.
    fitted = torch.linalg.lstsq(torch.stack([fires, torch.ones_like(fires)], 1), x.double()).solution[0]
    assert fitted.tolist() == pytest.approx([1.0, slope], abs=0.01)

    hedging = LinearSAE(torch.tensor([[1.0], [0.0]]), torch.zeros(1), row, torch.zeros(2))
    pure = LinearSAE(torch.tensor([[1.0], [0.0]]), torch.zeros(1), torch.tensor([[1.0, 0.0]]), torch.zeros(2))
    assert evaluate_ground_truth(hedging, world).hedging == pytest.approx(1.0, abs=0.02)
    assert evaluate_ground_truth(pure, world).hedging == 0.0


def test_absorbing_a_child_has_the_lower_l1_and_the_gap_of_its_formula():
    p_parent, p_child = 0.5, 0.3
    world = parent_and_child(p_parent, p_child)
    # Latent 0: the parent where the child is silent. Latent 1: child and (nearly all of) its parent together.
    absorbing = LinearSAE(
        W_enc=torch.tensor([[1.0, 0.0], [-1.0, 1.0]]),
        b_enc=torch.zeros(2),
        W_dec=torch.tensor([[1.0, 0.0], [0.99, 1.0]]),
        b_dec=torch.zeros(2),
    )
    honest = LinearSAE(torch.eye(2), torch.zeros(2), torch.eye(2), torch.zeros(2))
    a, h = evaluate_ground_truth(absorbing, world), evaluate_ground_truth(honest, world)
    assert a.absorption_gap == 1.0 and a.composition == pytest.approx(0.99) and h.absorption_gap == h.composition == 0
    assert a.l0 == pytest.approx(p_parent, abs=0.01)  # what makes absorption pay: one latent where honesty takes two
    assert h.l0 == pytest.approx(p_parent * (1 + p_child), abs=0.01)
    assert a.per_latent.recall.tolist() == pytest.approx([1 - p_child, 1.0], abs=0.01)
    assert a.r2 > 0.999 and h.r2 == pytest.approx(1.0)


def test_an_sae_without_a_decoder_matrix_is_refused_with_a_reason(world):
    class Opaque:
        def encode(self, x):
            return x

        def decode(self, f):
            return f

    with pytest.raises(EvaluationError, match="Opaque has no matrix W_dec"):
        evaluate_ground_truth(Opaque(), world)
