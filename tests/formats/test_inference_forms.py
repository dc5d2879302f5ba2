"""Every form SAELens and sparsify have is computed by their own formula, whatever precision it was stored in.

The oracles are those libraries' inference written out in plain tensor algebra, on float32 copies of what was stored.
"""

import json
from pathlib import Path

import pytest
import torch
from sae_samples import D, K, N
from safetensors.torch import save_file
from torch import Tensor

from unbraid import formats
from unbraid.errors import CodesError, FormatError

M = 9
STORED = ["float32", "bfloat16", "float16", "float8_e4m3fn"]
ARCHITECTURES = {
    "standard": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "topk": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "jumprelu": ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"),
    "gated": ("W_enc", "b_gate", "b_mag", "r_mag", "W_dec", "b_dec"),
    "abstopk": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "matching_pursuit": ("W_dec", "b_dec"),
    "transcoder": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "skip_transcoder": ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip"),
    "jumprelu_transcoder": ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"),
    "jumprelu_skip_transcoder": ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "W_skip"),
}


def random_tensors(names: tuple[str, ...], d_out: int = D, dtype: str = "float32") -> dict[str, Tensor]:
    """Large biases and decoder rows far from unit norm, so that folding in few bits would show."""
    generator = torch.Generator().manual_seed(11)
    shapes = {"W_enc": (D, N), "W_dec": (N, d_out), "b_dec": (d_out,), "W_skip": (d_out, D)}
    tensors = {name: torch.randn(shapes.get(name, (N,)), generator=generator) for name in sorted(names)}
    tensors["W_dec"] *= 0.3 + torch.rand(N, 1, generator=generator)
    tensors["b_dec"] *= 5
    if "threshold" in tensors:
        tensors["threshold"] = tensors["threshold"].abs()
    return {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}


def sae_lens_oracle(cfg: dict, stored: dict[str, Tensor], x: Tensor, s: float = 1.0) -> tuple[Tensor, Tensor]:
    """Codes and output as SAELens computes them, in float64."""
    t, x = {name: tensor.double() for name, tensor in stored.items()}, x.double()
    name, norm = cfg["architecture"], cfg.get("normalize_activations", "none")
    z, undo = x, lambda y: y
    if norm == "constant_norm_rescale":
        c = D**0.5 / x.norm(dim=-1, keepdim=True)
        z, undo = x * c, lambda y: y / c
    elif norm == "layer_norm":
        mean = x.mean(-1, keepdim=True)
        sd = (x - mean).std(-1, keepdim=True)
        z, undo = (x - mean) / (sd + 1e-5), lambda y: y * sd + mean
    elif norm == "expected_average_only_in":
        z, undo = x * s, lambda y: y / s
    if cfg.get("apply_b_dec_to_input", "transcoder" not in name):
        z = z - t["b_dec"]
    W_dec = t["W_dec"]
    rows = W_dec.norm(dim=-1) if cfg.get("rescale_acts_by_decoder_norm") else torch.ones(N).double()
    if name == "matching_pursuit":
        f = pursuit(z, W_dec, cfg)
    elif name == "gated":
        u = z @ t["W_enc"]
        f = (u + t["b_gate"] > 0) * (u * t["r_mag"].exp() + t["b_mag"]).relu()
    else:
        pre = (z @ t["W_enc"] + t["b_enc"]) * rows
        f = pre.relu()
        if "jumprelu" in name:
            f = f * (pre > t["threshold"])
        if name in ("topk", "abstopk"):
            ranked = pre.abs() if name == "abstopk" else pre
            kept = torch.zeros_like(pre).scatter(-1, ranked.topk(cfg["k"], dim=-1).indices, 1.0)
            f = kept * (pre if name == "abstopk" else f)
    y = undo((f / rows) @ W_dec + t["b_dec"])
    return f, y + x @ t["W_skip"].T if "W_skip" in t else y


def pursuit(z: Tensor, W_dec: Tensor, cfg: dict) -> Tensor:
    """Matching pursuit, one row at a time."""
    f = torch.zeros(*z.shape[:-1], N, dtype=z.dtype).reshape(-1, N)
    for row, r in enumerate(z.reshape(-1, D)):
        for _ in range(cfg.get("max_iterations") or D):
            support = f[row] != 0
            i = int((W_dec @ r).argmax())
            v = (W_dec[i] @ r).relu()
            f[row, i] += v
            r = r - v * W_dec[i]
            if cfg.get("stop_on_duplicate_support", True) and torch.equal(support, f[row] != 0):
                break
            if r.norm() < cfg.get("residual_threshold", 0.01):
                break
    return f.reshape(*z.shape[:-1], N)


