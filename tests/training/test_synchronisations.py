"""A training step never waits for an accelerator unless it must: counted on a CPU that is taken for one."""

import pytest
import torch
from sae_settings import sae_settings
from synchronisations import Synchronisations

from unbraid.config import DecorrelationConfig, OptimiserConfig, VariantConfig
from unbraid.decorrelation.penalty import SelectiveDecorrelation
from unbraid.errors import TrainingError
from unbraid.kernels import host
from unbraid.sae.build import ARCHITECTURES
from unbraid.training.fit import train_steps
from unbraid.training.normalisation import Normalisation
from unbraid.training.sae_trainer import SAETrainer, train_step, trainer_from_settings

D, N, K, B = 32, 256, 4, 64
TOPK_FAMILY = ["topk", "batch_topk", "matryoshka"]
THRESHOLDED = [name for name in ARCHITECTURES if name not in TOPK_FAMILY]
NO_PENALTY = {"method": "none"}
CPU = torch.device("cpu")


@pytest.fixture
def waiting(monkeypatch):
    """The CPU is taken for a device on which reading waits."""
    monkeypatch.setattr(host, "reading_waits", lambda tensor: True)


def make(architecture: str = "topk", penalty: dict = NO_PENALTY, **sae) -> SAETrainer:
    settings = VariantConfig(
        seed=0,
        sae=sae_settings(architecture, **{"n_features": N, "k": K, "lambda1": 0.02, "dead_after_tokens": 10_000} | sae),
        optimiser=OptimiserConfig(warmup_steps=0),
        decorrelation=DecorrelationConfig(**penalty),
    )
    return trainer_from_settings("one", (0,), settings, 0, Normalisation.none(D), CPU, steps=100)


def batch(step: int) -> torch.Tensor:
    return torch.randn(B, D, generator=torch.Generator().manual_seed(step)) / D**0.5


def counted(trainer: SAETrainer, steps: int = 6, log: bool = False) -> Synchronisations:
    """What the last of some steps waits for."""
    for step in range(steps - 1):
        train_step(trainer, batch(step), step, 1e-3, log=False)
    with Synchronisations(trainer.sae, trainer.decorrelate) as count:
        train_step(trainer, batch(steps), steps - 1, 1e-3, log=log)
    return count


@pytest.mark.parametrize("sae", [{}, {"n_features": 32}], ids=["sparse", "dense"])
@pytest.mark.parametrize("architecture", TOPK_FAMILY)
def test_a_step_of_the_top_k_family_reads_nothing(waiting, architecture, sae):
    assert counted(make(architecture, **sae)).places == {}


def test_ordering_levels_by_frequency_reads_nothing(waiting):
    order = {"matryoshka_order": "frequency", "reorder_from": 3, "reorder_every": 2}
    assert counted(make("matryoshka", **order)).places == {}
    assert counted(make("matryoshka", n_features=32, **order)).places == {}


@pytest.mark.parametrize("sae", [{}, {"n_features": 32}], ids=["sparse", "dense"])
def test_robust_rows_read_nothing(waiting, sae):
    assert counted(make("topk", robust=1.0, robust_from=0.0, robust_until=0.0, **sae)).places == {}


@pytest.mark.parametrize("architecture", THRESHOLDED)
def test_a_step_of_the_others_reads_how_many_features_are_active(waiting, architecture):
    dense = counted(make(architecture))
    assert dense.kinds == {"read": 1} and "selection" in next(iter(dense.places))
    settings = {"initial_threshold": 0.5} if architecture == "jumprelu" else {}
    sparse = make(architecture, **settings)
    with torch.no_grad():
        for name in ("b_enc", "b_gate"):
            getattr(sparse.sae, name, torch.zeros(())).fill_(-0.5)
    assert counted(sparse).kinds == {"read": 1, "nonzero": 1}


@pytest.mark.parametrize("architecture", TOPK_FAMILY)
def test_which_features_are_dead_is_asked_only_when_one_can_be(waiting, architecture):
    assert counted(make(architecture, dead_after_tokens=3 * B, aux_k=4), steps=3).places == {}
    assert counted(make(architecture, dead_after_tokens=3 * B, aux_k=4), steps=5).kinds == {"nonzero": 1}
    all_alive = make("topk", n_features=4, dead_after_tokens=3 * B)
    assert counted(all_alive, steps=4).kinds == {"nonzero": 1}
    assert counted(all_alive, steps=1).kinds == {"read": 1}
    assert counted(all_alive, steps=1).kinds == {}


@pytest.mark.parametrize("architecture", TOPK_FAMILY)
def test_a_logged_step_reads_once(waiting, architecture):
    assert counted(make(architecture), log=True).kinds == {"read": 1}


