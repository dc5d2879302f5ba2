"""Arithmetic settings do what they say, and only for as long as they should."""

import pytest
import torch
from fake_source import FakeSource

from unbraid.config import BufferConfig, ModelConfig, OptimiserConfig, RunConfig, SAEConfig, TrainingConfig
from unbraid.training.loop import train_saes
from unbraid.training.precision import matrix_products
from unbraid.training.run_folder import RunFolder


class Silent:
    def filling(self, rows, capacity):
        pass

    def step(self, step, record):
        pass


def trained_weights(folder, precision: str) -> dict[str, torch.Tensor]:
    config = RunConfig(
        model=ModelConfig(sites=["resid_post.0"], batch_contexts=4),
        buffer=BufferConfig(contexts=32),
        sae=SAEConfig(architecture="topk", n_features=32, k=4),
        optimiser=OptimiserConfig(lr=1e-3, warmup_steps=0, precision=precision),
        training=TrainingConfig(tokens=20 * 32, batch_tokens=32),
    )
    source = FakeSource(400, d_model=16, n_sites=1)
    trained = train_saes(RunFolder.create(folder, config), config, source, torch.device("cpu"), Silent())
    return trained.trainers[0].tensors()


def test_bfloat16_products_change_the_weights_by_rounding_and_leave_them_and_adam_in_float32(tmp_path):
    exact = trained_weights(tmp_path / "float32", "float32")
    rounded = trained_weights(tmp_path / "bfloat16", "bfloat16")
    assert not torch.equal(rounded["sae.W_dec"], exact["sae.W_dec"])
    assert (rounded["sae.W_dec"] - exact["sae.W_dec"]).norm() < 0.05 * exact["sae.W_dec"].norm()
    assert {t.dtype for name, t in rounded.items() if name.startswith(("sae.", "optimiser."))} == {torch.float32}


@pytest.mark.parametrize(("tf32", "wanted"), [(True, "high"), (False, "highest")])
def test_tf32_is_set_for_a_run_and_the_previous_choice_comes_back(tf32, wanted):
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(KeyError), matrix_products(tf32):
            assert torch.get_float32_matmul_precision() == wanted
            raise KeyError
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
