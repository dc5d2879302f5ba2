"""Published layouts: codes and outputs are what the formula of each one's library gives, whatever they were stored in.

The fixtures, with their formulas, are in `published_fixtures.py`; `registry_share.py` counts what they stand for.
"""

import json
from pathlib import Path

import pytest
import torch
from published_fixtures import FIXTURES, PLAIN, doubled, drawn, llama_scope_folder, llama_scope_form, llama_scope_r1
from torch import Tensor

from unbraid import formats
from unbraid.errors import FormatError


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", FIXTURES)
def test_layout(name: str, dtype: str, x: Tensor, tmp_path: Path):
    made = FIXTURES[name](tmp_path, dtype)
    found = formats.open_folder(made.place, **made.options)
    f, y = made.run(x.double())
    codes, out = found.sae.encode(x), found.sae(x)
    assert torch.equal(codes != 0, f != 0)
    assert 0.01 < (f != 0).double().mean() < 0.99
    torch.testing.assert_close(codes.double(), f, rtol=1e-5, atol=1e-5 * float(f.abs().max()))
    torch.testing.assert_close(out.double(), y, rtol=1e-5, atol=1e-5 * float(y.abs().max()))
    assert {key: found.metadata.get(key) for key in made.metadata} == made.metadata
    shape = {"architecture": found.sae.architecture, "d_in": found.sae.d_in, "d_sae": found.sae.n_features}
    assert found.sae.metadata.items() >= (found.metadata | shape).items()
    assert str(made.metadata["hook_name"]) in repr(found.sae)


@pytest.mark.parametrize("name", ["qwen_scope", "mwhanna", "openai_gpt2", "goodfire"])
def test_a_folder_with_one_dictionary_per_file_stands_for_it_while_it_is_the_only_one(name, x, tmp_path: Path):
    made = FIXTURES[name](tmp_path, "float32")
    if name == "qwen_scope":
        with pytest.raises(FormatError, match=r"holds 2 dictionaries, one per file: layer0\.sae\.pt, layer1\.sae\.pt"):
            formats.load(made.place.parent)
        (made.place.parent / "layer0.sae.pt").unlink()
    assert torch.equal(formats.load(made.place.parent).encode(x), formats.load(made.place).encode(x))


def test_llama_scope_with_long_decoder_rows_is_read_as_its_library_reads_it_or_as_saelens_does(x, tmp_path: Path):
    t = drawn(*PLAIN)
    folder = llama_scope_folder(tmp_path / "L", t)
    for options, folds in (({}, True), ({"decoder_norms": "folded"}, True), ({"decoder_norms": "kept"}, False)):
        if options:
            sae = formats.load(folder, **options)
        else:
            with pytest.warns(UserWarning, match='decoder_norms="kept"'):
                sae = formats.load(folder)
        f, y = llama_scope_form(doubled(t), 3.5, 3.5, folds)(x.double())
        assert torch.equal(sae.encode(x) != 0, f != 0)
        torch.testing.assert_close(sae(x).double(), y, rtol=1e-5, atol=1e-5 * float(y.abs().max()))
    unit = t | {"W_dec": torch.nn.functional.normalize(t["W_dec"], dim=1)}
    formats.load(llama_scope_folder(tmp_path / "unit", unit))  # without a warning


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("latest_ckpt.safetensors", "temporal SAE"),
    ],
)
def test_dictionaries_of_several_layers_are_refused_by_name(file, what, tmp_path: Path):
    (tmp_path / file).write_bytes(b"")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FormatError, match=what):
        formats.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("gemma_scope_2", {"type": "crosscoder"}, "type is 'crosscoder'"),
        ("gemma_scope_2", {"width": 7}, "width is 7, but the weights are 40"),
        ("gemma_scope_2", {"affine_connection": True}, "affine_connection is True"),
        ("gemma_scope_2", {"architecture": "topk"}, "architecture is 'topk'"),
        ("llama_scope", {"jump_relu_threshold": None}, "jump_relu_threshold is None"),
        ("llama_scope", {"norm_activation": "token-wise"}, "norm_activation is 'token-wise'"),
        ("llama_scope", {"dataset_average_activation_norm": {"in": 0}}, "in is 0"),
        ("llama_scope", {"d_sae": 7}, "d_sae is 7"),
        ("llamascopium_relu", {"sae_type": "lorsa"}, "sae_type is 'lorsa'"),
        ("llamascopium_topk", {"top_k": 41}, "k is 41; expected 1 to the number of features, 40"),
        ("llamascopium_relu", {"hook_point_out": "x"}, "predicts x"),
        ("llama_scope_r1", {"d_model": 7}, "d_model is 7"),
    ],
)
def test_what_contradicts_the_weights_or_cannot_be_held_is_refused_by_name(name, change, problem, tmp_path: Path):
    made = FIXTURES[name](tmp_path, "float32")
    path = next(made.place.glob("*.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FormatError, match=problem):
        formats.load(made.place, **made.options)


def test_a_scale_that_no_file_says_is_asked_for(tmp_path: Path):
    with pytest.raises(FormatError, match="norm_scaling_factor"):
        formats.load(llama_scope_r1(tmp_path, "float32").place)
    with pytest.raises(FormatError, match=r"norm_scaling_factor is 0\.0; expected a positive number"):
        formats.load(tmp_path, norm_scaling_factor=0.0)
    with pytest.raises(FormatError, match="decoder_norms is 'x'"):
        formats.load(tmp_path, decoder_norms="x")
