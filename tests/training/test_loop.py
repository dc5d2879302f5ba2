"""What the loop promises, on a fake source: no model, no text, a few dozen steps of a small SAE."""

import json
from pathlib import Path

import pytest
import torch
from fake_source import FakeSource
from sae_settings import sae_settings

from unbraid.activations.buffer import ActivationBuffer
from unbraid.config import BufferConfig, ModelConfig, OptimiserConfig, RunConfig, TrainingConfig
from unbraid.errors import TrainingError
from unbraid.training.checkpoint import list_checkpoints, read_checkpoint
from unbraid.training.loop import Trained, train_saes
from unbraid.training.normalisation import Normalisation
from unbraid.training.run_folder import RunFolder
from unbraid.training.sae_trainer import new_trainer
from unbraid.training.stopping import TrainingInterrupted

CPU = torch.device("cpu")


class Silent:
    def filling(self, rows, capacity):
        pass

    def step(self, step, record):
        pass


def make_config(steps: int = 24, variants: dict | None = None, **sae) -> RunConfig:
    return RunConfig(
        model=ModelConfig(sites=["resid_post.0", "resid_post.1"], batch_contexts=4),
        buffer=BufferConfig(contexts=32),
        sae=sae_settings(**{"n_features": 32, "dead_after_tokens": 100_000, "lambda1": 0.02, "k": 4} | sae),
        optimiser=OptimiserConfig(lr=1e-2, warmup_steps=4),
        training=TrainingConfig(tokens=steps * 32, batch_tokens=32, log_every=5, checkpoint_every=10),
        variants=variants or {"decorrelated": {}, "twin": {"decorrelation.lambda2": 0}},
    )


def make_source() -> FakeSource:
    return FakeSource(400, d_model=16, n_sites=2)


def train(folder: Path, config: RunConfig, source: FakeSource | None = None, **settings) -> Trained:
    run = RunFolder(folder) if (folder / "config.json").exists() else RunFolder.create(folder, config)
    return train_saes(run, config, source or make_source(), CPU, Silent(), **settings)


def weights(trained: Trained) -> dict[str, torch.Tensor]:
    return {f"{t.name}.{name}": tensor for t in trained.trainers for name, tensor in t.sae.state_dict().items()}


def assert_same_bytes(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_the_loop_executes_every_planned_step_and_learns(tmp_path):
    trained = train(tmp_path / "run", make_config(60))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, *range(5, 61, 5)]
    for trainer in trained.trainers:
        assert trainer.updates == 60
        first, last = lines[0]["saes"][trainer.name], lines[-1]["saes"][trainer.name]
        assert last["loss"] < 0.9 * first["loss"]
        assert 0 < last["l0"] < 32
        assert torch.allclose(trainer.sae.W_dec.norm(dim=1), torch.ones(32), atol=1e-5)


def test_two_runs_of_one_seed_end_with_the_same_bytes(tmp_path):
    first, second = train(tmp_path / "a", make_config()), train(tmp_path / "b", make_config())
    assert_same_bytes(weights(first), weights(second))
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == (tmp_path / "b" / "metrics.jsonl").read_bytes()


def test_another_seed_gives_other_weights(tmp_path):
    first = weights(train(tmp_path / "a", make_config()))
    second = weights(train(tmp_path / "b", make_config().model_copy(update={"seed": 1})))
    assert not torch.equal(first["resid_post.0_twin.W_dec"], second["resid_post.0_twin.W_dec"])


@pytest.mark.parametrize("method", ["none", "selective", "global", "static_groups", "orthogonal", "random_pairs"])
def test_a_variant_trained_beside_others_is_the_same_as_trained_alone(tmp_path, method):
    variants = {
        "a": {
            "decorrelation.method": method,
            **({"decorrelation.window": 2} if method == "selective" else {}),
            **({"decorrelation.groups": 8} if method == "static_groups" else {}),
        },
        "b": {"seed": 3},
        "c": {"sae.architecture": "topk", "sae.k": 4, "decorrelation.lambda2": 0},
    }
    together = weights(train(tmp_path / "together", make_config(variants=variants)))
    for name, overrides in variants.items():
        alone = weights(train(tmp_path / name, make_config(variants={name: overrides, "b": {"seed": 3}})))
        assert_same_bytes({key: together[key] for key in alone}, alone)


@pytest.mark.parametrize("architecture", ["relu", "topk"])
@pytest.mark.parametrize("stop_at", [1, 7, 10, 13, 23])
def test_a_stopped_run_resumes_to_the_same_bytes(tmp_path, stop_at, architecture):
    config = make_config(architecture=architecture)
    whole = train(tmp_path / "whole", config)
    steps = []

    class Count(Silent):
        def step(self, step, record):
            steps.append(step)

    run = RunFolder.create(tmp_path / "cut", config)
    with pytest.raises(TrainingInterrupted, match=f"after step {stop_at} of 24.*unbraid resume"):
        train_saes(run, config, make_source(), CPU, Count(), should_stop=lambda: len(steps) >= stop_at)
    resumed = train(tmp_path / "cut", config)
    assert_same_bytes(weights(whole), weights(resumed))
    assert (tmp_path / "whole" / "metrics.jsonl").read_bytes() == (tmp_path / "cut" / "metrics.jsonl").read_bytes()