def write(folder: Path, tensors: dict[str, Tensor], **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"d_in": D, "d_sae": N, "dtype": str(tensors["W_dec"].dtype).removeprefix("torch.")} | config
    settings |= {"metadata": {"sae_lens_version": "6.0.0", "hook_name": "blocks.3.hook_resid_post"}}
    (folder / "cfg.json").write_text(json.dumps(settings))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "sae_weights.safetensors")
    return folder


def assert_same(sae, x: Tensor, f: Tensor, y: Tensor) -> None:
    codes = sae.encode(x)
    assert torch.equal(codes != 0, f != 0)
    assert 0.01 < (f != 0).double().mean() < 0.99
    torch.testing.assert_close(codes.double(), f, rtol=1e-5, atol=1e-5 * float(f.abs().max()))
    torch.testing.assert_close(sae(x).double(), y, rtol=1e-5, atol=1e-5 * float(y.abs().max()))
    skip = getattr(sae, "W_skip", None)
    torch.testing.assert_close(sae.decode(codes) if skip is None else sae.decode(codes) + x @ skip, sae(x))


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("reads_x_minus_b_dec", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated", "abstopk"])
def test_what_was_stored_in_few_bits_is_folded_in_many(architecture, reads_x_minus_b_dec, dtype, x, tmp_path: Path):
    tensors = random_tensors(ARCHITECTURES[architecture], dtype=dtype)
    cfg = {"architecture": architecture, "apply_b_dec_to_input": reads_x_minus_b_dec}
    if architecture in ("topk", "abstopk"):
        cfg |= {"k": K, "rescale_acts_by_decoder_norm": True}
    sae = formats.load(write(tmp_path / "sae", tensors, **cfg))
    assert {tensor.dtype for tensor in sae.state_dict().values()} == {torch.float32}
    assert_same(sae, x, *sae_lens_oracle(cfg, tensors, x))


@pytest.mark.parametrize("norm", ["constant_norm_rescale", "layer_norm"])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated", "abstopk", "matching_pursuit"])
@pytest.mark.parametrize("dtype", STORED[:3])
def test_a_norm_per_token_is_part_of_the_sae(dtype, architecture, norm, x, tmp_path: Path):
    tensors = random_tensors(ARCHITECTURES[architecture])
    tensors["W_dec"] = torch.nn.functional.normalize(tensors["W_dec"], dim=1)
    tensors["b_dec"] = tensors["b_dec"] / 5
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
    cfg = {"architecture": architecture, "normalize_activations": norm}
    cfg |= {"k": K} if architecture in ("topk", "abstopk") else {}
    cfg |= {"max_iterations": 7} if architecture == "matching_pursuit" else {}
    folder = write(tmp_path / "sae", tensors, **cfg)
    sae = formats.load(folder)
    oracle = sae_lens_oracle(cfg, tensors, x)
    assert_same(sae, x, *oracle)
    with pytest.raises(CodesError, match=r"call decode\(f, x\)"):
        sae.decode(sae.encode(x)[0, :3])
    torch.testing.assert_close(sae.decode(sae.encode(x)[0, :3], x[0, :3]), sae(x)[0, :3])
    again = formats.load(formats.save(sae, tmp_path / "again"))
    assert_same(again, x, *oracle)
    assert again.metadata["hook_name"] == "blocks.3.hook_resid_post"


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if "transcoder" in name])
@pytest.mark.parametrize("dtype", STORED[:3])
def test_transcoders_predict_something_else(architecture, dtype, x, tmp_path: Path):
    tensors = random_tensors(ARCHITECTURES[architecture], d_out=M, dtype=dtype)
    cfg = {"architecture": architecture, "d_out": M}
    sae = formats.load(write(tmp_path / "sae", tensors, **cfg))
    oracle = sae_lens_oracle(cfg, tensors, x)
    assert sae(x).shape[-1] == M
    assert_same(sae, x, *oracle)
    assert_same(formats.load(formats.save(sae, tmp_path / "again")), x, *oracle)


