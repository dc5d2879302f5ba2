"""Tiny random models of the families that transformers knows, and what their sites are worth: checked, and as a table.

Each is built from its family's own configuration class, small enough for a pass in milliseconds and with every trait
that changes where activations stand: parallel attention, norms in other places, experts, fused projections, recurrent
layers, towers for images.
"""

from dataclasses import dataclass
from typing import Any

import torch
import transformers

from unbraid.activations.language_model import LanguageModel
from unbraid.activations.suitability import check_keeps_documents_apart
from unbraid.errors import ModelError
from unbraid.sites import KINDS

V, D = 96, 32
LLAMA = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": None,
}  # fmt: skip
HEADS_OF_8 = LLAMA | {"head_dim": 8}
GEMMA = HEADS_OF_8 | {"query_pre_attn_scalar": 8, "sliding_window": 8}
GPT2 = {"vocab_size": V, "n_embd": D, "n_layer": 3, "n_head": 4, "n_positions": 128, "bos_token_id": 0}
FALCON = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": 3, "num_attention_heads": 4}
OPT = {
    "vocab_size": V, "hidden_size": D, "ffn_dim": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 128,
}  # fmt: skip
EXPERTS = LLAMA | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", LLAMA),
    "Mistral": ("Mistral", LLAMA | {"sliding_window": 8}),
    "Qwen 2": ("Qwen2", LLAMA),
    "Qwen 3": ("Qwen3", HEADS_OF_8),
    "SmolLM 3": ("SmolLM3", LLAMA),
    "Gemma": ("Gemma", HEADS_OF_8),
    "Gemma 2": ("Gemma2", GEMMA),
    "Gemma 3": ("Gemma3Text", GEMMA),
    "Phi": ("Phi", LLAMA | {"partial_rotary_factor": 0.5}),
    "Phi 3": ("Phi3", LLAMA),
    "OLMo": ("Olmo", LLAMA),
    "OLMo 2": ("Olmo2", LLAMA),
    "GLM 4": ("Glm4", HEADS_OF_8),
    "Granite": ("Granite", LLAMA | {"residual_multiplier": 0.22}),
    "Cohere": ("Cohere", LLAMA),
    "StableLM": ("StableLm", LLAMA | {"partial_rotary_factor": 0.25}),
    "StableLM, parallel": ("StableLm", LLAMA | {"use_parallel_residual": True}),
    "Nemotron": ("Nemotron", LLAMA),
    "StarCoder 2": ("Starcoder2", LLAMA),
    "ERNIE 4.5": ("Ernie4_5", LLAMA),
    "GPT-2": ("GPT2", GPT2),
    "GPT-BigCode": ("GPTBigCode", GPT2),
    "GPT-J": ("GPTJ", GPT2 | {"rotary_dim": 4}),
    "CodeGen": ("CodeGen", GPT2 | {"rotary_dim": 4}),
    "GPT-Neo": (
        "GPTNeo",
        {"vocab_size": V, "hidden_size": D, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 128}
        | {"attention_types": [[["global", "local"], 1]]},
    ),
    "Pythia (GPT-NeoX)": ("GPTNeoX", LLAMA | {"use_parallel_residual": True}),
    "GPT-NeoX, one after the other": ("GPTNeoX", LLAMA | {"use_parallel_residual": False}),
    "BLOOM": ("Bloom", {"vocab_size": V, "hidden_size": D, "n_layer": 3, "n_head": 4}),
    "MPT": ("Mpt", {"vocab_size": V, "d_model": D, "n_layers": 3, "n_heads": 4}),
    "Falcon": ("Falcon", FALCON | {"parallel_attn": True, "multi_query": True}),
    "Falcon, new": ("Falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "Falcon, one after the other": ("Falcon", FALCON | {"parallel_attn": False, "alibi": True}),
    "OPT": ("OPT", OPT | {"word_embed_proj_dim": D}),
    "OPT 350M (norms behind)": ("OPT", OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "XGLM": (
        "XGLM",
        {"vocab_size": V, "d_model": D, "ffn_dim": 64, "num_layers": 3, "attention_heads": 4}
        | {"max_position_embeddings": 128},
    ),
    "BioGPT": ("BioGpt", LLAMA),
    "BERT as a decoder": ("Bert", LLAMA | {"is_decoder": True}),
    "Mixtral": ("Mixtral", LLAMA | {"num_local_experts": 4}),
    "Qwen 2 MoE": ("Qwen2Moe", EXPERTS | {"shared_expert_intermediate_size": 16}),
    "Qwen 3 MoE": ("Qwen3Moe", EXPERTS | {"head_dim": 8}),
    "OLMoE": ("Olmoe", LLAMA | {"num_experts": 4, "num_experts_per_tok": 2}),
    "gpt-oss": ("GptOss", HEADS_OF_8 | {"num_local_experts": 4, "sliding_window": 8}),
    "DeepSeek V3": (
        "DeepseekV3",
        LLAMA
        | {"num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 16, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8}
        | {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
    ),
    "Llama 4": ("Llama4Text", HEADS_OF_8 | {"num_local_experts": 2, "intermediate_size_mlp": 64}),
    "LFM 2": ("Lfm2", LLAMA | {"layer_types": ["conv", "full_attention", "conv"]}),
    "RecurrentGemma": (
        "RecurrentGemma",
        LLAMA | {"attention_window_size": 8, "block_types": ["recurrent", "recurrent", "attention"]},
    ),
    "Falcon H1": (
        "FalconH1", LLAMA | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1}
    ),
    "Mamba": ("Mamba", {"vocab_size": V, "hidden_size": D, "num_hidden_layers": 3}),
    "Mamba 2": (
        "Mamba2",
        {"vocab_size": V, "hidden_size": D, "num_hidden_layers": 3, "num_heads": 8, "head_dim": 8, "n_groups": 1},
    ),
    "RWKV 4": ("Rwkv", {"vocab_size": V, "hidden_size": D, "num_hidden_layers": 3}),
    "Gemma 3 with images": (
        "Gemma3", {"text_config": GEMMA, "vision_config": TOWER | {"image_size": 32, "patch_size": 16}}
    ),
    "Qwen 2 VL": (
        "Qwen2VL",
        {
            "text_config": LLAMA | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
            "vision_config": {"embed_dim": 16, "hidden_size": D, "depth": 3, "num_heads": 2},
        },
    ),
}  # fmt: skip


HIDDEN = ("equal", "equal, reported one place earlier")
"""How `resid_post` may relate to the hidden states that a model reports."""


class _Tokenizer:
    bos_token_id, eos_token_id, pad_token_id = 0, 1, None


@dataclass
class Findings:
    """What was found for one family.

    Attributes:
        hidden: how `resid_post` relates to the hidden states that the model reports.
        layers: kind -> layers that have it.
        reasons: kind -> why a layer has none, in the words of the error.
        n_layers: how many layers there are.
        apart: whether documents packed into one context can be kept apart.
    """

    hidden: str
    layers: dict[str, list[int]]
    reasons: dict[str, str]
    n_layers: int
    apart: bool


def build(family: str) -> Any:
    """A random model with weights large enough for every part to matter."""
    name, settings = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**settings)
    auto = transformers.AutoModelForCausalLM
    if type(config) not in auto._model_mapping:
        auto = transformers.AutoModelForImageTextToText
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto.from_config(config).float().eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.15) if parameter.ndim > 1 else None
    return model


