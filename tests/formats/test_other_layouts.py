"""dictionary_learning, sparsify and Gemma Scope: their files give the codes those libraries themselves would give.

The oracles below are each library's inference form written out in plain tensor algebra, so that the promise is about
outputs and needs none of the libraries installed; test_peers.py asks the libraries themselves.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sae_samples import D, K, N, make_sae
from safetensors.torch import save_file
from torch import Tensor

from unbraid import formats
from unbraid.errors import FormatError

LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
DIRECT = ("W_enc", "b_enc", "W_dec", "b_dec")
CLASSES = {
    "AutoEncoder": (*LINEAR, "bias"),
    "AutoEncoderNew": (*LINEAR, "decoder.bias"),
    "AutoEncoderTopK": (*LINEAR, "b_dec", "k", "threshold"),
    "BatchTopKSAE": (*LINEAR, "b_dec", "k", "threshold"),
    "MatryoshkaBatchTopKSAE": (*DIRECT, "k", "threshold", "group_sizes"),
    "JumpReluAutoEncoder": (*DIRECT, "threshold"),
    "GatedAutoEncoder": ("decoder_bias", "encoder.weight", "r_mag", "gate_bias", "mag_bias", "decoder.weight"),
}


def random_state(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = {"encoder.weight": (N, D), "decoder.weight": (D, N), "W_enc": (D, N), "W_dec": (N, D)}
    shapes |= {"b_dec": (D,), "bias": (D,), "decoder.bias": (D,), "decoder_bias": (D,)}
    state = {key: torch.randn(shapes.get(key, (N,)), generator=generator) * 0.5 for key in CLASSES[name]}
    if "k" in state:
        state |= {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.4)}
    elif "threshold" in state:
        state["threshold"] = state["threshold"].abs()
    if "group_sizes" in state:
        state["group_sizes"] = torch.tensor([N // 4, N - N // 4])
    return state


def oracle(name: str, s: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and reconstruction as the class `name` of dictionary_learning computes them."""
    if name == "JumpReluAutoEncoder":
        pre = x @ s["W_enc"] + s["b_enc"]
        f = (pre * (pre > s["threshold"])).relu()
        return f, f @ s["W_dec"] + s["b_dec"]
    if name == "MatryoshkaBatchTopKSAE":
        pre = ((x - s["b_dec"]) @ s["W_enc"] + s["b_enc"]).relu()
        f = pre * (pre > s["threshold"])
        return f, f @ s["W_dec"] + s["b_dec"]
    bias = next(s[key] for key in ("bias", "decoder.bias", "b_dec", "decoder_bias") if key in s)
    pre = (x if name == "AutoEncoderNew" else x - bias) @ s["encoder.weight"].T
    if name == "GatedAutoEncoder":
        f = (pre + s["gate_bias"] > 0) * (s["r_mag"].exp() * pre + s["mag_bias"]).relu()
    else:
        f = (pre + s["encoder.bias"]).relu()
    if name == "AutoEncoderTopK":
        top = f.topk(K, dim=-1)
        f = torch.zeros_like(f).scatter(-1, top.indices, top.values)
    if name == "BatchTopKSAE":
        f = f * (f > s["threshold"])
    return f, f @ s["decoder.weight"].T + bias


def write_trainer(folder: Path, name: str, state: dict[str, Tensor], **settings) -> Path:
    folder.mkdir(parents=True)
    torch.save(state, folder / "ae.pt")
    trainer = {"dict_class": name, "activation_dim": D, "dict_size": N, "k": K, "lm_name": "m", "layer": 4} | settings
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", CLASSES)
def test_every_class_of_dictionary_learning_gives_its_own_codes_and_reconstructions(name, dtype, x, tmp_path: Path):
    in_dtype = {
        key: t.to(getattr(torch, dtype)) if t.is_floating_point() else t for key, t in random_state(name).items()
    }
    found = formats.open_folder(write_trainer(tmp_path / "trainer_0", name, in_dtype))
    f, x_hat = oracle(name, {key: t.double() for key, t in in_dtype.items()}, x.double())
    assert found.layout == "dictionary_learning"
    assert found.metadata == {"model_name": "m", "hook_layer": 4}
    assert torch.equal(found.sae.encode(x) != 0, f != 0)
    torch.testing.assert_close(found.sae.encode(x).double(), f, rtol=1e-5, atol=1e-5 * float(f.abs().max()))
    torch.testing.assert_close(found.sae(x).double(), x_hat, rtol=1e-5, atol=1e-5 * float(x_hat.abs().max()))
    assert (found.sae.encode(x) != 0).double().mean() > 0.02


