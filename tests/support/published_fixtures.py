"""Published layouts, each as a small fixture: files as a release has them, and what must come out, in float64."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sae_samples import D, K, N
from safetensors.torch import save_file
from torch import Tensor

M = 9
SHAPES = {"W_enc": (D, N), "W_dec": (N, D), "b_enc": (N,), "b_dec": (D,), "threshold": (N,), "W_skip": (D, D)}


def drawn(*names: str, dtype: str = "float32", d_out: int = D) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = SHAPES | {"W_dec": (N, d_out), "b_dec": (d_out,), "W_skip": (D, d_out), "W_glu": (D, N), "b_glu": (N,)}
    tensors = {name: torch.randn(shapes[name], generator=generator) for name in names}
    if "threshold" in tensors:
        tensors["threshold"] = tensors["threshold"].abs()
    return {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}


PLAIN = ("W_enc", "b_enc", "W_dec", "b_dec")
JUMP = (*PLAIN, "threshold")


class Made(NamedTuple):
    """A written fixture.

    Attributes:
        place: what `unbraid.load` is given.
        run: from float64 activations to codes and output.
        options: of `unbraid.load`.
        metadata: some of what must be known about it.
    """

    place: Path
    run: Callable[[Tensor], tuple[Tensor, Tensor]]
    options: dict
    metadata: dict


def jump(t: dict[str, Tensor], pre: Tensor) -> Tensor:
    return pre.relu() * (pre > t["threshold"])


def top(pre: Tensor, k: int = K) -> Tensor:
    chosen = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, chosen.indices, chosen.values.relu())


def doubled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in tensors.items()}


def plain_form(t: dict[str, Tensor], activate: Callable[[Tensor], Tensor]) -> Callable:
    """f = act(x W_enc + b_enc), y = f W_dec + b_dec (+ x W_skip)."""

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        f = activate(x @ t["W_enc"] + t["b_enc"])
        y = f @ t["W_dec"] + t["b_dec"]
        return f, y + x @ t["W_skip"] if "W_skip" in t else y

    return run


def save(path: Path, tensors: dict, pickled: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: x.contiguous() if isinstance(x, Tensor) else x for name, x in tensors.items()}
    torch.save(contiguous, path) if pickled else save_file(contiguous, path)
    return path


def archived(folder: Path, dtype: str) -> dict[str, Tensor]:
    """Tensors of a JumpReLU written as `params.npz`, in float64; NumPy has no bfloat16, so those are float32 there."""
    t = drawn(*JUMP, dtype=dtype)
    folder.mkdir(parents=True)
    as_numpy = {name: (tensor.float() if dtype == "bfloat16" else tensor).numpy() for name, tensor in t.items()}
    np.savez(folder / "params.npz", **as_numpy)
    return doubled(t)


def gemma_scope(root: Path, dtype: str) -> Made:
    """Residual stream."""
    folder = root / "google" / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_71"
    t = archived(folder, dtype)
    hook = {"model_name": "google/gemma-2-2b", "hook_name": "blocks.20.hook_resid_post"}
    return Made(folder, plain_form(t, lambda pre: jump(t, pre)), {}, hook)


def gemma_scope_mlp(root: Path, dtype: str) -> Made:
    made = gemma_scope(root, dtype)
    folder = root / "google" / "gemma-scope-9b-pt-mlp" / "layer_20" / "width_131k" / "average_l0_12"
    folder.parent.mkdir(parents=True)
    made.place.rename(folder)
    return made._replace(
        place=folder, metadata={"model_name": "google/gemma-2-9b", "hook_name": "blocks.20.hook_mlp_out"}
    )


def gemma_scope_attention(root: Path, dtype: str) -> Made:
    made = gemma_scope(root, dtype)
    folder = root / "google" / "gemma-scope-9b-it-att" / "layer_20" / "width_16k" / "average_l0_71"
    folder.parent.mkdir(parents=True)
    made.place.rename(folder)
    hook = {"model_name": "google/gemma-2-9b-it", "hook_name": "blocks.20.attn.hook_z"}
    return made._replace(place=folder, metadata=hook)


def gemma_scope_embedding(root: Path, dtype: str) -> Made:
    folder = root / "models--google--gemma-scope-2b-pt-res" / "snapshots" / "abc" / "embedding" / "width_4k"
    t = archived(folder, dtype)
    scaled = t | {"W_enc": t["W_enc"] / D**0.5, "W_dec": t["W_dec"] * D**0.5}
    return Made(folder, plain_form(scaled, lambda pre: jump(t, pre)), {}, {"hook_name": "hook_embed"})


def gemma_scope_transcoder(root: Path, dtype: str) -> Made:
    folder = root / "google" / "gemma-scope-2b-pt-transcoders" / "layer_3" / "width_16k" / "average_l0_9"
    t = archived(folder, dtype)
    hooks = {"hook_name": "blocks.3.ln2.hook_normalized", "hook_name_out": "blocks.3.hook_mlp_out"}
    return Made(folder, plain_form(t, lambda pre: jump(t, pre)), {}, hooks)


NAMES_2 = {"W_enc": "w_enc", "W_dec": "w_dec", "W_skip": "affine_skip_connection"}


def gemma_scope_2(root: Path, dtype: str) -> Made:
    t = drawn(*JUMP, dtype=dtype)
    folder = root / "google" / "gemma-scope-2-4b-pt" / "attn_out_all" / "layer_17_width_16k_l0_small"
    save(folder / "params.safetensors", {NAMES_2.get(name, name): tensor for name, tensor in t.items()})
    point = "model.layers.17.self_attn.o_proj.input"
    config = {"hf_hook_point_in": point, "hf_hook_point_out": point, "width": N, "model_name": "gemma-v3-4b-pt"}
    config |= {"architecture": "jump_relu", "l0": 20, "affine_connection": False, "type": "sae"}
    (folder / "config.json").write_text(json.dumps(config))
    hook = {"model_name": "google/gemma-3-4b-pt", "hook_name": "blocks.17.attn.hook_z"}
    return Made(folder, plain_form(t := doubled(t), lambda pre: jump(t, pre)), {}, hook)


def gemma_scope_2_by_path(root: Path, dtype: str) -> Made:
    made = gemma_scope_2(root, dtype)
    folder = root / "models--google--gemma-scope-2-270m-pt/snapshots/c/resid_post/layer_5_width_65k_l0_big"
    folder.parent.mkdir(parents=True)
    made.place.rename(folder)
    (folder / "config.json").unlink()
    hook = {"model_name": "google/gemma-3-270m", "hook_name": "blocks.5.hook_resid_post"}
    return made._replace(place=folder, metadata=hook)


def gemma_scope_2_mlp(root: Path, dtype: str) -> Made:
    made = gemma_scope_2(root, dtype)
    folder = root / "google" / "gemma-scope-2-12b-it" / "mlp_out" / "layer_31_width_262k_l0_medium_seed_1"
    folder.parent.mkdir(parents=True)
    made.place.rename(folder)
    config = json.loads((folder / "config.json").read_text())
    point = "model.layers.31.post_feedforward_layernorm.output"
    config |= {"hf_hook_point_in": point, "hf_hook_point_out": point, "model_name": "gemma-3-12b-it"}
    (folder / "config.json").write_text(json.dumps(config))
    return made._replace(
        place=folder, metadata={"model_name": "google/gemma-3-12b-it", "hook_name": "blocks.31.hook_mlp_out"}
    )


def gemma_scope_2_transcoder(root: Path, dtype: str) -> Made:
    t = drawn(*JUMP, dtype=dtype, d_out=M)
    folder = root / "google" / "gemma-scope-2-27b-pt" / "transcoder" / "layer_40_width_65k_l0_medium"
    save(folder / "params.safetensors", {NAMES_2.get(name, name): tensor for name, tensor in t.items()})
    ends = ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output")
    config = {f"hf_hook_point_{end}": f"model.layers.40.{at}" for end, at in zip(("in", "out"), ends, strict=True)}
    config |= {"width": N, "model_name": "google/gemma-3-27b-pt", "architecture": "jump_relu", "l0": 50}
    (folder / "config.json").write_text(json.dumps(config | {"affine_connection": False, "type": "transcoder"}))
    hooks = {"hook_name": "blocks.40.mlp.hook_in", "hook_name_out": "blocks.40.hook_mlp_out"}
    return Made(folder, plain_form(t := doubled(t), lambda pre: jump(t, pre)), {}, hooks)


def gemma_scope_2_affine(root: Path, dtype: str) -> Made:
    t = drawn(*JUMP, "W_skip", dtype=dtype, d_out=M)
    folder = root / "google/gemma-scope-2-1b-it/transcoder_all/layer_7_width_16k_l0_big_affine"
    save(folder / "params.safetensors", {NAMES_2.get(name, name): tensor for name, tensor in t.items()})
    hooks = {"hook_name": "blocks.7.mlp.hook_in", "hook_name_out": "blocks.7.hook_mlp_out"}
    hooks |= {"model_name": "google/gemma-3-1b-it"}
    return Made(folder, plain_form(t := doubled(t), lambda pre: jump(t, pre)), {}, hooks)


def qwen_scope(root: Path, dtype: str) -> Made:
    t = drawn(*PLAIN, dtype=dtype)
    folder = root / "Qwen" / f"SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}"
    for layer in (0, 1):
        file = save(folder / f"layer{layer}.sae.pt", t | {"W_enc": t["W_enc"].T, "W_dec": t["W_dec"].T}, pickled=True)
    hook = {"model_name": "Qwen/Qwen3-1.7B-Base", "hook_name": "blocks.1.hook_resid_post"}
    return Made(file, plain_form(doubled(t), top), {}, hook)


def mwhanna(root: Path, dtype: str) -> Made:
    t = drawn(*PLAIN, dtype=dtype)
    folder = root / "models--mwhanna--qwen3-4b-transcoders" / "snapshots" / "c"
    file = save(folder / "layer_12.safetensors", t | {"W_enc": t["W_enc"].T})
    hooks = {"hook_name": "blocks.12.mlp.hook_in", "hook_name_out": "blocks.12.hook_mlp_out"}
    return Made(file, plain_form(doubled(t), torch.relu), {}, hooks | {"model_name": "Qwen/Qwen3-4B"})


def transcoder_set(root: Path, dtype: str) -> Made:
    t = drawn(*JUMP, "W_skip", dtype=dtype)
    stored = {"activation_function.threshold" if name == "threshold" else name: tensor for name, tensor in t.items()}
    file = save(root / "set" / "layer_2.safetensors", stored | {"W_enc": t["W_enc"].T, "W_skip": t["W_skip"].T})
    hooks = "feature_input_hook: hook_resid_mid\nfeature_output_hook: mlp.hook_out\nmodel_name: google/gemma-2-2b\n"
    (file.parent / "config.yaml").write_text(f"model_kind: transcoder_set\n{hooks}")
    known = {"hook_name": "blocks.2.hook_resid_mid", "hook_name_out": "blocks.2.hook_mlp_out"}
    return Made(file, plain_form(t := doubled(t), lambda pre: jump(t, pre)), {}, known)


LLAMA = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")


def llama_state(t: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(LLAMA, (t["W_enc"].T, t["b_enc"], t["W_dec"].T, t["b_dec"]), strict=True))


def llama_scope_folder(folder: Path, t: dict[str, Tensor], **settings) -> Path:
    save(folder / "checkpoints" / "final.safetensors", llama_state(t))
    config = {"hook_point_in": "blocks.24.hook_resid_post", "hook_point_out": "blocks.24.hook_resid_post"}
    config |= {"d_model": D, "d_sae": N, "act_fn": "jumprelu", "jump_relu_threshold": 0.75, "dtype": "torch.bfloat16"}
    config |= {"norm_activation": "dataset-wise", "dataset_average_activation_norm": {"in": 3.5, "out": 3.5}}
    config |= {
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "use_glu_encoder": False,
        "top_k": 50,
    }
    (folder / "hyperparams.json").write_text(json.dumps(config | settings))
    return folder


def llama_scope_form(t: dict[str, Tensor], norm_in: float, norm_out: float, folds: bool) -> Callable:
    """z = x We^T + be/s_in; f = J(z n, .75); y = f Wd/n s_in/s_out + bd/s_out, n the norms of rescaled rows or 1."""
    s_in, s_out = D**0.5 / norm_in, t["W_dec"].shape[1] ** 0.5 / norm_out
    rows = t["W_dec"] * s_in / s_out
    n = rows.norm(dim=1) if folds else torch.ones(N).double()

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        z = (x @ t["W_enc"] + t["b_enc"] / s_in) * n
        f = z * (z > 0.75)
        return f, f @ (rows / n[:, None]) + t["b_dec"] / s_out

    return run


def llama_scope(root: Path, dtype: str) -> Made:
    t = drawn(*PLAIN, dtype=dtype)
    folder = llama_scope_folder(root / "fnlp" / "Llama3_1-8B-Base-L24R-8x", t, sparsity_include_decoder_norm=False)
    hook = {"model_name": "meta-llama/Llama-3.1-8B", "hook_name": "blocks.24.hook_resid_post"}
    return Made(folder, llama_scope_form(doubled(t), 3.5, 3.5, False), {}, hook)


def llama_scope_transcoder(root: Path, dtype: str) -> Made:
    t = drawn(*PLAIN, dtype=dtype, d_out=M)
    hooks = {"hook_point_in": "blocks.8.ln2.hook_normalized", "hook_point_out": "blocks.8.hook_mlp_out"}
    norms = {"dataset_average_activation_norm": {"in": 64.0, "out": 3.39}, "sparsity_include_decoder_norm": False}
    folder = llama_scope_folder(root / "tc", t, **hooks, **norms)
    known = {"hook_name": hooks["hook_point_in"], "hook_name_out": hooks["hook_point_out"]}
    return Made(folder, llama_scope_form(doubled(t), 64.0, 3.39, False), {}, known)


def llama_scope_r1(root: Path, dtype: str) -> Made:
    t = drawn(*JUMP, dtype=dtype)
    log_threshold = t.pop("threshold").float().log().to(getattr(torch, dtype))
    folder = root / "800M-Slimpajama-0-OpenR1-Math-220k" / "L5R"
    save(folder / "sae_weights.safetensors", llama_state(t) | {"log_jumprelu_threshold": log_threshold})
    config = {"d_model": D, "expansion_factor": 8, "hook_point_in": "blocks.5.hook_resid_post"}
    (folder / "config.json").write_text(json.dumps(config))
    t = doubled(t) | {"threshold": log_threshold.double().exp()}
    s = 1.7

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        f = jump(t, (x * s) @ t["W_enc"] + t["b_enc"])
        return f, (f @ t["W_dec"] + t["b_dec"]) / s

    return Made(folder, run, {"norm_scaling_factor": s}, {"hook_name": "blocks.5.hook_resid_post", "hook_layer": 5})


def scopium(root: Path, dtype: str, act_fn: str, glu: bool = False, include: bool = True, **settings) -> Made:
    t = drawn(*PLAIN, *(["W_glu", "b_glu"] if glu else []), dtype=dtype)
    theirs = {"W_enc": "W_E", "b_enc": "b_E", "W_dec": "W_D", "b_dec": "b_D", "W_glu": "W_E_glu", "b_glu": "b_E_glu"}
    stored = {theirs[name]: tensor for name, tensor in t.items()}
    hook, norm = "blocks.6.hook_resid_post", torch.tensor(2.5)
    stored[f"dataset_average_activation_norm.{hook}"] = norm
    if act_fn == "jumprelu":
        stored["activation_function.log_jumprelu_threshold"] = torch.linspace(-1, 0.5, N)
    config = {"sae_type": "sae", "d_model": D, "expansion_factor": N / D, "act_fn": act_fn, "top_k": K}
    config |= {"hook_point_in": hook, "hook_point_out": hook, "norm_activation": "dataset-wise", "use_glu_encoder": glu}
    config |= {"sparsity_include_decoder_norm": include, "use_decoder_bias": True} | settings
    folder = root / "scopium"
    save(folder / "sae_weights.safetensors", stored)
    (folder / "config.json").write_text(json.dumps(config))
    t = doubled(t)
    s = D**0.5 / 2.5 if config["norm_activation"] == "dataset-wise" else 1.0
    n = t["W_dec"].norm(dim=1) if include else torch.ones(N).double()
    threshold = torch.linspace(-1, 0.5, N).double().exp()
    act = {"relu": torch.relu, "jumprelu": lambda z: z.relu() * (z > threshold), "topk": top}[act_fn]

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        z = (x * s) @ t["W_enc"] + t["b_enc"]
        if glu:
            z = z * ((x * s) @ t["W_glu"] + t["b_glu"]).sigmoid()
        f = act(z * n) / n
        return f, (f @ t["W_dec"] + t["b_dec"]) / s

    return Made(folder, run, {}, {"hook_name": hook})


def openai(root: Path, dtype: str, activation: str = "TopK") -> Made:
    t = drawn(*PLAIN, dtype=dtype)
    state = {"pre_bias": t["b_dec"], "latent_bias": t["b_enc"]}
    state |= {
        "encoder.weight": t["W_enc"].T,
        "decoder.weight": t["W_dec"].T,
        "stats_last_nonzero": torch.zeros(N).long(),
    }
    state |= {"latents_activation_frequency": torch.zeros(N), "latents_mean_square": torch.zeros(N)}
    state |= {"activation": activation, "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}
    state["activation_state_dict"] = state["activation_state_dict"] if activation == "TopK" else {}
    version = "v5_32k" if activation == "TopK" else "v1"
    file = save(root / f"gpt2-small/resid_post_attn_{version}/autoencoders/7.pt", state, pickled=True)
    t = doubled(t)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        mean, sd = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        u = (x - mean) / (sd + 1e-5) if activation == "TopK" else x
        pre = (u - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
        f = top(pre) if activation == "TopK" else pre.relu()
        y = f @ t["W_dec"] + t["b_dec"]
        return f, y * sd + mean if activation == "TopK" else y

    return Made(file, run, {}, {"hook_name": "blocks.7.hook_resid_mid", "model_name": "gpt2-small"})


def goodfire(root: Path, dtype: str) -> Made:
    t = drawn(*PLAIN, dtype=dtype)
    state = {name.replace(".", "_linear."): tensor for name, tensor in llama_state(t).items()}
    file = save(root / "Llama-3.1-8B-Instruct-SAE-l19.pth", state, pickled=True)
    hook = {"model_name": "meta-llama/Llama-3.1-8B-Instruct", "hook_name": "blocks.19.hook_resid_post"}
    return Made(file, plain_form(doubled(t), torch.relu), {}, hook)


def deepseek_r1(root: Path, dtype: str) -> Made:
    t = drawn(*PLAIN, dtype=dtype)
    file = save(root / "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt", llama_state(t), pickled=True)
    hook = {"model_name": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "hook_name": "blocks.19.hook_resid_post"}
    return Made(file, plain_form(doubled(t), torch.relu), {}, hook)


def connor_rob(root: Path, dtype: str) -> Made:
    t = drawn(*PLAIN, dtype=dtype)
    file = save(root / "gpt2-small_L0_Hcat_z_lr1.20e-03_v9.pt", t, pickled=True)
    config = {"act_size": D, "dict_size": N, "act_name": "blocks.0.attn.hook_z"}
    file.with_name(f"{file.stem}_cfg.json").write_text(json.dumps(config))
    t = doubled(t)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        f = ((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
        return f, f @ t["W_dec"] + t["b_dec"]

    return Made(file, run, {}, {"hook_name": "blocks.0.attn.hook_z"})


def dictionary_learning_fork(root: Path, dtype: str) -> Made:
    """A BatchTopK of the fork that keeps the mean and scale of the activations, saved by a compiled trainer."""
    t = drawn(*PLAIN, dtype=dtype)
    mean_D, scale = torch.linspace(-3, 5, D), torch.tensor(0.4)
    state = {"encoder.weight": t["W_enc"].T, "encoder.bias": t["b_enc"], "decoder.weight": t["W_dec"].T}
    state |= {"b_dec": t["b_dec"], "k": torch.tensor(K), "threshold": torch.tensor(0.5)}
    state |= {"activation_mean": mean_D, "activation_std": torch.ones(D), "activation_global_scale": scale}
    state = {f"_orig_mod.{name}": tensor for name, tensor in (state | {"target_rms": torch.tensor(1.0)}).items()}
    save(root / "fork/resid_post_layer_4/trainer_0/ae.pt", state, pickled=True)
    settings = {"dict_class": "BatchTopKSAE", "activation_dim": D, "dict_size": N, "k": K, "layer": 4}
    folder = root / "fork/resid_post_layer_4/trainer_0"
    (folder / "config.json").write_text(
        json.dumps({"trainer": settings | {"lm_name": "m"}, "buffer": {"ctx_len": 128}})
    )
    t, mean_D, scale = doubled(t), mean_D.double(), scale.double()

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        f = (((x - mean_D) * scale - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
        f = f * (f > 0.5)
        return f, (f @ t["W_dec"] + t["b_dec"]) / scale + mean_D

    return Made(folder, run, {}, {"hook_name": "blocks.4.hook_resid_post", "context_size": 128})


FIXTURES: dict[str, Callable[[Path, str], Made]] = {
    "gemma_scope": gemma_scope,
    "gemma_scope_mlp": gemma_scope_mlp,
    "gemma_scope_attention": gemma_scope_attention,
    "gemma_scope_embedding": gemma_scope_embedding,
    "gemma_scope_transcoder": gemma_scope_transcoder,
    "gemma_scope_2": gemma_scope_2,
    "gemma_scope_2_by_path": gemma_scope_2_by_path,
    "gemma_scope_2_mlp": gemma_scope_2_mlp,
    "gemma_scope_2_transcoder": gemma_scope_2_transcoder,
    "gemma_scope_2_affine": gemma_scope_2_affine,
    "qwen_scope": qwen_scope,
    "mwhanna": mwhanna,
    "transcoder_set": transcoder_set,
    "llama_scope": llama_scope,
    "llama_scope_transcoder": llama_scope_transcoder,
    "llama_scope_r1": llama_scope_r1,
    "llamascopium_relu": lambda root, dtype: scopium(root, dtype, "relu"),
    "llamascopium_jumprelu": lambda root, dtype: scopium(root, dtype, "jumprelu"),
    "llamascopium_topk": lambda root, dtype: scopium(root, dtype, "topk"),
    "llamascopium_topk_kept": lambda root, dtype: scopium(root, dtype, "topk", include=False),
    "llamascopium_glu": lambda root, dtype: scopium(root, dtype, "relu", glu=True),
    "llamascopium_folded": lambda root, dtype: scopium(root, dtype, "jumprelu", norm_activation="inference"),
    "openai_gpt2": openai,
    "openai_gpt2_relu": lambda root, dtype: openai(root, dtype, "ReLU"),
    "goodfire": goodfire,
    "deepseek_r1": deepseek_r1,
    "connor_rob": connor_rob,
    "dictionary_learning_fork": dictionary_learning_fork,
}


def gemma_scope_2_layers(root: Path, dtype: str, kind: str = "clt", skips: bool = False) -> Made:
    """Three layers, each with features of its own that write into itself and later ones (clt) or all (crosscoder)."""
    layers, generator = 3, torch.Generator().manual_seed(5)
    name = {
        "clt": f"clt/width_262k_l0_big{'_affine' if skips else ''}",
        "crosscoder": "crosscoder/layer_5_9_12_width_65k",
    }
    folder = root / "google" / "gemma-scope-2-1b-pt" / name[kind]
    shapes = {"w_enc": (D, N), "b_enc": (N,), "threshold": (N,), "w_dec": (N, layers, D), "b_dec": (D,)}
    shapes |= {"affine_skip_connection": (D, D)} if skips else {}
    parts = []
    for layer in range(layers):
        part = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        part["threshold"] = part["threshold"].abs()
        if kind == "clt":
            part["w_dec"][:, :layer] = 0.0
        part = {key: tensor.to(getattr(torch, dtype)) for key, tensor in part.items()}
        save(folder / f"params_layer_{layer}.safetensors", part)
        parts.append(doubled(part))
    config = {"type": kind, "architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", "affine_connection": skips}
    (folder / "config.json").write_text(json.dumps(config))

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        """Layer by layer, as the formula is written."""
        pre = [x[..., at, :] @ part["w_enc"] + part["b_enc"] for at, part in enumerate(parts)]
        f = [z.relu() * (z > part["threshold"]) for z, part in zip(pre, parts, strict=True)]
        y = []
        for to, part in enumerate(parts):
            written = sum(f[source] @ parts[source]["w_dec"][:, to] for source in range(layers))
            y.append(written + part["b_dec"] + (x[..., to, :] @ part["affine_skip_connection"] if skips else 0))
        return torch.cat(f, dim=-1), torch.stack(y, dim=-2)

    hooks = {"clt": ([0, 1, 2], "mlp.hook_in", "hook_mlp_out"), "crosscoder": ([5, 9, 12], *["hook_resid_post"] * 2)}
    numbers, reads, writes = hooks[kind]
    known = {"hook_names": [f"blocks.{layer}.{reads}" for layer in numbers], "model_name": "google/gemma-3-1b-pt"}
    known |= {"hook_names_out": [f"blocks.{layer}.{writes}" for layer in numbers]}
    return Made(folder, run, {}, known)


def circuit_tracer_clt(root: Path, dtype: str, jumps: bool = True) -> Made:
    """Three layers, decoders from layer i into i and later ones."""
    layers, generator, folder = 3, torch.Generator().manual_seed(6), root / "mntss" / "clt-gemma-2-2b-426k"
    encoders, decoders = [], []
    for layer in range(layers):
        shapes = {"W_enc": (N, D), "b_enc": (N,), "b_dec": (D,)} | ({"threshold": (N,)} if jumps else {})
        encoder = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        decoder = torch.randn(N, layers - layer, D, generator=generator).to(getattr(torch, dtype))
        if jumps:
            encoder["threshold"] = encoder["threshold"].abs()
        encoder = {name: tensor.to(getattr(torch, dtype)) for name, tensor in encoder.items()}
        save(folder / f"W_enc_{layer}.safetensors", {f"{name}_{layer}": tensor for name, tensor in encoder.items()})
        save(folder / f"W_dec_{layer}.safetensors", {f"W_dec_{layer}": decoder})
        encoders.append(doubled(encoder))
        decoders.append(decoder.double())
    config = "model_kind: cross_layer_transcoder\nmodel_name: google/gemma-2-2b\n"
    (folder / "config.yaml").write_text(
        f"{config}feature_input_hook: hook_resid_mid\nfeature_output_hook: mlp.hook_out\n"
    )

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        pre = [x[..., at, :] @ t["W_enc"].T + t["b_enc"] for at, t in enumerate(encoders)]
        f = [jump(t, z) if jumps else z.relu() for z, t in zip(pre, encoders, strict=True)]
        y = [
            t["b_dec"] + sum(f[source] @ decoders[source][:, to - source] for source in range(to + 1))
            for to, t in enumerate(encoders)
        ]
        return torch.cat(f, dim=-1), torch.stack(y, dim=-2)

    known = {"hook_names": [f"blocks.{layer}.hook_resid_mid" for layer in range(layers)]}
    known |= {"hook_names_out": [f"blocks.{layer}.hook_mlp_out" for layer in range(layers)]}
    return Made(folder, run, {}, known | {"model_name": "google/gemma-2-2b"})
