"""Ground truth scores equal the calculators sae-lens ships for SynthSAEBench."""

import pytest
import torch

pytestmark = pytest.mark.peers
evals = pytest.importorskip("sae_lens.synthetic.evals")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scores_equal_the_calculators_of_sae_lens(seed):
    from sae_lens.evals import ExplainedVarianceCalculator

    from unbraid.evaluation.controls import LinearSAE
    from unbraid.evaluation.ground_truth import evaluate_ground_truth
    from unbraid.randomness import generator
    from unbraid.synthetic import build_world

    world, n = build_world("unit"), 10_000
    chance = generator(seed, "sae")
    # Half way between the truth and noise, with three latents that never fire.
    rows = world.dictionary[torch.randperm(64, generator=chance)[:40]] + 0.15 * torch.randn(40, 24, generator=chance)
    bias = torch.full((40,), -1.0)
    bias[:3] = -1e6
    sae = LinearSAE(rows.T.contiguous(), bias, rows, world.bias + 0.1)

    ours = evaluate_ground_truth(sae, world, n, seed=seed)

    x, codes = world.sample(n, generator(seed, "ground truth"))
    f, truth = sae.encode(x), codes.to_dense()
    explained, shrinkage = ExplainedVarianceCalculator(), evals.ShrinkageCalculator()
    detection, dead = evals.ClassificationMetricsCalculator(rows, world.dictionary), evals.DeadLatentsCalculator(40)
    l0 = evals.L0Calculator()
    for calculator, arguments in (
        (explained, (sae.decode(f), x)),
        (shrinkage, (sae.decode(f), x)),
        (detection, (f, truth)),
        (dead, (f,)),
        (l0, (f,)),
    ):
        calculator.add_batch(*arguments)
    scores = detection.compute()
    expected = {
        "mcc": evals.mean_correlation_coefficient(rows, world.dictionary),
        "uniqueness": evals.feature_uniqueness(rows, world.dictionary),
        "f1": scores.f1_score,
        "precision": scores.precision,
        "recall": scores.recall,
        "accuracy": scores.accuracy,
        "r2": explained.compute(),
        "shrinkage": shrinkage.compute(),
        "dead": dead.compute(),
        "l0": l0.compute(),
    }
    assert {name: getattr(ours, name) for name in expected} == pytest.approx(expected, rel=1e-6, abs=1e-6)
