"""Models stored or loaded in few bits, and spread over devices, are read as transformers reads them: `make test-peers`.

bitsandbytes and accelerate run on a CPU too. What can be refused without them is in test_language_model_loading.py.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from gguf_files import write_gguf
from torch import Tensor

import unbraid
from unbraid.activations.language_model import LanguageModel, load_language_model
from unbraid.config import ModelConfig, overridden
from unbraid.text.tokens import tokenise

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
SITES = ["resid_post.0", "attn_z.1", "mlp_act.1", "mlp_out.1", "resid_post.1"]
TOKENS = torch.arange(7, 67).reshape(2, 30)


def load(name: Any, **settings: Any) -> LanguageModel:
    return load_language_model(ModelConfig.model_validate({"name": str(name), "sites": SITES} | settings))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    pytest.importorskip("accelerate", reason="accelerate, from `make test-peers`")
    place, original = tmp_path_factory.mktemp("model"), load("random:llama")
    original.model.save_pretrained(place)  # pyright: ignore
    original.tokenizer.save_pretrained(place)
    return place


def apart(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative distance of a site."""
    return max(float((one - other).norm() / other.norm()) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(("quantisation", "largest"), [("8bit", 0.05), ("4bit", 0.5)])
def test_a_model_quantised_while_loading_is_read_as_transformers_quantises_it(quantisation, largest, folder: Path):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes, from `make test-peers`")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    loaded = load(folder, quantisation=quantisation)
    linear = {"8bit": bitsandbytes.nn.Linear8bitLt, "4bit": bitsandbytes.nn.Linear4bit}[quantisation]
    assert sum(isinstance(module, linear) for module in loaded.model.modules()) == 14
    bits = {f"load_in_{quantisation}": True} | ({"bnb_4bit_quant_type": "nf4"} if quantisation == "4bit" else {})
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=BitsAndBytesConfig(**bits)
    )
    with torch.inference_mode():
        hidden = theirs(TOKENS, output_hidden_states=True, use_cache=False).hidden_states
    found = loaded.activations(TOKENS)
    assert torch.equal(found[0], hidden[1])
    assert 0 < apart(found, load("random:llama").activations(TOKENS)) < largest


def test_a_model_stored_quantised_is_loaded_as_it_is(folder: Path, tmp_path: Path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes, from `make test-peers`")
    quantised = load(folder, quantisation="8bit")
    quantised.model.save_pretrained(tmp_path)  # pyright: ignore
    quantised.tokenizer.save_pretrained(tmp_path)
    assert apart(load(tmp_path).activations(TOKENS), quantised.activations(TOKENS)) < 1e-6


def test_a_run_trains_on_a_quantised_model(folder: Path, tmp_path: Path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes, from `make test-peers`")
    settings = {"model.name": str(folder), "model.quantisation": "8bit", "model.sites": ["resid_post.1"]}
    sizes = {"training.tokens": 2560, "training.held_out_tokens": 256}
    run = unbraid.train(overridden(unbraid.recipes.tiny(), settings | sizes)[0], tmp_path / "run")
    assert run.config.model.quantisation == "8bit" and all(one["l0"] > 0 for one in run.summary["saes"].values())


@pytest.mark.parametrize("device_map", ["auto", "balanced", "sequential"])
def test_a_model_that_may_be_spread_gives_the_same_to_the_bit(device_map: str, folder: Path):
    assert apart(load(folder, device_map=device_map).activations(TOKENS), load(folder).activations(TOKENS)) == 0


def test_a_gguf_file_loads_as_the_model_it_was_written_from(folder: Path, tmp_path: Path):
    original = load(folder)
    write_gguf(original, tmp_path / "tiny.gguf")
    loaded = load(tmp_path / "tiny.gguf")
    assert apart(loaded.activations(TOKENS), original.activations(TOKENS)) < 1e-6
    text = "bade gale. é"
    assert tokenise(loaded.tokenizer, [text]) == tokenise(original.tokenizer, [text])


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16"])
def test_a_quantised_gguf_file_is_widened_to_what_its_numbers_say(kind: str, folder: Path, tmp_path: Path):
    original = load(folder)
    write_gguf(original, tmp_path / "tiny.gguf", kind)
    loaded, stored = load(tmp_path / "tiny.gguf"), GGMLQuantizationType[kind]
    name = "model.layers.1.mlp.down_proj.weight"
    weight = original.model.state_dict()[name]
    expected = torch.from_numpy(dequantize(quantize(weight.numpy(), stored), stored))
    assert torch.equal(loaded.model.state_dict()[name], expected) and loaded.dtype == torch.float32
    assert 0 < apart(loaded.activations(TOKENS), original.activations(TOKENS)) < 0.6
