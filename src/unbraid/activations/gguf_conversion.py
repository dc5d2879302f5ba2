"""From the GGUF files of the packaged models to folders that transformers loads: float32 weights, config, tokenizer.

transformers' own GGUF reader takes half a minute for SmolLM2 and minutes for Gemma, every time, and gets SmolLM2's
digit splitting from the file only in some versions. This runs once per machine.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

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
"""GGUF's names of the parts of a Llama block -> transformers'."""
GEMMA_MODULES = MODULES | {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


class GGUFFile:
    """Settings and dequantised tensors of a GGUF file."""

    def __init__(self, path: Path) -> None:
        import gguf

        self._reader = gguf.GGUFReader(path)
        self.tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def setting(self, key: str) -> Any:
        """A value of the header."""
        return self._reader.fields[key].contents()

    def weight(self, key: str) -> np.ndarray:
        """A tensor in float32."""
        from gguf.quants import dequantize

        return dequantize(self.tensors[key].data, self.tensors[key].tensor_type).astype(np.float32)

    def weights(self, layers: int, modules: Mapping[str, str]) -> dict[str, np.ndarray]:
        """Every tensor under transformers' names; the output projection is tied to the embedding."""
        found = {
            "model.embed_tokens.weight": self.weight("token_embd.weight"),
            "model.norm.weight": self.weight("output_norm.weight"),
        }
        for layer in range(layers):
            for theirs, ours in modules.items():
                found[f"model.layers.{layer}.{ours}.weight"] = self.weight(f"blk.{layer}.{theirs}.weight")
        return found


def convert_smollm2(path: Path, folder: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer's files for a SmolLM2 GGUF file into a new `folder`."""
    from transformers import LlamaConfig

    file = GGUFFile(path)
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=file.setting("llama.vocab_size"),
        hidden_size=file.setting("llama.embedding_length"),
        intermediate_size=file.setting("llama.feed_forward_length"),
        num_hidden_layers=file.setting("llama.block_count"),
        num_attention_heads=file.setting("llama.attention.head_count"),
        num_key_value_heads=file.setting("llama.attention.head_count_kv"),
        max_position_embeddings=file.setting("llama.context_length"),
        rms_norm_eps=round(file.setting("llama.attention.layer_norm_rms_epsilon"), 12),
        rope_parameters={"rope_type": "default", "rope_theta": file.setting("llama.rope.freq_base")},
        tie_word_embeddings="output.weight" not in file.tensors,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    weights = file.weights(config.num_hidden_layers, MODULES)
    for layer in range(config.num_hidden_layers):
        for ours, heads in (("q_proj", "llama.attention.head_count"), ("k_proj", "llama.attention.head_count_kv")):
            name = f"model.layers.{layer}.self_attn.{ours}.weight"
            weights[name] = _rotary_halves(weights[name], file.setting(heads))
    _write(folder, config, weights, _smollm2_tokenizer(file))


def convert_gemma3(path: Path, folder: Path) -> None:
    """Write the same for a Gemma 3 GGUF file. GGUF keeps norm weights plus one; transformers adds the one itself."""
    from transformers import AutoTokenizer, Gemma3TextConfig

    file = GGUFFile(path)
    head_width = file.setting("gemma3.attention.key_length")
    config = Gemma3TextConfig(
        architectures=["Gemma3ForCausalLM"],
        vocab_size=len(file.setting("tokenizer.ggml.tokens")),
        hidden_size=file.setting("gemma3.embedding_length"),
        intermediate_size=file.setting("gemma3.feed_forward_length"),
        num_hidden_layers=file.setting("gemma3.block_count"),
        num_attention_heads=file.setting("gemma3.attention.head_count"),
        num_key_value_heads=file.setting("gemma3.attention.head_count_kv"),
        head_dim=head_width,
        query_pre_attn_scalar=head_width,
        sliding_window=file.setting("gemma3.attention.sliding_window"),
        max_position_embeddings=file.setting("gemma3.context_length"),
        rms_norm_eps=round(file.setting("gemma3.attention.layer_norm_rms_epsilon"), 12),
        tie_word_embeddings=True,
        bos_token_id=file.setting("tokenizer.ggml.bos_token_id"),
        eos_token_id=file.setting("tokenizer.ggml.eos_token_id"),
        pad_token_id=file.setting("tokenizer.ggml.padding_token_id"),
    )
    weights = file.weights(config.num_hidden_layers, GEMMA_MODULES)
    weights = {name: weight - 1 if "norm" in name else weight for name, weight in weights.items()}
    _write(folder, config, weights, AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name))


def _write(folder: Path, config: Any, weights: dict[str, np.ndarray], tokenizer: Any) -> None:
    from safetensors.numpy import save_file

    folder.mkdir()
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)


def _rotary_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF interleaves the two halves of each head's rotary dimensions; transformers wants them one after the other."""
    split = weight.reshape(heads, weight.shape[0] // heads // 2, 2, weight.shape[1])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(weight.shape)


def _smollm2_tokenizer(file: GGUFFile) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, merges, kinds = (file.setting(f"tokenizer.ggml.{part}") for part in ("tokens", "merges", "token_type"))
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
        chat_template=file.setting("tokenizer.chat_template"),
    )