def examine(family: str) -> Findings:
    """Check every site of every layer of a family.

    Raises:
        AssertionError: activations are not what the site's name promises.
        ModelError: the family's blocks are not found.
    """
    model = build(family)
    n_layers = model.config.get_text_config().num_hidden_layers
    tokens = torch.randint(2, V, (3, 20), generator=torch.Generator().manual_seed(1))
    layers: dict[str, list[int]] = {kind: [] for kind in KINDS}
    reasons: dict[str, str] = {}
    for kind in KINDS:
        for layer in range(n_layers):
            try:
                LanguageModel(model, _Tokenizer, [f"{kind}.{layer}"], bidirectional=True)  # causality: once, below
                layers[kind].append(layer)
            except ModelError as problem:
                reasons[kind] = str(problem)
    sites = [f"{kind}.{layer}" for kind in KINDS for layer in layers[kind]]
    reader = LanguageModel(model, _Tokenizer, sites)
    found = dict(zip(sites, reader.activations(tokens), strict=True))
    _check_sums(found, n_layers)
    _check_changes(reader, tokens, sites)
    with torch.inference_mode():
        hidden = model(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states
    relation = _relation([found[f"resid_post.{i}"] for i in range(n_layers)], hidden)
    return Findings(relation, layers, reasons, n_layers, _keeps_apart(reader))


def _keeps_apart(reader: LanguageModel) -> bool:
    try:
        check_keeps_documents_apart("", reader.last_output, V)
    except ModelError:
        return False
    return True


def _check_sums(found: dict[str, torch.Tensor], n_layers: int) -> None:
    for layer in range(n_layers):
        x = {kind: found[f"{kind}.{layer}"].double() for kind in KINDS if f"{kind}.{layer}" in found}
        if layer:
            assert torch.equal(found[f"resid_post.{layer - 1}"], found[f"resid_pre.{layer}"])
        sums = []
        if "attn_out" in x and "mlp_out" in x:
            sums.append((x["resid_pre"] + x["attn_out"] + x["mlp_out"], x["resid_post"]))
        if "resid_mid" in x:
            sums.append((x["resid_mid"] + x["mlp_out"], x["resid_post"]))
        if "resid_mid" in x and "attn_out" in x:
            sums.append((x["resid_pre"] + x["attn_out"], x["resid_mid"]))
        assert all((left - right).norm() <= 1e-5 * right.norm() for left, right in sums)


def _check_changes(reader: LanguageModel, tokens: torch.Tensor, sites: list[str]) -> None:
    """What a visit gives back unchanged changes nothing; what it changes is used."""
    plain = reader.logits(tokens)
    for site in sites:
        with reader.visiting({site: torch.clone}):
            assert (reader.logits(tokens) - plain).norm() <= 1e-4 * plain.norm(), site
        with reader.visiting({site: lambda x: 2 * x + 1}):
            assert not torch.equal(reader.logits(tokens), plain), site


def _relation(posts: list[torch.Tensor], hidden: tuple[torch.Tensor, ...]) -> str:
    """The last entry of hidden states usually comes after the final norm and is left out."""
    for later, relation in ((1, HIDDEN[0]), (0, HIDDEN[1])):
        if all(torch.equal(post, hidden[i + later]) for i, post in enumerate(posts[:-1])):
            return relation
    raise AssertionError("resid_post equals no hidden state that the model reports")
