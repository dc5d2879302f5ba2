"""llamascopium and circuit-tracer themselves read their own files, and circuit-tracer our sets: `make test-peers`."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from published_fixtures import FIXTURES, D, circuit_tracer_clt
from torch import Tensor

from unbraid import SAEConfig, formats
from unbraid.formats.export import export
from unbraid.sae.build import build

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
SCOPIUM = [name for name in FIXTURES if name.startswith("llamascopium")]


@pytest.mark.parametrize("name", SCOPIUM)
def test_llamascopium_reads_the_same(name: str, x: Tensor, tmp_path: Path):
    """It scales activations before it encodes them. Its own folding leaves thresholds as they are."""
    models = pytest.importorskip("llamascopium.models.sae", reason="llamascopium, from `make test-peers`")
    made = FIXTURES[name](tmp_path, "float32")
    settings = json.loads((made.place / "config.json").read_text())
    theirs = models.SparseAutoEncoder.from_pretrained(str(made.place), device="cpu", dtype=torch.float32)
    ours = formats.load(made.place)
    scale = D**0.5 / 2.5 if settings["norm_activation"] == "dataset-wise" else 1.0
    with torch.no_grad():
        f = theirs.encode(x * scale)
        y = theirs.decode(f) / scale
    assert torch.equal(ours.encode(x) != 0, f != 0)
    torch.testing.assert_close(ours(x), y, rtol=1e-5, atol=1e-5 * float(y.abs().max()))
    torch.testing.assert_close(ours.encode(x), f, rtol=1e-5, atol=1e-5 * float(f.abs().max()))


@pytest.mark.parametrize("fixture", ["mwhanna", "transcoder_set", "gemma_scope_transcoder"])
def test_circuit_tracer_reads_our_sets(fixture: str, x: Tensor, tmp_path: Path):
    theirs = pytest.importorskip(
        "circuit_tracer.transcoder.single_layer_transcoder", reason="circuit-tracer, from `make test-peers`"
    )
    for layer in range(3):
        sae = formats.load(FIXTURES[fixture](tmp_path / f"made_{layer}", "float32").place)
        hooks = {"hook_name": f"blocks.{layer}.mlp.hook_in", "hook_name_out": f"blocks.{layer}.hook_mlp_out"}
        formats.save(sae, tmp_path / "saes" / f"layer_{layer}", metadata=hooks | {"model_name": "google/gemma-2-2b"})
    (place,) = export(tmp_path / "saes", "circuit-tracer", tmp_path / "set")
    config = yaml.safe_load((place / "config.yaml").read_text())
    assert config["model_kind"] == "transcoder_set"
    paths = {layer: str(place / f"layer_{layer}.safetensors") for layer in range(3)}
    ends = (config["feature_input_hook"], config["feature_output_hook"])
    found = theirs.load_transcoder_set(paths, "scan", *ends, device=torch.device("cpu"), dtype=torch.float32)
    for layer in range(3):
        ours = formats.load(tmp_path / "saes" / f"layer_{layer}")
        with torch.no_grad():
            f, y = found[layer].encode(x), found[layer](x)
        assert torch.equal(ours.encode(x) != 0, f != 0)
        torch.testing.assert_close(ours(x), y, rtol=1e-5, atol=1e-5 * float(y.abs().max()))


@pytest.mark.parametrize("jumps", [True, False])
def test_circuit_tracer_reads_its_cross_layer_transcoders_as_we_do(jumps: bool, tmp_path: Path):
    theirs = pytest.importorskip(
        "circuit_tracer.transcoder.cross_layer_transcoder", reason="circuit-tracer, from `make test-peers`"
    )
    place = circuit_tracer_clt(tmp_path, "float32", jumps).place
    found = theirs.load_clt(str(place), device=torch.device("cpu"), dtype=torch.float32, lazy_decoder=False)
    ours, x_LBD = formats.load(place), torch.randn(3, 50, D, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        f_LBN, y_LBD = found.encode(x_LBD), found(x_LBD)
    assert torch.equal(ours.encode(x_LBD.transpose(0, 1)) != 0, f_LBN.transpose(0, 1).flatten(1) != 0)
    torch.testing.assert_close(ours(x_LBD.transpose(0, 1)), y_LBD.transpose(0, 1), rtol=1e-5, atol=1e-4)


def test_circuit_tracer_reads_the_cross_layer_transcoders_that_are_trained_here(tmp_path: Path):
    theirs = pytest.importorskip(
        "circuit_tracer.transcoder.cross_layer_transcoder", reason="circuit-tracer, from `make test-peers`"
    )
    chance = torch.Generator().manual_seed(0)
    settings = SAEConfig(architecture="batch_topk", n_features=3 * 16, k=6, cross_layer=True)
    sae = build(settings, 3 * D, chance, d_out=3 * D, widths=((D,) * 3, (D,) * 3))
    with torch.no_grad():
        sae.threshold.fill_(0.05)
        sae.b_dec += torch.randn(3 * D, generator=chance)
    ends = [" + ".join(f"blocks.{layer}.{hook}" for layer in range(3)) for hook in ("mlp.hook_in", "hook_mlp_out")]
    metadata = {"model_name": "google/gemma-2-2b", "hook_name": ends[0], "hook_name_out": ends[1]}
    formats.save(sae, tmp_path / "sae", metadata=metadata)
    (place,) = export(tmp_path / "sae", "circuit-tracer", tmp_path / "clt")
    config = yaml.safe_load((place / "config.yaml").read_text())
    assert (config["model_kind"], config["feature_input_hook"]) == ("cross_layer_transcoder", "mlp.hook_in")
    found = theirs.load_clt(str(place), device=torch.device("cpu"), dtype=torch.float32, lazy_decoder=False)
    x_RD = torch.randn(50, 3 * D, generator=chance)
    with torch.no_grad():
        y_LRD = found(x_RD.view(50, 3, D).transpose(0, 1))
    assert 0 < (sae.encode(x_RD) != 0).double().mean() < 0.9
    torch.testing.assert_close(sae(x_RD), y_LRD.transpose(0, 1).flatten(1), rtol=1e-5, atol=1e-5)
