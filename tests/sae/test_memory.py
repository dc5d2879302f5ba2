"""A step's peak memory: weights, gradients, Adam's state and 1.5 x (B x N) floats, as torch's allocator counts it."""

import pytest
import torch
from sae_settings import sae_settings
from torch.profiler import ProfilerActivity, profile

from unbraid.config import OptimiserConfig
from unbraid.kernels import workspace
from unbraid.sae import SAE, build
from unbraid.sae.build import ARCHITECTURES
from unbraid.training.optimiser import SAEOptimiser

B, D, N, K = 512, 16, 8192, 16


def step(sae: SAE, optimiser: SAEOptimiser, x_BD: torch.Tensor, path) -> str:
    out = sae.training_forward(x_BD, None, torch.Generator().manual_seed(0), path=path)
    optimiser.zero_grad()
    (out.reconstruction + 0.04 * out.sparsity + out.auxiliary).backward()
    optimiser.step(1e-4)
    return out.path


def peak_bytes(run) -> int:
    """The most that was allocated at once while `run` ran, beyond what was allocated before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    now = peak = 0
    events = recorded.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


CASES = {name: {} for name in ARCHITECTURES} | {"jumprelu-tanh": {"jumprelu_sparsity": "tanh"}}


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("name", CASES)
def test_a_step_needs_half_a_batch_of_codes_beyond_the_preactivations(name, path):
    generator = torch.Generator().manual_seed(0)
    architecture = name.partition("-")[0]
    sae = build(sae_settings(architecture, n_features=N, k=K, **CASES[name]), D, generator)
    with torch.no_grad():
        if path == "sparse" and name not in ("topk", "batch_topk", "matryoshka"):
            (sae.b_gate if name == "gated" else sae.b_enc).fill_(-2.2 / D**0.5)
    optimiser = SAEOptimiser(sae, OptimiserConfig())
    x_BD = torch.randn(B, D, generator=generator) / D**0.5
    assert step(sae, optimiser, x_BD, "auto" if name not in ("topk", "batch_topk", "matryoshka") else path) == path
    optimiser.zero_grad()
    workspace.drop()
    gradients = sum(p.numel() * p.element_size() for p in sae.parameters())
    allowed = gradients + 1.5 * B * N * 4
    assert peak_bytes(lambda: step(sae, optimiser, x_BD, path)) <= allowed
