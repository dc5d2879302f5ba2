"""On a GPU: the dispatched products, whole training steps, and the precisions, against the CPU."""

import pytest
import torch
from sae_settings import sae_settings

from unbraid.config import OptimiserConfig
from unbraid.kernels import products
from unbraid.kernels.codes import Codes
from unbraid.sae import build
from unbraid.sae.build import ARCHITECTURES
from unbraid.training.optimiser import SAEOptimiser

pytestmark = pytest.mark.gpu
D, N, K = 40, 256, 8


def test_products_on_cuda_equal_those_on_the_cpu_and_repeat_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    active = torch.rand(300, N, generator=generator) < 0.05
    pairs = active.nonzero(as_tuple=True)
    values = torch.randn(len(pairs[0]), generator=generator)
    here = Codes.from_rows(*pairs, values, *active.shape)
    there = Codes.from_rows(*(part.cuda() for part in (*pairs, values)), *active.shape)
    x_BD, W_ND = torch.randn(300, D, generator=generator), torch.randn(N, D, generator=generator)
    for name, arguments in {
        "weighted_rows": (W_ND,),
        "weighted_columns": (x_BD,),
        "entry_dots": (x_BD, W_ND),
        "sums_by_feature": (),
    }.items():
        product = getattr(products, name)
        result = product(there, *(tensor.cuda() for tensor in arguments))
        torch.testing.assert_close(result.cpu(), product(here, *arguments), rtol=1e-4, atol=1e-5)
        assert torch.equal(result, product(there, *(tensor.cuda() for tensor in arguments)))


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_steps_on_cuda_end_with_the_weights_of_the_cpu(name, path):
    ends = []
    for device in ("cpu", "cuda"):
        sae = build(sae_settings(name, n_features=N, k=K, corruption=0.0), D, torch.Generator().manual_seed(0))
        sae = sae.to(device)
        optimiser = SAEOptimiser(sae, OptimiserConfig())
        generator = torch.Generator().manual_seed(1)
        for _ in range(20):
            x_BD = (torch.randn(256, D, generator=generator) / D**0.5).to(device)
            out = sae.training_forward(x_BD, (torch.arange(N) < 9).to(device), torch.Generator(device), path=path)
            optimiser.zero_grad()
            (out.reconstruction + 0.04 * out.sparsity + out.auxiliary).backward()
            optimiser.step(1e-3)
        ends.append({key: value.detach().cpu() for key, value in sae.state_dict().items()})
    for key, theirs in ends[0].items():
        assert (ends[1][key] - theirs).norm() <= 1e-3 * theirs.norm(), key


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bfloat16_products_train_float32_weights(name):
    sae = build(sae_settings(name, n_features=N, k=K), D, torch.Generator().manual_seed(0)).cuda()
    optimiser = SAEOptimiser(sae, OptimiserConfig())
    losses = []
    for step in range(60):
        generator = torch.Generator("cuda").manual_seed(step % 4)
        x_BD = torch.randn(256, D, generator=generator, device="cuda") / D**0.5
        with torch.autocast("cuda", torch.bfloat16):
            out = sae.training_forward(x_BD, generator=generator)
        optimiser.zero_grad()
        (out.reconstruction + 0.01 * out.sparsity + out.auxiliary).backward()
        optimiser.step(3e-3)
        losses.append(out.reconstruction.item())
    assert sae.W_dec.dtype == torch.float32 and losses[-1] < 0.7 * losses[0]
