"""Every way the paper's code failed, as a promise that ours does not (one test a line of the design's list)."""

import json
import math

import pytest
import torch
from fake_source import FakeSource
from torch import Tensor

import unbraid
from unbraid import finish, recipes, run
from unbraid.activations.buffer import ActivationBuffer
from unbraid.activations.live import LiveActivations
from unbraid.config import BufferConfig, RunConfig, SAEConfig, overridden
from unbraid.decorrelation.penalty import SelectiveDecorrelation
from unbraid.errors import ConfigError, ModelError
from unbraid.randomness import generator
from unbraid.sae import build
from unbraid.training.checkpoint import list_checkpoints, read_checkpoint
from unbraid.training.normalisation import Normalisation
from unbraid.training.sae_trainer import new_trainer, train_step


def changed(config: RunConfig, **settings: object) -> RunConfig:
    """`config` with dotted settings changed, checked again."""
    return overridden(config, {path.replace("__", "."): value for path, value in settings.items()})[0]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> unbraid.Run:
    """One whole tiny run, shared by the tests that only read it."""
    return unbraid.train(recipes.tiny(), tmp_path_factory.mktemp("tiny") / "run")


def test_a_plan_of_zero_steps_is_refused_with_its_arithmetic_before_a_model_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "open_activations", lambda *_: pytest.fail("the model was loaded"))
    config = changed(recipes.tiny(), training__tokens=1000, training__batch_tokens=2048)
    with pytest.raises(ConfigError, match=r"training.tokens = 1,000 // training.batch_tokens = 2,048 gives 0 steps"):
        unbraid.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_executed_steps_equal_planned_steps_for_every_sae(tiny):
    assert tiny.summary["steps"] == {"planned": 100, "executed": 100}
    assert [sae["steps"] for sae in tiny.summary["saes"].values()] == [{"planned": 100, "executed": 100}] * 4


def test_a_site_the_model_does_not_have_is_an_error_that_counts_its_layers(tmp_path):
    config = changed(recipes.tiny(), model__sites=["resid_post.7"])
    with pytest.raises(ModelError, match=r"resid_post\.7.*2"):
        unbraid.train(config, tmp_path / "run")


def test_an_exception_inside_the_source_reaches_the_caller_as_it_is():
    class Broken(FakeSource):
        def chunks(self, position, held_out=False):
            yield from list(super().chunks(position))[:2]
            raise ZeroDivisionError("inside the pipeline")

    with pytest.raises(ZeroDivisionError, match="inside the pipeline"):
        ActivationBuffer(Broken(64), BufferConfig(contexts=16), 16, seed=0).fill()


def test_no_weight_matrix_starts_at_zero():
    sae = build(SAEConfig(n_features=32), 16, generator(0, "test"))
    assert (sae.W_enc.norm(dim=0) > 0.25).all()
    assert (sae.W_dec.norm(dim=1) > 0.5).all()


def test_decoder_rows_not_columns_have_unit_norm_after_training(tiny):
    for sae in tiny.saes.values():
        assert sae.W_dec.shape == (128, 64)
        assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(128), atol=1e-5)
        assert not torch.allclose(sae.W_dec.norm(dim=0), torch.ones(64), atol=0.1)


def test_the_buffer_hands_out_token_rows_of_equal_number_at_every_step():
    buffer = ActivationBuffer(FakeSource(64), BufferConfig(contexts=16), 16, seed=0)
    assert [buffer.next_batch()[0].shape for _ in range(20)] == [(16, 4)] * 20


def test_train_returns_the_run(tiny):
    assert isinstance(tiny, unbraid.Run)
    assert set(tiny.saes) == set(tiny.summary["saes"])


def test_every_site_and_variant_has_a_file_of_its_own(tiny):
    saes = tiny.saes
    assert sorted(saes) == [f"resid_post.{layer}_{variant}" for layer in (0, 1) for variant in ("decorrelated", "twin")]
    weights = [sae.W_dec for sae in saes.values()]
    assert all(not torch.equal(first, second) for i, first in enumerate(weights) for second in weights[:i])


