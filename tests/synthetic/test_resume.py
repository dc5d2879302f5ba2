"""Training on worlds that is interrupted ends with the same bytes, and goes on only from checkpoints of its own."""

from pathlib import Path

import pytest
import torch

from unbraid.config import DecorrelationConfig, OptimiserConfig, SAEConfig, SynthConfig, VariantConfig
from unbraid.errors import CheckpointError
from unbraid.evaluation.synth import run_synth
from unbraid.randomness import generator
from unbraid.sae import SAE
from unbraid.synthetic import build_world
from unbraid.synthetic.learning import train_on_world


class Killed(Exception):
    """The process ended here."""


def variants() -> list[VariantConfig]:
    saes = [SAEConfig(architecture=name, n_features=16, k=2) for name in ("batch_topk", "matryoshka")]
    penalty = DecorrelationConfig(space="decoder", lambda2=0.1, refresh=2)
    return [VariantConfig(seed=1, sae=sae, decorrelation=penalty, optimiser=OptimiserConfig(lr=3e-3)) for sae in saes]


def trained(folder: Path | None, kill_after: int = 0) -> list[SAE]:
    def on_step(done: int, trainers: list) -> None:
        if done == kill_after:
            raise Killed

    return train_on_world(build_world("unit"), variants(), 20 * 128, 128, on_step, None, folder, 3)


@pytest.mark.parametrize("killed_after", [2, 10, 17])
def test_a_killed_training_goes_on_to_the_same_bytes(tmp_path, killed_after):
    whole = trained(None)
    with pytest.raises(Killed):
        trained(tmp_path, killed_after)
    resumed = trained(tmp_path)
    again = trained(tmp_path)
    for sae, other, third in zip(whole, resumed, again, strict=True):
        for name, value in sae.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]) and torch.equal(value, third.state_dict()[name]), name


def test_checkpoints_of_another_training_are_refused(tmp_path):
    trained(tmp_path)
    with pytest.raises(CheckpointError, match="other settings"):
        train_on_world(build_world("unit"), variants(), 10 * 128, 128, checkpoints=tmp_path)


def test_the_command_goes_on_from_its_folder_with_the_same_numbers(tmp_path):
    config = SynthConfig(world="unit", architectures=["batch_topk"], samples=4096, batch=256, eval_samples=512)
    first = run_synth(config, resume=tmp_path)
    assert (tmp_path / "seed_0" / "step_16").is_dir()
    assert run_synth(config, resume=tmp_path)["rows"] == first["rows"]
    with pytest.raises(CheckpointError, match="other settings"):
        run_synth(config.model_copy(update={"samples": 8192}), resume=tmp_path)


@pytest.mark.parametrize("used", [0, 1, 3, 4, 5])
def test_a_stream_goes_on_where_its_state_was_taken(used, monkeypatch):
    monkeypatch.setattr("unbraid.synthetic.world.BLOCK_ROWS", 4 * 8)
    world = build_world("unit")
    stream = world.batches(8, generator(0, "stream"))
    for _ in range(used):
        next(stream)
    loaded = world.batches(8, generator(1, "another"))
    loaded.load_state_dict(stream.state_dict())
    for _ in range(9):
        assert torch.equal(next(loaded), next(stream))