def test_every_architecture_survives_dictionary_learning(any_sae, x, tmp_path: Path):
    metadata = {"model_name": "m", "hook_name": "blocks.7.hook_resid_post", "context_size": 128}
    folder = formats.save(any_sae, tmp_path / "trainer_0", layout="dictionary_learning", metadata=metadata)
    found = formats.open_folder(folder)
    assert found.sae.config == any_sae.config
    assert {key: found.metadata[key] for key in metadata} == metadata
    torch.testing.assert_close(found.sae.encode(x), any_sae.encode(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.sae(x), any_sae(x), rtol=1e-6, atol=1e-6)
    trainer = json.loads((folder / "config.json").read_text())["trainer"]
    assert (trainer["activation_dim"], trainer["dict_size"], trainer["layer"]) == (D, N, 7)
    state = torch.load(folder / "ae.pt", weights_only=True)
    assert set(state) == set(CLASSES[trainer["dict_class"]])


def test_what_we_write_is_what_the_class_itself_would_compute(any_sae, x, tmp_path: Path):
    folder = formats.save(any_sae, tmp_path / "trainer_0", layout="dictionary-learning")
    name = json.loads((folder / "config.json").read_text())["trainer"]["dict_class"]
    f, x_hat = oracle(name, torch.load(folder / "ae.pt", weights_only=True), x)
    torch.testing.assert_close(f, any_sae.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x_hat, any_sae(x), rtol=1e-5, atol=1e-5)


def test_a_threshold_that_training_never_set_is_said_and_read_as_the_library_reads_it(x, tmp_path: Path):
    state = random_state("BatchTopKSAE") | {"threshold": torch.tensor(-1.0)}
    with pytest.warns(UserWarning, match="never set"):
        sae = formats.load(write_trainer(tmp_path / "t", "BatchTopKSAE", state))
    torch.testing.assert_close(sae.encode(x), oracle("BatchTopKSAE", state, x)[0], rtol=1e-5, atol=1e-5)


class Boom:
    """Unpickling this would run code."""

    def __reduce__(self):
        return (print, ("code from a pickle ran",))


def test_a_pickle_with_code_in_it_is_refused_and_nothing_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = write_trainer(tmp_path / "t", "AutoEncoder", random_state("AutoEncoder") | {"boom": Boom()})
    with pytest.raises(FormatError, match=r"ae\.pt.*could run code"):
        formats.load(folder)
    assert "ran" not in capsys.readouterr().out


def test_unknown_classes_damage_and_missing_settings_are_named(tmp_path: Path):
    with pytest.raises(FormatError, match="dict_class is 'IdentityDict'"):
        formats.load(write_trainer(tmp_path / "a", "IdentityDict", {}))
    state = random_state("AutoEncoder")
    del state["bias"]
    with pytest.raises(FormatError, match="missing: bias"):
        formats.load(write_trainer(tmp_path / "b", "AutoEncoder", state))
    damaged = write_trainer(tmp_path / "c", "AutoEncoder", {})
    (damaged / "ae.pt").write_bytes(b"not a pickle")
    with pytest.raises(FormatError, match=r"ae\.pt"):
        formats.load(damaged)
    (damaged / "config.json").write_text("{}")
    with pytest.raises(FormatError, match="trainer is None"):
        formats.load(damaged)


def sparsify_folder(folder: Path, **changes) -> tuple[Path, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(6)
    shapes = {"encoder.weight": (N, D), "encoder.bias": (N,), "W_dec": (N, D), "b_dec": (D,)}
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    folder.mkdir()
    save_file(state, folder / "sae.safetensors")
    config = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": N, "k": K}
    config |= {"multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D} | changes
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder, state


def test_a_sparsify_folder_gives_its_own_codes_and_reconstructions(x, tmp_path: Path):
    folder, s = sparsify_folder(tmp_path / "layers.3")
    pre = ((x - s["b_dec"]) @ s["encoder.weight"].T + s["encoder.bias"]).relu()
    top = pre.topk(K, dim=-1)
    f = torch.zeros_like(pre).scatter(-1, top.indices, top.values)
    found = formats.open_folder(folder)
    hooks = {"hookpoint": "layers.3", "hook_name": "blocks.3.hook_resid_post"}
    assert (found.layout, found.metadata) == ("sparsify", hooks)
    torch.testing.assert_close(found.sae.encode(x), f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.sae(x), f @ s["W_dec"] + s["b_dec"], rtol=1e-5, atol=1e-5)


def test_topk_survives_sparsify_to_the_bit(x, tmp_path: Path):
    sae = make_sae("topk", aux_weight=0.5)
    found = formats.open_folder(
        formats.save(sae, tmp_path / "layers.3", layout="sparsify", metadata={"model_name": "m"})
    )
    assert found.sae.config == sae.config and found.metadata["model_name"] == "m"
    assert torch.equal(found.sae.encode(x), sae.encode(x))


@pytest.mark.parametrize(
    ("field", "value"),
    [("activation", "relu"), ("skip_connection", "yes"), ("transcode", 1), ("k", None), ("d_in", 99), ("signed", [])],
)
def test_what_sparsify_holds_and_unbraid_cannot_is_refused_by_name(field, value, tmp_path: Path):
    with pytest.raises(FormatError, match=rf"cfg\.json: {field}"):
        formats.load(sparsify_folder(tmp_path / "sae", **{field: value})[0])


def test_what_sparsify_cannot_hold_is_refused_by_name(tmp_path: Path):
    with pytest.raises(FormatError, match="architecture is 'relu'"):
        formats.save(make_sae("relu"), tmp_path / "sae", layout="sparsify")
    assert not (tmp_path / "sae").exists()


def test_gemma_scope_archives_are_read_and_never_unpickled(x, tmp_path: Path):
    s = random_state("JumpReluAutoEncoder")
    folder = tmp_path / "layer_20" / "width_16k" / "average_l0_71"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in s.items()})
    found = formats.open_folder(folder)
    assert found.metadata == {"folder": "layer_20/width_16k/average_l0_71"}
    f, x_hat = oracle("JumpReluAutoEncoder", s, x)
    torch.testing.assert_close(found.sae.encode(x), f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.sae(x), x_hat, rtol=1e-5, atol=1e-5)


def test_a_damaged_or_pickled_gemma_scope_archive_is_refused(tmp_path: Path):
    np.savez(tmp_path / "params.npz", W_enc=np.array([Boom()], dtype=object))
    with pytest.raises(FormatError, match=r"params\.npz"):
        formats.load(tmp_path)
    (tmp_path / "params.npz").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(FormatError, match=r"params\.npz"):
        formats.load(tmp_path)
    np.savez(tmp_path / "params.npz", W_enc=np.zeros((D, N), dtype=np.float32))
    with pytest.raises(FormatError, match=r"holds \['W_enc'\]; expected"):
        formats.load(tmp_path)