def test_the_loss_is_equations_one_to_four_by_hand():
    """Squared error summed over D, averaged over tokens; lambda1 L1; lambda2 R with every pair counted once."""
    config = changed(recipes.tiny(), optimiser__warmup_steps=0)
    trainer = new_trainer(config, 0, "decorrelated", [Normalisation.none(16)], torch.device("cpu"))
    x_BD = torch.randn(64, 16, generator=generator(0, "x"))
    f_BN = trainer.sae.encode(x_BD).detach().double()
    error_BD = x_BD.double() - f_BN @ trainer.sae.W_dec.detach().double() - trainer.sae.b_dec.detach().double()
    unit_BN = f_BN / f_BN.norm(dim=0)
    correlations = torch.cat([(unit_BN[:, i] @ unit_BN[:, i + 1 :]) for i in range(127)])
    tau = correlations.mean() + correlations.std(correction=0)
    selected = round(1e-3 * len(correlations))
    penalty = (correlations.topk(selected).values - tau).relu().sum() / selected
    expected = error_BD.square().sum(1).mean() + 0.04 * f_BN.sum(1).mean() + 0.1 * penalty
    record = train_step(trainer, x_BD, 0, 1e-3, log=True)
    assert record is not None
    assert record["tau"] == pytest.approx(float(tau), rel=1e-5)
    assert record["penalty"] == pytest.approx(float(penalty), rel=1e-5)
    assert record["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_the_penalty_of_wide_codes_makes_no_matrix_of_all_pairs():
    """A million features: their Gram matrix would be 4 TB; what fires together on 16 tokens fits in kilobytes."""
    n = 1_000_000
    indices_BK = torch.randint(n, (16, 8), generator=generator(0, "wide")).sort(dim=1).values
    values_BK = torch.rand(16, 8, generator=generator(0, "values")) + 0.1
    _, stats = unbraid.SelectiveDecorrelation()(indices=indices_BK, values=values_BK, n_features=n)
    assert stats.n_live > 100
    assert 0 < len(stats.pairs) <= 16 * 8 * 7 / 2


def test_pairs_are_searched_in_training_only(tiny, monkeypatch):
    monkeypatch.setattr(SelectiveDecorrelation, "forward", lambda *_, **__: pytest.fail("pairs were searched"))
    sae = next(iter(tiny.saes.values()))
    assert sae(torch.randn(5, 64)).shape == (5, 64)


def test_activations_are_scaled_before_l1_is_weighed(tiny):
    for sae in tiny.summary["saes"].values():
        assert sae["scale"] > 0
        assert 0 < sae["l0"] < 64
        assert sae["reconstruction_error"] < 1


def test_captured_activations_are_contexts_by_tokens_by_width():
    source = LiveActivations(recipes.tiny(), torch.device("cpu"))
    chunk = next(source.chunks(None))
    assert [x_BTD.shape for x_BTD in chunk.activations] == [(16, 32, 64)] * 2
    output = source.model.model(chunk.tokens_BT, output_hidden_states=True)
    assert torch.equal(output.hidden_states[1], chunk.activations[0])
    assert not torch.equal(chunk.activations[0][0], chunk.activations[0][1])


def test_losses_and_gradients_are_finite_at_every_logged_step(tiny):
    for line in (tiny.path / "metrics.jsonl").read_text().splitlines():
        for record in json.loads(line)["saes"].values():
            assert math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])


@pytest.mark.parametrize(
    ("architecture", "l0", "dead", "expected"),
    [
        ("relu", 100.0, 0.0, "raise sae.lambda1"),
        ("relu", 0.0, 0.0, "lower sae.lambda1"),
        ("relu", 10.0, 0.9, "lower sae.lambda1"),
        ("topk", 100.0, 0.0, "lower sae.k"),
        ("topk", 0.0, 0.0, "raise sae.k"),
        ("topk", 10.0, 0.9, "lower sae.dead_after_tokens"),
    ],
)
def test_a_run_that_ends_too_dense_or_dead_says_which_setting_to_move(architecture, l0, dead, expected):
    config = changed(recipes.tiny(), sae__architecture=architecture)
    documents = {"seen": 1, "skipped": {}}
    summary = {"documents": documents, "saes": {config.sae_names[0]: {"l0": l0, "dead_fraction": dead}}}
    (warning,) = run.warnings_of(summary, config)
    assert expected in warning


def test_a_warning_goes_by_the_settings_of_the_variant_it_is_about():
    variants = {"": {}, "wide": {"sae.n_features": 4096, "sae.lambda1": 0.5}, "narrow": {"sae.n_features": 64}}
    config = recipes.tiny().model_copy(update={"variants": variants})
    saes = {name: {"l0": 40.0, "dead_fraction": 0.0} for name in config.sae_names}
    warnings = run.warnings_of({"documents": {"seen": 1, "skipped": {}}, "saes": saes}, config)
    assert ["narrow" in warning and "of 64 features" in warning for warning in warnings] == [True] * len(config.sites)
    (warning,) = run.warnings_of(
        {"documents": {"seen": 1, "skipped": {}}, "saes": {"resid_post.0_wide": {"l0": 0.0, "dead_fraction": 0.0}}},
        config,
    )
    assert "lower sae.lambda1 (now 0.5)" in warning


def test_the_exported_sae_reproduces_training_time_reconstructions_on_raw_activations(tmp_path, monkeypatch):
    """Mean and scale are folded once, by outputs: SAE in training units against the folder on disk."""
    config = changed(recipes.tiny(), training__tokens=5120)
    kept: list[tuple[Tensor, Tensor]] = []
    held_out_metrics = finish.held_out_metrics

    def remember(sae, batches, fraction, *rest):
        batches = list(batches)
        kept.append((batches[0], sae(batches[0]).detach()))
        return held_out_metrics(sae, batches, fraction, *rest)

    monkeypatch.setattr(finish, "held_out_metrics", remember)
    finished = unbraid.train(config, tmp_path / "run")
    tensors, _ = read_checkpoint(list_checkpoints(finished.path / "checkpoints")[-1])
    for (name, sae), (units, reconstruction) in zip(finished.saes.items(), kept, strict=True):
        mean_D, scale = tensors[f"sae-{name}"]["trainee.mean"], finished.summary["saes"][name]["scale"]
        folded = (sae(mean_D + units / scale) - mean_D) * scale
        assert (folded - reconstruction).norm() < 1e-5 * reconstruction.norm()
