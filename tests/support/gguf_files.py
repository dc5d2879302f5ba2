"""GGUF files of tiny models, for tests of reading them."""

import json
from pathlib import Path

import gguf
from gguf.quants import quantize

from unbraid.activations import gguf_conversion
from unbraid.activations.language_model import LanguageModel


def write_gguf(model: LanguageModel, path: Path, quantised: str = "F32") -> None:
    """The model as llama.cpp's tools would write it: rotary dimensions of q and k interleaved.

    Args:
        model: a random Llama.
        path: the file.
        quantised: how its matrices are stored, such as Q8_0.
    """
    kind = gguf.GGMLQuantizationType[quantised]
    config, weights = model.model.config, model.model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_block_count, config.num_hidden_layers),
        (writer.add_context_length, config.max_position_embeddings),
        (writer.add_embedding_length, config.hidden_size),
        (writer.add_feed_forward_length, config.intermediate_size),
        (writer.add_head_count, config.num_attention_heads),
        (writer.add_head_count_kv, config.num_key_value_heads),
        (writer.add_layer_norm_rms_eps, config.rms_norm_eps),
        (writer.add_rope_freq_base, config.rope_parameters["rope_theta"]),
        (writer.add_vocab_size, config.vocab_size),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_bos_token_id, 0),
        (writer.add_eos_token_id, 1),
    ):
        add(value)
    bpe = json.loads(model.tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].get))
    writer.add_token_types([3, 3] + [1] * (config.vocab_size - 2))
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    names = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
    names |= {theirs: ours for ours, theirs in gguf_conversion.MODULES.items()}
    for name, weight in weights.items():
        parts = name.removeprefix("model.").removesuffix(".weight").split(".")
        if parts[0] == "layers":
            if parts[-1] in ("q_proj", "k_proj"):
                weight = weight.reshape(-1, 2, config.head_dim // 2, config.hidden_size).swapaxes(1, 2)
                weight = weight.reshape(-1, config.hidden_size)
            name = f"blk.{parts[1]}.{names['.'.join(parts[2:])]}.weight"
        else:
            name = f"{names[parts[0]]}.weight"
        array = weight.contiguous().numpy()
        if array.ndim == 2 and quantised != "F32":
            writer.add_tensor(name, quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
