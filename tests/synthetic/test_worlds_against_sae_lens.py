"""The recipe is the one sae-lens ships for SynthSAEBench: same directions, same probabilities, same firing."""

import pytest
import torch

pytestmark = pytest.mark.peers
synthetic = pytest.importorskip("sae_lens.synthetic.synthetic_model")


def test_directions_probabilities_and_firing_are_those_of_sae_lens():
    from dataclasses import replace

    from sae_lens.synthetic.feature_dictionary import orthogonalize_embeddings
    from sae_lens.synthetic.firing_magnitudes import FoldedNormalMagnitudeConfig, LinearMagnitudeConfig
    from sae_lens.synthetic.firing_probabilities import ZipfianFiringProbabilityConfig
    from sae_lens.synthetic.hierarchy import HierarchyConfig

    from unbraid.randomness import generator
    from unbraid.synthetic.worlds import build_world, spread_directions

    start = torch.randn(384, 96, generator=generator(0, "start"))
    torch.testing.assert_close(
        spread_directions(start, 100, 3e-4), orthogonalize_embeddings(start, num_steps=100, lr=3e-4), atol=1e-5, rtol=0
    )
    theirs = synthetic.SyntheticModel(
        synthetic.SyntheticModelConfig(
            num_features=384,
            hidden_dim=96,
            firing_probability=ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=5e-4),
            hierarchy=HierarchyConfig(
                total_root_nodes=16,
                branching_factor=4,
                max_depth=2,
                mutually_exclusive_portion=1.0,
                scale_children_by_parent=True,
                compensate_probabilities=True,
            ),
            orthogonalization=synthetic.OrthogonalizationConfig(1, 3e-4),
            correlation=synthetic.LowRankCorrelationConfig(8, 0.1),
            std_firing_magnitudes=FoldedNormalMagnitudeConfig(0.5, 0.5),
            mean_firing_magnitudes=LinearMagnitudeConfig(5, 4),
            seed=0,
        )
    )
    source = theirs.activation_generator
    ours = build_world("small")
    torch.testing.assert_close(ours.conditional, source.firing_probabilities, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.magnitude, source.mean_firing_magnitudes)
    loadings = theirs.correlation_matrix.correlation_factor
    ours = replace(ours, loadings=loadings, magnitude_sd=source.std_firing_magnitudes)
    n = 50_000
    f = ours.sample_codes(n, generator(0, "s")).to_dense()
    torch.manual_seed(0)
    g = source.sample(n)
    p, q = (f > 0).float().mean(0), (g > 0).float().mean(0)
    z = (p - q) / ((p * (1 - p) + q * (1 - q)).clamp(min=1e-6) / n).sqrt()
    assert z.abs().max() < 4.5 and z.std() < 1.3
    common = p > 0.01
    torch.testing.assert_close(f.mean(0)[common] / p[common], g.mean(0)[common] / q[common], rtol=0.05, atol=0.0)
