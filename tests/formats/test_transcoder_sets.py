"""circuit-tracer's sets: transcoders of every layer in one folder, equal to what they were made from."""

from pathlib import Path

import pytest
import torch
import yaml
from published_fixtures import FIXTURES, D
from safetensors.torch import load_file
from torch import Tensor

from unbraid import formats
from unbraid.cli import main
from unbraid.errors import FormatError
from unbraid.formats.export import export

HOOKS = {
    "model_name": "google/gemma-2-2b",
    "hook_name": "blocks.{}.mlp.hook_in",
    "hook_name_out": "blocks.{}.hook_mlp_out",
}


def transcoder(root: Path, fixture: str, layer: int):
    """One of a layer, with weights of its own."""
    found = formats.open_folder(FIXTURES[fixture](root / f"made_{layer}", "float32").place)
    with torch.no_grad():
        found.sae.W_dec *= 1 + layer
    return found.sae


def folders(root: Path, fixture: str, layers: tuple[int, ...], **changes: str) -> Path:
    for layer in layers:
        metadata = {name: value.format(layer) for name, value in (HOOKS | changes).items()}
        formats.save(transcoder(root, fixture, layer), root / "saes" / f"layer_{layer}", metadata=metadata)
    return root / "saes"


def as_circuit_tracer_computes(file: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """`SingleLayerTranscoder` of circuit-tracer 0.5.0, read by `load_relu_transcoder`."""
    t = load_file(file)
    pre = torch.nn.functional.linear(x, t["W_enc"], t["b_enc"])
    threshold = t.get("activation_function.threshold")
    f = pre.relu() if threshold is None else pre * (pre > threshold)
    y = f @ t["W_dec"] + t["b_dec"]
    return f, y + x @ t["W_skip"].T if "W_skip" in t else y


@pytest.mark.parametrize("fixture", ["mwhanna", "transcoder_set", "gemma_scope_transcoder"])
def test_a_set_computes_what_its_transcoders_do_here_and_there(fixture: str, x: Tensor, tmp_path: Path, capsys):
    source = folders(tmp_path, fixture, (0, 1, 2))
    main(["export", str(source), "--to", "circuit-tracer", "--out", str(tmp_path / "set")])
    assert capsys.readouterr().out.split() == [str(tmp_path / "set")]
    assert yaml.safe_load((tmp_path / "set" / "config.yaml").read_text()) == {
        "model_name": "google/gemma-2-2b",
        "model_kind": "transcoder_set",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out",
    }
    for layer in range(3):
        before, file = formats.load(source / f"layer_{layer}"), tmp_path / "set" / f"layer_{layer}.safetensors"
        after = formats.open_folder(file)
        f, y = as_circuit_tracer_computes(file, x)
        assert torch.equal(after.sae.encode(x), before.encode(x)) and torch.equal(after.sae(x), before(x))
        assert torch.equal(before.encode(x) != 0, f != 0)
        torch.testing.assert_close(before.encode(x), f, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(before(x), y, rtol=1e-5, atol=1e-4)
        assert after.metadata["hook_name"] == f"blocks.{layer}.mlp.hook_in"
        assert after.metadata["hook_name_out"] == f"blocks.{layer}.hook_mlp_out"


@pytest.mark.parametrize(
    ("fixture", "layers", "changes", "problem"),
    [
        ("mwhanna", (1, 2), {}, "of layers 1, 2; expected one for each layer from 0"),
        ("mwhanna", (0,), {"hook_name_out": "blocks.7.hook_mlp_out"}, "expected a model and two hooks of one layer"),
        ("gemma_scope", (0,), {}, r"architecture is 'jumprelu'; expected a ReLU or JumpReLU transcoder"),
        ("gemma_scope_2_transcoder", (0,), {}, rf"reads {D} numbers and writes 9; expected one width"),
    ],
)
def test_what_a_set_cannot_hold_is_refused_by_name_and_nothing_is_written(fixture, layers, changes, problem, tmp_path):
    with pytest.raises(FormatError, match=problem):
        export(folders(tmp_path, fixture, layers, **changes), "transcoder_set", tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_transcoders_that_do_not_belong_together_are_refused(tmp_path: Path):
    folders(tmp_path, "mwhanna", (0,))
    folders(tmp_path, "mwhanna", (1,), model_name="another")
    with pytest.raises(FormatError, match="layer_1: model_name is another, not google/gemma-2-2b"):
        export(tmp_path / "saes", "circuit_tracer", tmp_path / "set")


def test_only_our_own_earlier_set_is_replaced_and_only_when_asked(tmp_path: Path):
    source = folders(tmp_path, "mwhanna", (0, 1))
    export(source, "circuit_tracer", tmp_path / "set")
    with pytest.raises(FormatError, match="--overwrite"):
        export(source, "circuit_tracer", tmp_path / "set")
    export(source, "circuit_tracer", tmp_path / "set", overwrite=True)
    (tmp_path / "set" / "notes.txt").write_text("mine")
    with pytest.raises(FormatError, match=r"notes\.txt, which unbraid did not write"):
        export(source, "circuit_tracer", tmp_path / "set", overwrite=True)


def test_a_folder_of_folders_is_exported_to_other_layouts_too(x: Tensor, tmp_path: Path):
    source = folders(tmp_path, "mwhanna", (0, 3))
    written = export(source, "sae_lens", tmp_path / "out")
    assert [path.name for path in written] == ["layer_0", "layer_3"]
    assert all(torch.equal(formats.load(path)(x), formats.load(source / path.name)(x)) for path in written)
    (source / "thesis").mkdir()
    with pytest.raises(FormatError, match="these folders inside it are: layer_0, layer_3"):
        export(source, "sae_lens", tmp_path / "again")
