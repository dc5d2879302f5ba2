"""Tiny random models of real families, for tests and for trying things out without a download.

Each is built from its family's own config class and keeps what makes the family special (Gemma 2: sandwich norms,
soft-capping, alternating windows), so code that works here meets nothing new in the real model. Seeded, and torch's
global generator is left as it was.
"""

from typing import Any

import torch
from torch import nn

from unbraid.randomness import derive_seed
from unbraid.text.generated import WORDS

WIDTH = 64
POSITIONS = 4096
BOS, EOS = "<bos>", "<eos>"
_LLAMA_LIKE = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.1,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _LLAMA_LIKE),
    "gemma2": ("Gemma2Config", _LLAMA_LIKE | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}),
    "qwen2": ("Qwen2Config", _LLAMA_LIKE),
    "gpt2": (
        "GPT2Config",
        {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, "initializer_range": 0.1},
    ),
    "gpt_neox": ("GPTNeoXConfig", {key: value for key, value in _LLAMA_LIKE.items() if key != "num_key_value_heads"}),
}


def random_model(family: str, dtype: str, seed: int) -> tuple[nn.Module, Any]:
    """A 2-layer model of `family`, one of `FAMILIES`, and a tokenizer that knows the generated text's words."""
    import transformers

    tokenizer = word_tokenizer()
    class_name, settings = FAMILIES[family]
    config = getattr(transformers, class_name)(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        **settings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "random model", family))
        model = transformers.AutoModelForCausalLM.from_config(config)
    return model.to(getattr(torch, dtype)), tokenizer


def word_tokenizer() -> Any:
    """Byte-level BPE whose merges make one token of each word of the generated text; any other text goes by bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        merges[word[0], word[1]] = merges[word[2], word[3]] = None
    for word in WORDS:
        merges[word[:2], word[2:]] = None
    for word in WORDS:
        merges["Ġ", word] = None
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([BOS, EOS, *alphabet, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (BOS, EOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)
