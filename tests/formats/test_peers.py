"""The libraries themselves read what we write, and we read what they write: run with `make test-peers`."""

import json
from pathlib import Path

import pytest
import torch
from sae_samples import D, K, N, make_sae

from unbraid import formats

# Their warnings are theirs: the promise here is about numbers.
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def sae_lens():
    return pytest.importorskip("sae_lens")


@pytest.fixture
def sparsify(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")
    return pytest.importorskip("sparsify")


def randomise(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.4
            parameter.copy_(noise.abs() if "threshold" in name else noise)


def test_sae_lens_loads_our_export_from_disk_and_reproduces_our_outputs(any_sae, x, tmp_path: Path, sae_lens):
    folder = formats.save(
        any_sae, tmp_path / "sae", metadata={"model_name": "m", "hook_name": "blocks.3.hook_resid_post"}
    )
    theirs = sae_lens.SAE.load_from_disk(str(folder))
    torch.testing.assert_close(theirs.encode(x), any_sae.encode(x), **CLOSE)
    torch.testing.assert_close(theirs(x), any_sae(x), **CLOSE)
    assert theirs.cfg.metadata.hook_name == "blocks.3.hook_resid_post"


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("StandardSAE", {}),
        ("StandardSAE", {"apply_b_dec_to_input": False}),
        ("TopKSAE", {"k": K}),
        ("TopKSAE", {"k": K, "rescale_acts_by_decoder_norm": True}),
        ("JumpReLUSAE", {}),
        ("JumpReLUSAE", {"apply_b_dec_to_input": False}),
        ("GatedSAE", {}),
        ("GatedSAE", {"apply_b_dec_to_input": False}),
    ],
)
def test_what_sae_lens_saves_gives_the_same_outputs_here(name, settings, x, tmp_path: Path, sae_lens):
    config = getattr(sae_lens, f"{name}Config")(d_in=D, d_sae=N, **settings)
    theirs = getattr(sae_lens, name)(config)
    randomise(theirs)
    theirs.save_model(tmp_path)
    ours = formats.load(tmp_path)
    torch.testing.assert_close(ours.encode(x), theirs.encode(x), **CLOSE)
    torch.testing.assert_close(ours(x), theirs(x), **CLOSE)


