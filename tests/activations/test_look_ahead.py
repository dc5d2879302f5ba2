"""Models in which tokens see later tokens: found by trying, refused unless asked for; filling is never read."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from unbraid.activations.language_model import LanguageModel, load_language_model
from unbraid.activations.random_model import word_tokenizer
from unbraid.config import ModelConfig
from unbraid.errors import ModelError
from unbraid.evaluation.prompts import activations_at

TOKENIZER = word_tokenizer()
SHAPE: dict[str, Any] = {
    "vocab_size": len(TOKENIZER), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 128,
}  # fmt: skip
GEMMA = SHAPE | {"num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8}
LOOK_AHEAD = {
    "BERT": transformers.BertConfig(**SHAPE),
    "Gemma for embeddings": transformers.Gemma3TextConfig(**GEMMA, use_bidirectional_attention=True),
}
CAUSAL = {
    "Llama": transformers.LlamaConfig(**SHAPE),
    "BERT as a decoder": transformers.BertConfig(**SHAPE, is_decoder=True),
    "sliding windows": transformers.Gemma3TextConfig(**GEMMA, sliding_window=4),
    "alibi": transformers.BloomConfig(vocab_size=len(TOKENIZER), hidden_size=32, n_layer=3, n_head=4),
    "recurrent": transformers.MambaConfig(vocab_size=len(TOKENIZER), hidden_size=32, num_hidden_layers=3),
    "experts": transformers.MixtralConfig(**SHAPE, num_key_value_heads=2, num_local_experts=4),
}
SHORT, LONG = [5, 6, 7], list(range(2, 42))


def build(config: Any, **options: Any) -> LanguageModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).float()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    return LanguageModel(model, TOKENIZER, ["resid_post.1"], **options)


@pytest.mark.parametrize("name", LOOK_AHEAD)
def test_a_model_that_looks_ahead_is_refused_with_the_setting_that_takes_it(name: str) -> None:
    with pytest.raises(ModelError, match=r"looks ahead.*expected a causal language model; set model\.bidirectional"):
        build(LOOK_AHEAD[name])
    assert build(LOOK_AHEAD[name], bidirectional=True).widths == [32]


@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_model_of_any_make_is_taken(name: str) -> None:
    assert build(CAUSAL[name]).widths == [32]


@pytest.mark.parametrize("name", [*LOOK_AHEAD, *CAUSAL])
def test_a_short_prompt_gives_the_same_beside_a_longer_one(name: str) -> None:
    model = build(LOOK_AHEAD.get(name) or CAUSAL[name], bidirectional=True)
    alone = activations_at(model, [SHORT], [[0, 1, 2]])[0]
    beside = activations_at(model, [SHORT, LONG], [[0, 1, 2], [0]])[0][:3]
    assert torch.allclose(alone, beside, atol=1e-4, rtol=1e-4)


def test_an_encoder_in_a_folder_is_refused_by_name_and_read_when_asked_for(tmp_path: Path) -> None:
    special = {"bos_token_id": 0, "cls_token_id": 0, "eos_token_id": 1, "sep_token_id": 1, "pad_token_id": 0}
    model = transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**SHAPE, **special))
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    settings = ModelConfig(name=str(tmp_path), sites=["resid_post.1"])
    with pytest.raises(ModelError, match=r"is an encoder \(ModernBert\).*set model\.bidirectional to true"):
        load_language_model(settings)
    loaded = load_language_model(settings.model_copy(update={"bidirectional": True}))
    tokens = torch.arange(40).view(2, 20)
    with torch.inference_mode():
        hidden = loaded.model(tokens, output_hidden_states=True).hidden_states
    assert torch.allclose(loaded.activations(tokens)[0], hidden[2], atol=1e-6)
    assert loaded.logits(tokens).shape == (2, 20, len(TOKENIZER))