@pytest.mark.parametrize("cfg", [{}, {"max_iterations": 3}, {"residual_threshold": 4.0}, {"max_iterations": 40}])
@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize("dtype", STORED[:3])
def test_matching_pursuit_takes_the_steps_of_its_formula(dtype, cfg, stop, x, tmp_path: Path):
    tensors = random_tensors(ARCHITECTURES["matching_pursuit"])
    tensors["W_dec"] = torch.nn.functional.normalize(tensors["W_dec"], dim=1)
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
    cfg = cfg | {"architecture": "matching_pursuit", "stop_on_duplicate_support": stop}
    sae = formats.load(write(tmp_path / "sae", tensors, **cfg))
    assert_same(sae, x[0, :20], *sae_lens_oracle(cfg, tensors, x[0, :20]))


@pytest.mark.parametrize("dtype", STORED[:3])
def test_a_constant_scale_of_activations_is_folded_when_it_is_known(dtype, x, tmp_path: Path):
    tensors = random_tensors(ARCHITECTURES["jumprelu"], dtype=dtype)
    cfg = {"architecture": "jumprelu", "normalize_activations": "expected_average_only_in"}
    folder = write(tmp_path / "sae", tensors, **cfg)
    with pytest.raises(FormatError, match="norm_scaling_factor"):
        formats.load(folder)
    assert_same(formats.load(folder, norm_scaling_factor=0.37), x, *sae_lens_oracle(cfg, tensors, x, 0.37))


def test_factors_from_finetuning_multiply_what_is_decoded(x, tmp_path: Path):
    tensors = random_tensors(ARCHITECTURES["standard"])
    cfg = {"architecture": "standard", "finetuning_scaling_factor": True}
    factor_N = torch.rand(N) + 0.5
    sae = formats.load(write(tmp_path / "sae", tensors | {"scaling_factor": factor_N}, **cfg))
    f, _ = sae_lens_oracle(cfg, tensors, x)
    y = (f * factor_N) @ tensors["W_dec"].double() + tensors["b_dec"].double()
    assert_same(sae, x, f, y)
    with pytest.raises(FormatError, match="finetuning_scaling_factor is False"):
        formats.load(write(tmp_path / "b", tensors | {"scaling_factor": factor_N}, architecture="standard"))
    formats.load(write(tmp_path / "c", tensors | {"scaling_factor": torch.ones(N)}, architecture="standard"))


SPARSIFY = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec", "W_skip": "W_skip"}


@pytest.mark.parametrize("dtype", STORED[:3])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"signed": True},
        {"activation": "groupmax"},
        {"transcode": True},
        {"skip_connection": True},
        {"transcode": True, "skip_connection": True, "activation": "groupmax"},
        {"num_latents": 0},
    ],
)
def test_every_form_of_sparsify(settings, dtype, x, tmp_path: Path):
    skip = settings.get("skip_connection", False)
    tensors = random_tensors((*ARCHITECTURES["standard"], *(["W_skip"] if skip else [])), dtype=dtype)
    stored = {SPARSIFY[name]: tensor for name, tensor in tensors.items()}
    stored["encoder.weight"] = stored["encoder.weight"].T.contiguous()
    folder = tmp_path / "layers.5.mlp"
    folder.mkdir()
    save_file(stored, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"activation": "topk", "k": K, "d_in": D, "num_latents": N} | settings))
    t, z = {name: tensor.double() for name, tensor in tensors.items()}, x.double()
    pre = (z if settings.get("transcode") else z - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    if settings.get("signed"):
        f = torch.zeros_like(pre).scatter(-1, (top := pre.abs().topk(K, dim=-1).indices), pre.gather(-1, top))
    elif settings.get("activation") == "groupmax":
        grouped = pre.relu().unflatten(-1, (K, N // K))
        f = (grouped * (grouped == grouped.amax(-1, keepdim=True))).flatten(-2)
    else:
        f = torch.zeros_like(pre).scatter(-1, (top := pre.topk(K, dim=-1)).indices, top.values.relu())
    y = f @ t["W_dec"] + t["b_dec"] + (z @ t["W_skip"].T if skip else 0)
    found = formats.open_folder(folder)
    assert_same(found.sae, x, f, y)
    site = "mlp.hook_in" if skip or settings.get("transcode") else "hook_mlp_out"
    assert found.metadata["hook_name"] == f"blocks.5.{site}"
