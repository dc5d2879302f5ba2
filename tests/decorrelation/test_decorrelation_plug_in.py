"""The penalty inside other people's loops: autocast, torch.compile, other devices, and nothing left behind."""

import doctest
import os
import subprocess
import sys
import warnings

import pytest
import torch
from made_codes import sparse_codes

import unbraid
from unbraid.decorrelation import penalty as penalty_module
from unbraid.decorrelation.penalty import SelectiveDecorrelation


def make_sae(n_features: int = 256, width: int = 32) -> torch.nn.ParameterDict:
    draws = torch.Generator().manual_seed(0)
    decoder = torch.nn.functional.normalize(torch.randn(n_features, width, generator=draws), dim=1)
    return torch.nn.ParameterDict({"W_enc": decoder.T.clone(), "W_dec": decoder.clone()})


def loss_of(sae, x_BD: torch.Tensor, decorrelate: SelectiveDecorrelation) -> torch.Tensor:
    f_BN = torch.relu(x_BD @ sae["W_enc"] - 0.3)
    penalty, _ = decorrelate(f_BN, decoder=sae["W_dec"])
    return (x_BD - f_BN @ sae["W_dec"]).pow(2).sum(1).mean() + 0.1 * penalty


def test_the_docstring_example_runs():
    assert doctest.testmod(penalty_module).attempted == 3
    assert unbraid.SelectiveDecorrelation is SelectiveDecorrelation


# torch.compile itself reads .grad of the codes it carries over the graph break.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("space", ["codes", "decoder", "co-active"])
def test_compiled_loops_train_like_eager_ones(space):
    x_BD = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    gradients = []
    for compiled in (False, True):
        torch._dynamo.reset()
        sae = make_sae()
        decorrelate = SelectiveDecorrelation(0.01, refresh=2, space=space)
        step = torch.compile(loss_of, backend="aot_eager") if compiled else loss_of
        for _ in range(3):
            step(sae, x_BD, decorrelate).backward()
        gradients.append([sae["W_enc"].grad, sae["W_dec"].grad])
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("space", "path"),
    [("codes", "auto"), ("codes", "blocks"), ("co-active", "auto"), ("co-active", "blocks"), ("decoder", "auto")],
)
def test_autocast_changes_the_codes_but_not_the_arithmetic(space, path):
    x_BD = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    sae = make_sae()
    decorrelate = SelectiveDecorrelation(0.01, space=space, path=path)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        f_BN = torch.relu(x_BD @ sae["W_enc"])
        penalty, stats = decorrelate(f_BN, decoder=sae["W_dec"])
    assert f_BN.dtype == torch.bfloat16 and penalty.dtype == torch.float32
    expected, exact = decorrelate(f_BN.detach().float(), decoder=sae["W_dec"].detach())
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-7)
    assert stats.tau == pytest.approx(exact.tau, rel=1e-6)
    penalty.backward()
    assert bool(torch.isfinite(sae["W_dec" if space != "codes" else "W_enc"].grad).all())


def test_half_precision_codes_lose_nothing_but_their_own_digits():
    indices_BK, values_BK = sparse_codes(256, 512, 12, seed=0)
    for dtype in (torch.bfloat16, torch.float16):
        leaf = values_BK.to(dtype).requires_grad_()
        penalty, stats = SelectiveDecorrelation()(indices=indices_BK, values=leaf, n_features=512)
        _, exact = SelectiveDecorrelation()(indices=indices_BK, values=leaf.detach().double(), n_features=512)
        penalty.backward()
        assert (penalty.dtype, leaf.grad.dtype) == (torch.float32, dtype)
        assert stats.tau == pytest.approx(exact.tau, rel=1e-5)
        assert stats.penalty == pytest.approx(exact.penalty, rel=1e-4)


def test_without_gradients_nothing_is_recorded():
    f_BN = torch.relu(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        penalty, _ = SelectiveDecorrelation(0.1)(f_BN.requires_grad_())
    assert not penalty.requires_grad


def test_gradients_scale_with_the_weight_and_add_up():
    f_BN = torch.relu(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)))
    gradients = []
    for weights in ((1.0,), (0.25,), (1.0, 0.25)):
        leaf = f_BN.clone().requires_grad_()
        penalty, _ = SelectiveDecorrelation(0.1)(leaf)
        sum(weight * penalty for weight in weights).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0] / 4)
    torch.testing.assert_close(gradients[2], gradients[0] * 1.25)


def test_no_warning_escapes_in_a_fresh_process():
    code = """
import sys, torch
from unbraid.decorrelation.penalty import SelectiveDecorrelation
assert "torch._dynamo" not in sys.modules, "the penalty brings in the compiler"
f = torch.relu(torch.randn(64, 128)).requires_grad_()
for settings in ({}, {"window": 2}, {"path": "blocks"}, {"space": "decoder"}, {"measure": "pearson"}):
    decorrelate = SelectiveDecorrelation(0.01, **settings)
    for _ in range(2):
        decorrelate(f, decoder=torch.randn(128, 8, requires_grad=True))[0].backward()
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (0, "")


def test_warning_filters_are_left_as_they_were():
    before = list(warnings.filters)
    SelectiveDecorrelation(0.1)(torch.rand(16, 16))
    assert warnings.filters == before


@pytest.mark.gpu
@pytest.mark.parametrize("measure", ["cosine", "pearson"])
@pytest.mark.parametrize("settings", [{}, {"window": 2}, {"path": "blocks"}, {"space": "co-active"}])
def test_cuda_gives_what_the_cpu_gives_the_same_bits_every_time(measure, settings):
    indices_BK, values_BK = sparse_codes(512, 2048, 16, seed=0)
    decoder_ND = torch.randn(2048, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    runs = []
    for device in ("cpu", "cuda", "cuda"):
        decorrelate = SelectiveDecorrelation(measure=measure, **settings).to(device)
        for _ in range(2):
            values = values_BK.to(device, torch.float64, copy=True).requires_grad_()
            decoder = decoder_ND.to(device, copy=True).requires_grad_()
            penalty, stats = decorrelate(indices=indices_BK.to(device), values=values, n_features=2048, decoder=decoder)
            penalty.backward()
        leaf = decoder if settings.get("space") else values
        runs.append((penalty.item(), stats.tau, stats.pairs.cpu(), leaf.grad.cpu()))
    for run in runs[1:]:
        assert run[:2] == pytest.approx(runs[0][:2], rel=1e-10)
        torch.testing.assert_close(run[3], runs[0][3], rtol=0, atol=1e-10)
        if settings.get("path") != "blocks":
            assert torch.equal(run[2], runs[0][2])
    assert runs[1][:2] == runs[2][:2] and torch.equal(runs[1][3], runs[2][3])
