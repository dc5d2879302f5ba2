"""Controls of which half has learned: what stays as drawn, what they reach, and that they are trained once."""

import pytest
import torch
from torch.nn import functional as F

from unbraid.errors import EvaluationError
from unbraid.evaluation.trained_controls import BATCH_TOKENS, FROZEN, ControlSite, trained_controls

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNBRAID_CACHE", str(tmp_path / "cache"))


def rows() -> torch.Tensor:
    """Sparse combinations of 48 directions in 24 dimensions."""
    draws = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(48, 24, generator=draws), dim=1)
    active = (torch.rand(40 * BATCH_TOKENS, 48, generator=draws) < 0.06) * torch.rand(
        40 * BATCH_TOKENS, 48, generator=draws
    )
    return active @ directions + 0.5


def site(**changes) -> ControlSite:
    return ControlSite(width=96, k=4, seed=3, source={"model": "m"}, tokens=1000)._replace(**changes)


def r2(sae, x: torch.Tensor) -> float:
    with torch.no_grad():
        return 1 - float((x - sae.decode(sae.encode(x))).square().sum() / (x - x.mean(0)).square().sum())


def test_controls_are_as_wide_and_as_sparse_and_learn_what_their_free_half_can(own_cache):
    x, steps = rows(), []
    found = trained_controls(site(), lambda: x, CPU, lambda: steps.append(1))
    assert list(found) == list(FROZEN) and len(steps) == 40
    for sae in found.values():
        assert tuple(sae.W_dec.shape) == (96, 24)
        assert 2 < float((sae.encode(x[:2000]) > 0).sum(1).float().mean()) < 6
        assert r2(sae, x[:2000]) > 0.2
    # What may turn a little explains more than what may not.
    assert r2(found["soft-frozen-decoder"], x[:2000]) > r2(found["frozen-decoder"], x[:2000])


def test_controls_are_trained_once_and_kept():
    x = rows()
    first = trained_controls(site(), lambda: x, CPU)
    again = trained_controls(site(), lambda: pytest.fail("rows were asked for again"), CPU)
    for name in FROZEN:
        assert torch.equal(first[name].W_dec, again[name].W_dec)


@pytest.mark.parametrize("change", [{"width": 64}, {"k": 5}, {"seed": 4}, {"source": {"model": "n"}}, {"tokens": 999}])
def test_other_controls_are_trained_for_what_differs(change):
    assert site(**change).folder != site().folder


def test_too_few_rows_are_refused_and_nothing_is_kept():
    with pytest.raises(EvaluationError, match=r"gives 7 rows to train controls on.*control_tokens to 0"):
        trained_controls(site(), lambda: torch.zeros(7, 24), CPU)
    assert not site().folder.exists()