@pytest.mark.parametrize(
    "penalty, at_most",
    [
        ({"method": "selective", "space": "decoder", "lambda2": 0.1, "push": "rarer"}, 13),
        ({"method": "selective", "space": "decoder", "lambda2": 0.1, "interval": 4}, 1),
        ({"method": "selective", "window": 2, "refresh": 20, "interval": 4, "lambda2": 0.1}, 4),
    ],
    ids=["decoder", "between two penalties in decoder space", "between two penalties in code space"],
)
def test_what_a_penalty_waits_for_does_not_grow(waiting, penalty, at_most):
    assert counted(make(penalty=penalty), steps=6).total <= at_most


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "dense topk"])
def test_both_ways_end_with_the_same_bytes(monkeypatch, architecture):
    ends, logged = [], []
    for waits in (False, True):
        monkeypatch.setattr(host, "reading_waits", lambda tensor, waits=waits: waits)
        n_features = 32 if architecture.startswith("dense") else N
        trainer = make(architecture.split()[-1], n_features=n_features, dead_after_tokens=400, aux_k=8)
        for step in range(20):
            logged.append(train_step(trainer, batch(step), step, 1e-2, log=step % 5 == 0))
        ends.append(trainer.tensors())
    for record, other in zip(logged[:20:5], logged[20::5], strict=True):
        assert other.pop("grad_norm") == pytest.approx(record.pop("grad_norm"), rel=1e-14)
        assert record == other
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name


def test_rows_with_fewer_positive_entries_than_k_end_with_the_same_bytes(monkeypatch):
    penalty = {"method": "selective", "lambda2": 0.1}
    ends = []
    for waits in (False, True):
        monkeypatch.setattr(host, "reading_waits", lambda tensor, waits=waits: waits)
        trainer = make("topk", penalty=penalty, n_features=128, k=6)
        with torch.no_grad():
            trainer.sae.b_enc.fill_(-1.7 * float(trainer.sae.encoder_ND[0].norm()) / D**0.5)
        for step in range(10):
            record = train_step(trainer, batch(step), step, 1e-4, log=step == 9)
        assert record["path"] == "sparse" and 1 < record["l0"] < 5.5
        ends.append((trainer.tensors(), {k: v for k, v in record.items() if k in ("l0", "dead_fraction")}))
    assert ends[0][1] == ends[1][1]
    for name, tensor in ends[0][0].items():
        torch.testing.assert_close(tensor, ends[1][0][name], rtol=1e-5, atol=1e-7)


def poisoned(step: int) -> torch.Tensor:
    return batch(step) * (float("nan") if step == 5 else 1.0)


def test_a_step_that_is_not_finite_changes_no_weight_and_is_told_of_when_a_step_is_logged(waiting):
    trainer = make("batch_topk")
    for step in range(5):
        train_step(trainer, batch(step), step, 1e-3, log=False)
    before = {name: tensor.clone() for name, tensor in trainer.sae.state_dict().items() if name != "threshold"}
    moments = {name: tensor.clone() for name, tensor in trainer.optimiser.state_tensors().items()}
    for step in range(5, 9):
        train_step(trainer, poisoned(step), step, 1e-3, log=False)
    with pytest.raises(TrainingError, match=r"the loss of one or its gradient was not finite at step 6; expected"):
        train_step(trainer, batch(9), 9, 1e-3, log=True)
    assert trainer.updates == 5
    for name, tensor in before.items():
        assert torch.equal(trainer.sae.state_dict()[name], tensor), name
    for name, tensor in moments.items():
        assert torch.equal(trainer.optimiser.state_tensors()[name], tensor), name
    assert train_step(trainer, batch(10), 10, 1e-3, log=True)["updates"] == 6


def test_a_failed_step_is_told_of_before_a_checkpoint_and_at_the_end(waiting):
    trainer = make()
    for step in range(7):
        train_step(trainer, poisoned(step), step, 1e-3, log=False)
    with pytest.raises(TrainingError, match="not finite at step 6"):
        trainer.tensors()
    assert "sae.W_dec" in trainer.tensors()
    feed = iter(range(20))
    with pytest.raises(TrainingError, match="not finite at step 6"):
        train_steps([make()], lambda: [poisoned(next(feed))], 8)


def test_counters_that_python_decides_by_stay_on_the_host():
    penalty = SelectiveDecorrelation(window=2).to("meta").half()
    assert penalty.selection.counts.device == penalty.step.device == CPU
    assert penalty.selection.numbers.dtype == torch.float64
    assert penalty.selection.first.device.type == "meta"
    sae = make("matryoshka").sae.to("meta")
    assert sae.batches.device == CPU and sae.position_N.device.type == "meta"
