"""Crosscoders and cross-layer transcoders give their formula's codes and outputs; one-site commands refuse them."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from published_fixtures import D, N, circuit_tracer_clt, gemma_scope_2_layers
from safetensors.torch import load_file, save_file
from stand_in_hub import stand_in_hub

import unbraid
from unbraid import formats
from unbraid.cli import main
from unbraid.errors import ActivationError, FormatError
from unbraid.formats.export import export

SEVERAL = {
    "gemma_scope_2_clt": gemma_scope_2_layers,
    "gemma_scope_2_clt_affine": partial(gemma_scope_2_layers, skips=True),
    "gemma_scope_2_crosscoder": partial(gemma_scope_2_layers, kind="crosscoder"),
    "circuit_tracer_clt": circuit_tracer_clt,
    "circuit_tracer_clt_relu": partial(circuit_tracer_clt, jumps=False),
}


@pytest.fixture
def x_L() -> torch.Tensor:
    """Activations of three sites, [2, 50, 3, D]."""
    return torch.randn(2, 50, 3, D, generator=torch.Generator().manual_seed(1)) * 1.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", SEVERAL)
def test_codes_and_outputs_are_those_of_the_formula(name: str, dtype: str, x_L, tmp_path: Path):
    made = SEVERAL[name](tmp_path, dtype)
    sae = unbraid.load(made.place)
    f, y = made.run(x_L.double())
    codes, out = sae.encode(x_L), sae(x_L)
    assert codes.shape == (2, 50, 3 * N) and out.shape == x_L.shape and sae.n_features == 3 * N
    assert torch.equal(codes != 0, f != 0) and 0.01 < (f != 0).double().mean() < 0.99
    torch.testing.assert_close(codes.double(), f, rtol=1e-5, atol=1e-5 * float(f.abs().max()))
    torch.testing.assert_close(out.double(), y, rtol=1e-5, atol=1e-5 * float(y.abs().max()))
    assert sae.metadata.items() >= made.metadata.items()
    assert sae.architecture in repr(sae) and (sae.architecture == "crosscoder") == ("crosscoder" in name)
    if "crosscoder" not in name:
        assert not sae.W_dec[2 * N :, :2].any(), "the last layer writes into no earlier one"


def test_it_is_loaded_from_the_hub_file_by_file(x_L, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    made = gemma_scope_2_layers(tmp_path / "up", "float32")
    root = made.place.parent.parent
    with stand_in_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        hub.repositories["google/gemma-scope-2-1b-pt"] = files | {"clt/width_524k/params_layer_0.safetensors": b"x"}
        sae = unbraid.load("hf://google/gemma-scope-2-1b-pt/clt/width_262k_l0_big")
        assert torch.equal(sae(x_L), unbraid.load(made.place)(x_L))
        assert not any("width_524k" in request for request in hub.requests)


def test_files_of_circuit_tracer_that_do_not_fit_together_are_named(tmp_path: Path):
    place = circuit_tracer_clt(tmp_path, "float32").place
    with pytest.raises(
        FormatError, match="holds a cross-layer transcoder of circuit-tracer, which reads several sites"
    ):
        formats.open_folder(place)
    save_file({"W_dec_1": torch.zeros(N, 3, D)}, place / "W_dec_1.safetensors")
    with pytest.raises(FormatError, match=r"W_dec_1 is \(40, 3, 12\); expected \(40, 2, 12\) for 3 layers"):
        unbraid.load(place)
    (place / "W_dec_1.safetensors").unlink()
    with pytest.raises(FormatError, match=r"W_dec_1\.safetensors"):
        unbraid.load(place)
    (place / "W_enc_1.safetensors").unlink()
    with pytest.raises(FormatError, match=r"files of layers \[0, 2\]; expected 0 to 2"):
        unbraid.load(place)


def test_activations_of_another_shape_say_which_are_expected(tmp_path: Path):
    sae = unbraid.load(gemma_scope_2_layers(tmp_path, "float32").place)
    for shape in ((4, D), (4, 2, D), (4, 3, D + 1)):
        with pytest.raises(ActivationError, match=rf"expected \[\.\.\., 3, {D}\]: those of all 3 sites"):
            sae.encode(torch.randn(shape))


def test_what_takes_one_site_refuses_it_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    place = gemma_scope_2_layers(tmp_path, "float32").place
    reason = r"holds a crosscoder or cross-layer transcoder of Gemma Scope 2, which reads several sites"
    for refused in (lambda: formats.open_folder(place), lambda: export(place, "sae_lens", tmp_path / "out")):
        with pytest.raises(FormatError, match=reason):
            refused()
    for command in ("eval", "dashboard", "read"):
        with pytest.raises(SystemExit):
            main([command, str(place), *(["a text"] if command == "read" else [])])
        assert "which reads several sites" in capsys.readouterr().err


def test_files_that_are_missing_or_do_not_fit_together_are_named(tmp_path: Path):
    place = gemma_scope_2_layers(tmp_path, "float32").place
    config = json.loads((place / "config.json").read_text())
    for change, problem in (({"type": "sae"}, "type is 'sae'"), ({"width": 7}, "width is 7, but the weights are 120")):
        (place / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(FormatError, match=problem):
            unbraid.load(place)
    (place / "config.json").write_text(json.dumps(config))
    second = place / "params_layer_1.safetensors"
    whole = load_file(second)
    save_file(whole | {"w_dec": whole["w_dec"][:, :2].contiguous()}, second)
    with pytest.raises(FormatError, match=r"params_layer_1\.safetensors.*: w_dec is \(40, 2, 12\) in a folder of 3"):
        unbraid.load(place)
    few = {name: tensor[..., : N // 2].contiguous() for name, tensor in whole.items() if name not in ("w_dec", "b_dec")}
    save_file(whole | few | {"w_dec": whole["w_dec"][: N // 2].contiguous()}, second)
    with pytest.raises(FormatError, match=r"layer 1 has .* as layer 0 has"):
        unbraid.load(place)
    second.unlink()
    with pytest.raises(FormatError, match=r"files of layers \[0, 2\]; expected 0 to 2"):
        unbraid.load(place)
    second.write_bytes(b"damaged")
    with pytest.raises(FormatError, match="expected an intact safetensors file"):
        unbraid.load(place)