@pytest.mark.parametrize("name", ["BatchTopKTrainingSAE", "MatryoshkaBatchTopKTrainingSAE", "TopKTrainingSAE"])
def test_inference_models_saved_after_sae_lens_training_are_read(name, x, tmp_path: Path, sae_lens):
    settings = {"matryoshka_widths": [N // 4, N]} if name.startswith("Matryoshka") else {}
    theirs = getattr(sae_lens, name)(getattr(sae_lens, f"{name}Config")(d_in=D, d_sae=N, k=K, **settings))
    if hasattr(theirs, "topk_threshold"):
        theirs.topk_threshold.fill_(0.7)
    theirs.save_inference_model(tmp_path)
    reference = sae_lens.SAE.load_from_disk(str(tmp_path))
    torch.testing.assert_close(formats.load(tmp_path)(x), reference(x), **CLOSE)


def test_dictionary_learning_loads_our_export_and_reproduces_our_outputs(any_sae, x, tmp_path: Path):
    utils = pytest.importorskip("dictionary_learning.utils")
    folder = formats.save(any_sae, tmp_path / "trainer_0", layout="dictionary_learning", metadata={"model_name": "m"})
    theirs, config = utils.load_dictionary(str(folder), "cpu")
    assert config["trainer"]["dict_size"] == N
    flat = x.flatten(0, 1)
    torch.testing.assert_close(theirs.encode(flat), any_sae.encode(flat), **CLOSE)
    torch.testing.assert_close(theirs(flat), any_sae(flat), **CLOSE)


@pytest.mark.parametrize(
    ("module", "name", "arguments"),
    [
        ("dictionary", "AutoEncoder", {}),
        ("dictionary", "AutoEncoderNew", {}),
        ("dictionary", "JumpReluAutoEncoder", {}),
        ("dictionary", "GatedAutoEncoder", {}),
        ("trainers.top_k", "AutoEncoderTopK", {"k": K}),
        ("trainers.batch_top_k", "BatchTopKSAE", {"k": K}),
        ("trainers.matryoshka_batch_top_k", "MatryoshkaBatchTopKSAE", {"k": K, "group_sizes": [N // 4, N - N // 4]}),
    ],
)
def test_what_dictionary_learning_saves_gives_the_same_outputs_here(module, name, arguments, x, tmp_path: Path):
    theirs = getattr(pytest.importorskip(f"dictionary_learning.{module}"), name)(D, N, **arguments)
    randomise(theirs)
    if "k" in arguments:
        theirs.threshold.fill_(0.3)
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": name} | arguments, "buffer": {}}))
    ours, flat = formats.load(tmp_path), x.flatten(0, 1)
    torch.testing.assert_close(ours.encode(flat), theirs.encode(flat), **CLOSE)
    torch.testing.assert_close(ours(flat), theirs(flat), **CLOSE)


def test_sparsify_loads_our_export_and_reproduces_our_outputs(x, tmp_path: Path, sparsify):
    sae, flat = make_sae("topk"), x.flatten(0, 1)
    theirs = sparsify.SparseCoder.load_from_disk(formats.save(sae, tmp_path / "layers.3", layout="sparsify"))
    top = theirs.encode(flat)
    f = torch.zeros(len(flat), N).scatter(1, top.top_indices, top.top_acts)
    torch.testing.assert_close(f, sae.encode(flat), **CLOSE)
    torch.testing.assert_close(theirs.decode(top.top_acts, top.top_indices), sae(flat), **CLOSE)


def test_what_sparsify_saves_gives_the_same_outputs_here(x, tmp_path: Path, sparsify):
    theirs = sparsify.SparseCoder(D, sparsify.SparseCoderConfig(num_latents=N, k=K))
    randomise(theirs)
    theirs.save_to_disk(tmp_path)
    flat = x.flatten(0, 1)
    top = theirs.encode(flat)
    expected = theirs.decode(top.top_acts, top.top_indices)
    torch.testing.assert_close(formats.load(tmp_path)(flat), expected, **CLOSE)


@pytest.mark.parametrize("norm", ["none", "constant_norm_rescale", "layer_norm"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("StandardSAE", {}),
        ("TopKSAE", {"k": K}),
        ("JumpReLUSAE", {}),
        ("GatedSAE", {}),
        ("AbsTopKSAE", {"k": K}),
        ("AbsTopKSAE", {"k": K, "rescale_acts_by_decoder_norm": True}),
        ("MatchingPursuitSAE", {"max_iterations": 6}),
        ("MatchingPursuitSAE", {"max_iterations": 6, "stop_on_duplicate_support": False}),
    ],
)
def test_norms_per_token_and_matching_pursuit_are_those_of_sae_lens(name, settings, norm, x, tmp_path: Path, sae_lens):
    import sae_lens.saes as classes

    config = getattr(classes, f"{name}Config")(d_in=D, d_sae=N, normalize_activations=norm, **settings)
    theirs = getattr(classes, name)(config)
    randomise(theirs)
    with torch.no_grad():
        theirs.W_dec /= theirs.W_dec.norm(dim=1, keepdim=True)
    theirs.save_model(str(tmp_path / "sae"))
    _same(formats.load(tmp_path / "sae"), theirs, x)
    again = sae_lens.SAE.load_from_disk(str(formats.save(formats.load(tmp_path / "sae"), tmp_path / "again")))
    _same(formats.load(tmp_path / "sae"), again, x)


@pytest.mark.parametrize("name", ["Transcoder", "SkipTranscoder", "JumpReLUTranscoder", "JumpReLUSkipTranscoder"])
def test_transcoders_are_those_of_sae_lens(name, x, tmp_path: Path, sae_lens):
    import sae_lens.saes as classes

    theirs = getattr(classes, name)(
        getattr(classes, f"{name}Config")(d_in=D, d_sae=N, d_out=7, apply_b_dec_to_input=False)
    )
    randomise(theirs)
    theirs.save_model(str(tmp_path / "sae"))
    _same(formats.load(tmp_path / "sae"), theirs, x)


def _same(ours, theirs, x: torch.Tensor) -> None:
    with torch.no_grad():
        f, y = theirs.encode(x), theirs(x)
    f = f.to_dense() if f.is_sparse else f
    assert torch.equal(ours.encode(x) != 0, f != 0)
    torch.testing.assert_close(ours.encode(x), f, **CLOSE)
    torch.testing.assert_close(ours(x), y, **CLOSE)
