"""Activations of prompts are computed once, and again where what was kept cannot be read."""

from pathlib import Path

import torch

from unbraid.activations.language_model import load_language_model
from unbraid.config import ModelConfig
from unbraid.evaluation.prompts import cached_activations


def test_a_damaged_file_in_the_cache_is_made_again(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("UNBRAID_CACHE", str(tmp_path))
    config = ModelConfig(name="random:llama", sites=["resid_post.0"])
    model = load_language_model(config, torch.device("cpu"))
    read: list[int] = []
    asked = (model, [[3, 4, 5], [6, 7]], [[2], [0, 1]], read.append)
    (first,) = cached_activations(*asked)
    (kept,) = tmp_path.rglob("*.safetensors")
    for damage in (b"", b"no tensors", kept.read_bytes()[:-3]):
        kept.unlink()  # tensors that were read from it lie in that very file
        kept.write_bytes(damage)
        assert torch.equal(cached_activations(*asked)[0], first)
    assert read == [2] * 4
    assert torch.equal(cached_activations(*asked)[0], first) and read == [2] * 4
