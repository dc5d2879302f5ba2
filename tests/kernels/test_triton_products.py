"""The Triton kernels against plain loops: interpreted on CPU tensors here, compiled where there is a GPU."""

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unbraid.kernels.codes import Codes

pytest.importorskip("triton")
from sae_settings import sae_settings

from unbraid.config import OptimiserConfig
from unbraid.kernels import host, products, products_triton
from unbraid.randomness import generator
from unbraid.sae import ARCHITECTURES, build
from unbraid.training.optimiser import SAEOptimiser

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(seed: int, rows: int, features: int, width: int, density: float, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand(rows, features, generator=generator) < density
    pairs = active.nonzero(as_tuple=True)
    codes = Codes.from_rows(*pairs, torch.randn(len(pairs[0]), generator=generator, dtype=dtype), *active.shape)
    x_BD = torch.randn(rows, width, generator=generator, dtype=dtype)
    return codes, x_BD, torch.randn(features, width, generator=generator, dtype=dtype)


def compare(codes, x_BD, W_ND, **tolerance):
    offsets, order = codes.feature_offsets, codes.order
    there = lambda *tensors: [tensor.to(DEVICE) for tensor in tensors]  # noqa: E731
    rows = products_triton.segment_sums(*there(codes.offsets, codes.indices, codes.values, W_ND))
    columns = products_triton.segment_sums(*there(offsets, codes.rows_by_feature, codes.values[order], x_BD))
    dots = products_triton.entry_dots(*there(offsets, codes.rows_by_feature, x_BD, W_ND))
    torch.testing.assert_close(rows.cpu(), reference.weighted_rows(codes, W_ND), **tolerance)
    torch.testing.assert_close(columns.cpu(), reference.weighted_columns(codes, x_BD), **tolerance)
    torch.testing.assert_close(dots.cpu(), reference.entry_dots(codes, x_BD, W_ND)[order], **tolerance)


@settings(max_examples=12)
@given(
    st.integers(0, 1000),
    st.integers(1, 5),
    st.integers(1, 6),
    st.sampled_from([1, 7, 16, 33]),
    st.sampled_from([0.0, 0.3, 1.0]),
)
def test_triton_products_equal_the_loops(seed, rows, features, width, density):
    compare(*problem(seed, rows, features, width, density), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [1024, 1300])
def test_rows_wider_than_a_block_are_summed_whole(width):
    compare(*problem(0, 3, 4, width, 0.5), rtol=1e-11, atol=1e-11)
    compare(*problem(1, 3, 4, width, 0.5, torch.float32), rtol=1e-4, atol=1e-4)


def trained(architecture: str) -> tuple[dict[str, torch.Tensor], int]:
    """Weights after three steps on the sparse path with a dead feature, and how many entries were active."""
    settings = sae_settings(architecture, n_features=24, k=3, corruption=0.0, initial_threshold=0.3)
    sae = build(settings, 6, generator(0, "init"))
    optimiser, active = SAEOptimiser(sae, OptimiserConfig()), 0
    for step in range(3):
        x_BD = torch.randn(10, 6, generator=torch.Generator().manual_seed(step))
        out = sae.training_forward(x_BD, torch.arange(24) < 1, generator(0, "noise"), path="sparse")
        optimiser.zero_grad()
        (out.reconstruction + 0.04 * out.sparsity + out.auxiliary).backward()
        optimiser.step(1e-2)
        active += int((out.codes.values > 0).sum())
    return {name: weight.detach().clone() for name, weight in sae.state_dict().items()}, active


@pytest.mark.skipif(DEVICE == "cuda", reason="compiled kernels take no CPU tensors; test_cuda.py trains on the GPU")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_trains_by_the_kernels_as_it_does_on_a_gpu(monkeypatch, architecture):
    on_cpu, active = trained(architecture)
    calls = []

    def counted(kernel):
        return lambda *tensors: calls.append(kernel.__name__) or kernel(*tensors)

    monkeypatch.setattr(host, "reading_waits", lambda tensor: True)
    monkeypatch.setattr(products, "segment_sums", counted(products_triton.segment_sums))
    monkeypatch.setattr(products, "dots_by_feature", counted(products_triton.entry_dots))
    by_kernels, same = trained(architecture)
    assert {"segment_sums", "entry_dots"} <= set(calls) and active == same > 0
    for name, weight in on_cpu.items():
        torch.testing.assert_close(by_kernels[name], weight, rtol=1e-4, atol=1e-6)