def test_lines_logged_after_the_last_checkpoint_are_written_once(tmp_path):
    """A killed process has logged steps its newest checkpoint knows nothing of; resuming must not repeat them."""
    config = make_config()

    class Killed(Exception):
        pass

    class Kill(Silent):
        def step(self, step, record):
            if step == 17:
                raise Killed

    whole = train(tmp_path / "whole", config)
    run = RunFolder.create(tmp_path / "cut", config)
    with pytest.raises(Killed):
        train_saes(run, config, make_source(), CPU, Kill())
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 18, "tok')
    resumed = train(tmp_path / "cut", config)
    assert_same_bytes(weights(whole), weights(resumed))
    assert (tmp_path / "whole" / "metrics.jsonl").read_bytes() == (tmp_path / "cut" / "metrics.jsonl").read_bytes()


def test_a_run_whose_log_is_gone_is_not_resumed_without_it(tmp_path):
    train(tmp_path / "run", make_config())
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(TrainingError, match=r"metrics\.jsonl' has 0 bytes; expected the .* before the checkpoint"):
        train(tmp_path / "run", make_config())


def test_a_finished_run_needs_no_text_to_be_read_again(tmp_path):
    config = make_config()
    first = train(tmp_path / "run", config)
    source = make_source()
    again = train(tmp_path / "run", config, source)
    assert source.passes == 0
    assert_same_bytes(weights(first), weights(again))


def test_the_final_checkpoint_holds_no_more_rows_than_a_chunk(tmp_path):
    train(tmp_path / "run", make_config())
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert newest.name == "step_24"
    tensors, _ = read_checkpoint(newest, lambda stem: stem == "buffer")
    assert len(tensors["buffer"]["unread"]) < 4 * 8


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(tmp_path):
    config = make_config(variants={"": {}})
    seen = {}

    class Poison(Silent):
        def step(self, step, record):
            if step == 6:
                seen["bias"] = trainer_bias()

    bias = {}

    def trainer_bias():
        bias["before"] = bias["sae"].b_dec.detach().clone()
        bias["sae"].b_dec.data[0] = float("nan")
        return True

    from unbraid.training import loop

    original = loop.new_trainer

    def remember(*args):
        trainer = original(*args)
        bias["sae"] = trainer.sae
        return trainer

    loop.new_trainer, restore = remember, original
    try:
        with pytest.raises(TrainingError, match=r"loss of resid_post\.\d became nan at step 7.*lower optimiser.lr"):
            train_saes(RunFolder.create(tmp_path / "run", config), config, make_source(), CPU, Poison())
    finally:
        loop.new_trainer = restore


def test_activations_are_centred_then_scaled_so_that_their_mean_square_norm_is_one(tmp_path):
    config = make_config(steps=2)
    trained = train(tmp_path / "run", config)
    buffer = ActivationBuffer(make_source(), config.buffer, 32, 0, planned_rows=64)
    buffer.fill()
    units = trained.trainers[0].normalise(next(buffer.rows()))
    assert float(units.square().sum(1).mean()) == pytest.approx(1, abs=1e-5)
    assert float(units.mean(0).norm()) < 1e-5


def test_the_decoder_bias_starts_at_zero_in_training_units(tmp_path):
    trained = train(tmp_path / "run", make_config(steps=1))
    moved = max(float(trainer.sae.b_dec.detach().abs().max()) for trainer in trained.trainers)
    assert moved <= 1.01e-2 / 4  # one step of Adam at the warm-up's first learning rate, from zero


def test_twins_start_from_the_same_weights(tmp_path):
    config = make_config()
    width = [Normalisation.none(16)] * 2
    places = [(site, variant) for site in (0, 1) for variant in config.variants]
    made = [new_trainer(config, site, variant, width, CPU) for site, variant in places]
    trainers = {trainer.name: trainer.sae.state_dict() for trainer in made}
    for name, tensor in trainers["resid_post.0_decorrelated"].items():
        assert torch.equal(tensor, trainers["resid_post.0_twin"][name])
    assert not torch.equal(trainers["resid_post.0_twin"]["W_dec"], trainers["resid_post.1_twin"]["W_dec"])
    weights = {name: tensor for name, tensor in trainers["resid_post.0_twin"].items() if not name.startswith("b_")}
    assert all(tensor.abs().sum() > 0 for tensor in weights.values())


def test_a_feature_that_fires_counts_from_zero_again(tmp_path):
    """After 24 steps of 32 rows the lively ones have a count of zero, and none counts more than all rows."""
    trained = train(tmp_path / "run", make_config())
    for trainer in trained.trainers:
        assert trainer.tokens_since_fired.min() == 0
        assert trainer.tokens_since_fired.max() <= 24 * 32
        assert set((trainer.tokens_since_fired % 32).tolist()) == {0}
