"""The SAELens folder: every architecture survives the round trip; what cannot be held exactly is refused by name."""

import json
from pathlib import Path

import pytest
import torch
from sae_samples import D, K, N, make_sae
from safetensors.torch import load_file, save_file

from unbraid import formats
from unbraid.errors import FormatError
from unbraid.formats import sae_lens


def write_flat(folder: Path, tensors: dict[str, torch.Tensor], **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": D, "d_sae": N} | config))
    return folder


def random_tensors(*extra: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    tensors = {"W_enc": torch.randn(D, N, generator=generator), "W_dec": torch.randn(N, D, generator=generator)}
    tensors["b_dec"] = torch.randn(D, generator=generator)
    return tensors | {name: torch.randn(N, generator=generator) for name in extra}


def test_every_architecture_comes_back_with_the_same_weights_settings_and_codes(any_sae, x, tmp_path: Path):
    formats.save(any_sae, tmp_path / "sae", metadata={"model_name": "m", "hook_name": "blocks.3.hook_resid_post"})
    found = formats.open_folder(tmp_path / "sae")
    assert found.layout == "sae_lens" and found.metadata["model_name"] == "m"
    assert found.sae.config == any_sae.config
    before, after = any_sae.state_dict(), found.sae.state_dict()
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name
    assert torch.equal(found.sae.encode(x), any_sae.encode(x))
    assert torch.equal(found.sae(x), any_sae(x))


def test_the_plain_reading_without_our_metadata_gives_the_same_codes(any_sae, x, tmp_path: Path):
    """What another program sees: standard, topk, jumprelu or gated, and nothing else."""
    folder = formats.save(any_sae, tmp_path / "sae")
    config = json.loads((folder / "cfg.json").read_text())
    del config["metadata"]["unbraid"]
    (folder / "cfg.json").write_text(json.dumps(config))
    plain = formats.load(folder)
    assert plain.architecture == sae_lens.READ_AS[config["architecture"]]
    torch.testing.assert_close(plain.encode(x), any_sae.encode(x), rtol=1e-6, atol=1e-6)


def test_the_files_are_the_ones_sae_lens_reads(tmp_path: Path):
    folder = formats.save(make_sae("topk"), tmp_path / "sae", frequency_N=torch.full((N,), 0.01))
    assert sorted(path.name for path in folder.iterdir()) == [
        ".unbraid.json",
        "cfg.json",
        "sae_weights.safetensors",
        "sparsity.safetensors",
    ]
    config = json.loads((folder / "cfg.json").read_text())
    assert {key: config[key] for key in config if key != "metadata"} == {
        "architecture": "topk",
        "d_in": D,
        "d_sae": N,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "k": K,
        "rescale_acts_by_decoder_norm": False,
    }
    assert int(config["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    shapes = {name: list(tensor.shape) for name, tensor in load_file(folder / "sae_weights.safetensors").items()}
    assert shapes == {"W_enc": [D, N], "b_enc": [N], "W_dec": [N, D], "b_dec": [D]}
    torch.testing.assert_close(formats.open_folder(folder).log10_frequency_N, torch.full((N,), -2.0))


def test_an_sae_folded_before_saving_reproduces_training_time_reconstructions_on_raw_activations(any_sae, x, tmp_path):
    scale, mean_D = 0.037, torch.linspace(-2, 3, x.shape[-1])
    at_training = mean_D + any_sae((x - mean_D) * scale) / scale
    any_sae.fold(mean_D, scale)
    loaded = formats.load(formats.save(any_sae, tmp_path / "sae"))
    error = (loaded(x) - at_training).norm() / at_training.norm()
    assert error < 1e-5


def test_an_encoder_that_does_not_subtract_the_decoder_bias_gives_the_same_codes(x, tmp_path: Path):
    tensors = random_tensors("b_enc")
    folder = write_flat(tmp_path / "sae", tensors, architecture="standard", apply_b_dec_to_input=False)
    expected = (x @ tensors["W_enc"] + tensors["b_enc"]).relu()
    torch.testing.assert_close(formats.load(folder).encode(x), expected, rtol=1e-5, atol=1e-5)


def test_topk_with_decoder_norms_in_its_codes_gives_the_same_codes_and_reconstructions(x, tmp_path: Path):
    tensors = random_tensors("b_enc")
    folder = write_flat(tmp_path / "sae", tensors, architecture="topk", k=K, rescale_acts_by_decoder_norm=True)
    norm = tensors["W_dec"].norm(dim=1)
    pre = ((x - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]) * norm
    top = pre.topk(K, dim=-1)
    f = torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
    sae = formats.load(folder)
    torch.testing.assert_close(sae.encode(x), f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(x), (f / norm) @ tensors["W_dec"] + tensors["b_dec"], rtol=1e-5, atol=1e-5)


def test_decoder_rows_that_are_not_unit_are_kept_as_they_are(x, tmp_path: Path):
    tensors = random_tensors("b_enc")
    sae = formats.load(write_flat(tmp_path / "sae", tensors, architecture="standard"))
    assert torch.equal(sae.W_dec, tensors["W_dec"])
    expected = ((x - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]).relu() @ tensors["W_dec"] + tensors[
        "b_dec"
    ]
    torch.testing.assert_close(sae(x), expected, rtol=1e-5, atol=1e-4)


def test_half_precision_weights_are_read_exactly_and_used_in_float32(tmp_path: Path):
    tensors = {name: tensor.bfloat16() for name, tensor in random_tensors("b_enc").items()}
    sae = formats.load(write_flat(tmp_path / "sae", tensors, architecture="standard", dtype="bfloat16"))
    assert sae.W_dec.dtype == torch.float32
    assert torch.equal(sae.W_dec, tensors["W_dec"].float())


def test_the_flat_settings_of_older_versions_are_read(x, tmp_path: Path):
    flat = {
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 3},
        "normalize_activations": False,
        "hook_point": "blocks.2.hook_resid_post",
        "model_name": "gpt2-small",
        "finetuning_scaling_factor": False,
    }
    tensors = random_tensors("b_enc") | {"scaling_factor": torch.ones(N)}
    found = formats.open_folder(write_flat(tmp_path / "sae", tensors, **flat))
    assert (found.sae.architecture, found.sae.config.k) == ("topk", 3)
    assert found.metadata == {"hook_name": "blocks.2.hook_resid_post", "model_name": "gpt2-small"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("normalize_activations", "covariance_whitening"),
        ("normalize_activations", "expected_average_only_in"),
        ("reshape_activations", "hook_q"),
        ("finetuning_scaling_factor", True),
        ("architecture", "temporal"),
        ("activation_fn", "tanh-relu"),
        ("k", None),
    ],
)
def test_what_cannot_be_held_exactly_is_refused_by_the_name_of_its_field(field, value, tmp_path: Path):
    config = {"architecture": "topk" if field == "k" else "standard"} | {field: value}
    with pytest.raises(FormatError, match=rf"cfg\.json.*{field}"):
        formats.load(write_flat(tmp_path / "sae", random_tensors("b_enc"), **config))


@pytest.mark.parametrize("damage", ["missing", "surplus", "shape", "nan", "bytes", "json"])
def test_damage_is_named_and_never_loaded(damage, tmp_path: Path):
    folder = write_flat(tmp_path / "sae", random_tensors("b_enc"), architecture="standard")
    tensors = random_tensors("b_enc")
    expected = {
        "missing": "b_enc",
        "surplus": "W_skip",
        "shape": "b_enc",
        "nan": "W_dec",
        "bytes": "safetensors",
        "json": "JSON",
    }
    if damage == "missing":
        del tensors["b_enc"]
    elif damage == "surplus":
        tensors["W_skip"] = torch.zeros(D, D)
    elif damage == "shape":
        tensors["b_enc"] = torch.zeros(N + 1)
    elif damage == "nan":
        tensors["W_dec"][3, 2] = float("nan")
    save_file(tensors, folder / "sae_weights.safetensors")
    if damage == "bytes":
        (folder / "sae_weights.safetensors").write_bytes(b"\x10\x00\x00")
    elif damage == "json":
        (folder / "cfg.json").write_text("{")
    with pytest.raises(FormatError, match=expected[damage]):
        formats.load(folder)


def test_saving_over_a_folder_replaces_it_whole_and_leaves_nothing_aside(tmp_path: Path):
    folder = formats.save(make_sae("relu", seed=1), tmp_path / "sae", frequency_N=torch.ones(N))
    again = make_sae("relu", seed=2)
    formats.save(again, folder)
    assert torch.equal(formats.load(folder).W_dec, again.W_dec)
    assert not (folder / "sparsity.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["sae"]


def test_a_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = make_sae("relu", seed=1)
    folder = formats.save(first, tmp_path / "sae")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sae_lens, "write_tensors", full_disk)
    with pytest.raises(FormatError, match="No space left"):
        formats.save(make_sae("relu", seed=2), folder)
    assert torch.equal(formats.load(folder).W_dec, first.W_dec)
    assert [path.name for path in tmp_path.iterdir()] == ["sae"]


def test_a_path_that_is_no_sae_folder_says_what_was_expected_and_what_is_near(tmp_path: Path):
    with pytest.raises(FormatError, match="there is no"):
        formats.load(tmp_path / "nowhere")
    with pytest.raises(FormatError, match=r"expected cfg\.json"):
        formats.load(tmp_path)
    formats.save(make_sae("relu"), tmp_path / "saes" / "resid_post.3_twin")
    with pytest.raises(FormatError, match=r"saes/resid_post\.3_twin"):
        formats.load(tmp_path)
    assert formats.load(tmp_path / "saes" / "resid_post.3_twin" / "cfg.json").architecture == "relu"


def test_a_file_in_the_way_and_an_unknown_layout_are_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FormatError, match="is a file"):
        formats.save(make_sae("relu"), tmp_path / "file")
    with pytest.raises(FormatError, match="no layout 'onnx'"):
        formats.save(make_sae("relu"), tmp_path / "sae", layout="onnx")


def test_sites_and_hook_names_translate_both_ways():
    assert sae_lens.hook_name("resid_post.6") == "blocks.6.hook_resid_post"
    assert sae_lens.site_of("blocks.6.hook_mlp_out") == "mlp_out.6"
    assert sae_lens.site_of("blocks.6.attn.hook_z") == "attn_z.6"
    assert sae_lens.site_of("blocks.6.attn.hook_q") is None
