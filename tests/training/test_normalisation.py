"""SAEs train in units that a large mean cannot spoil: activations are centred, then scaled."""

import copy
from dataclasses import replace

import pytest
import torch
from fake_source import FakeSource
from sae_settings import sae_settings

from unbraid.config import (
    BufferConfig,
    DecorrelationConfig,
    ModelConfig,
    OptimiserConfig,
    RunConfig,
    SAEConfig,
    TrainingConfig,
    VariantConfig,
)
from unbraid.errors import ActivationError
from unbraid.evaluation.explained import ExplainedVariance
from unbraid.randomness import generator
from unbraid.synthetic import build_world
from unbraid.synthetic.learning import train_on_world
from unbraid.training.loop import train_saes
from unbraid.training.normalisation import Normalisation
from unbraid.training.run_folder import RunFolder

CPU, D = torch.device("cpu"), 16
OFFSETS = [10.0, 1e3, 1e5]


class Silent:
    def filling(self, rows, capacity):
        pass

    def step(self, step, record):
        pass


class OffsetSource(FakeSource):
    """Activations of unit spread per row, moved by `offset` along one direction."""

    def __init__(self, offset: float):
        super().__init__(600, d_model=D)
        self.truth_KD = torch.nn.functional.normalize(torch.randn(24, D, generator=generator(0, "truth")), dim=1)
        self.offset_D = offset * torch.nn.functional.normalize(torch.randn(D, generator=generator(0, "offset")), dim=0)

    def chunks(self, position=None, held_out=False):
        for chunk in super().chunks(position, held_out):
            draw = generator(1, "codes", chunk.position["context"])
            f_BTK = torch.rand(*chunk.tokens_BT.shape, 24, generator=draw)
            x_BTD = (f_BTK * (f_BTK > 0.9)) @ self.truth_KD
            yield replace(chunk, activations=[x_BTD + self.offset_D])


def exported_r2(sae: torch.nn.Module, rows: torch.Tensor) -> float:
    """R^2 of an SAE that acts on raw activations, in float64."""
    explained, sae = ExplainedVariance(), copy.deepcopy(sae).double()
    explained.add(rows.double(), sae(rows.double()).detach())
    return explained.r2


def r2_of_a_run(folder, offset: float, architecture: str) -> float:
    config = RunConfig(
        model=ModelConfig(sites=["resid_post.0"], batch_contexts=4),
        buffer=BufferConfig(contexts=64),
        sae=sae_settings(architecture, n_features=48, k=4, lambda1=0.02, dead_after_tokens=4000),
        optimiser=OptimiserConfig(lr=1e-2, warmup_steps=4),
        training=TrainingConfig(tokens=60 * 32, batch_tokens=32, log_every=50),
    )
    source = OffsetSource(offset)
    trained = train_saes(RunFolder.create(folder, config), config, source, CPU, Silent())
    (trainer,) = trained.trainers
    trainer.fold()
    rows = torch.cat([chunk.activations[0].flatten(0, 1) for chunk in source.chunks()])
    return exported_r2(trainer.sae, rows)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("batch_topk", "jumprelu", "gated")]


@pytest.mark.parametrize("architecture", ["topk", "relu", *SLOW])
def test_r2_of_a_run_does_not_depend_on_how_far_its_activations_are_from_zero(tmp_path, architecture):
    at_zero = r2_of_a_run(tmp_path / "0", 0.0, architecture)
    assert at_zero > 0.5
    for offset in OFFSETS:
        assert r2_of_a_run(tmp_path / f"{offset}", offset, architecture) == pytest.approx(at_zero, abs=0.03)


def test_r2_on_a_synthetic_world_does_not_depend_on_how_far_it_is_from_zero():
    settings = VariantConfig(
        seed=0,
        sae=SAEConfig(architecture="topk", n_features=16, k=2),
        decorrelation=DecorrelationConfig(),
        optimiser=OptimiserConfig(lr=3e-3, warmup_steps=2),
    )
    found = []
    for offset in (0.0, 1e3):
        world = build_world("unit")
        x_BD, _ = world.sample(4096, generator(0, "spread"))
        sigma = (x_BD - x_BD.mean(0)).square().sum(1).mean().sqrt()
        world = replace(world, bias=world.bias + offset * sigma / world.d_model**0.5)
        (sae,) = train_on_world(world, [settings], samples=32_768, batch=256)
        found.append(exported_r2(sae, world.sample(4096, generator(0, "held out"))[0]))
    assert found[0] > 0.5
    assert found == pytest.approx([found[0]] * len(found), abs=0.03)


def test_mean_and_scale_are_those_of_float64():
    rows = torch.randn(20_000, 5, generator=generator(0, "rows")) + 1e4
    found = Normalisation.of(rows)
    assert found.mean_D.tolist() == rows.double().mean(0).float().tolist()
    exact = (rows.double() - found.mean_D).square().sum(1).mean().rsqrt()
    assert found.scale == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize("rows", [torch.zeros(9, 4), torch.full((9, 4), 7.3), torch.zeros(0, 4)], ids=str)
def test_activations_that_do_not_vary_are_refused(rows):
    with pytest.raises(ActivationError, match=r"resid_post\.3.*expected"):
        Normalisation.of(rows, "resid_post.3")
