"""What a published SAE's folder says of its model, site, contexts and loading is followed, or refused by name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import unbraid
from unbraid import formats
from unbraid.activations.language_model import load_language_model
from unbraid.cli import main
from unbraid.config import EvaluationConfig, ModelConfig, SAEConfig
from unbraid.errors import EvaluationError, FeatureError, FormatError
from unbraid.evaluation.origin import CentredInput, hub_name, origin
from unbraid.evaluation.subjects import centre_where_needed, open_subjects
from unbraid.evaluation.suites import run_suites
from unbraid.sae import build

QUICK = EvaluationConfig.model_validate(
    {
        **{"suites": ["core"], "tokens": 128, "splice_contexts": 1, "controls": False},
        "text": {"source": "generated", "context_length": 32},
    }
)
LLAMA = {"model_name": "random:llama", "hook_name": "blocks.1.hook_resid_post"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("UNBRAID_CACHE", str(tmp_path_factory.getbasetemp() / "unbraid-cache"))


def sae_folder(folder: Path, layout: str = "sae_lens", **metadata) -> Path:
    sae = build(SAEConfig(architecture="topk", n_features=128, k=8), 64, torch.Generator().manual_seed(0))
    return formats.save(sae, folder, layout=layout, metadata=metadata)


def run_of(metadata: dict, **settings):
    return origin(metadata, QUICK.model_copy(update=settings))


def test_context_size_and_the_rule_for_bos_are_followed(tmp_path: Path):
    run = run_of(LLAMA | {"context_size": 16, "prepend_bos": False})
    assert (run.text.context_length, run.text.bos) == (16, "none")
    from unbraid.activations.live import LiveActivations

    plain, bare = (LiveActivations(each, torch.device("cpu")) for each in (run_of(LLAMA), run))
    bos = plain.model.tokenizer.bos_token_id
    assert bool((next(plain.chunks(None)).tokens_BT[:, 0] == bos).all()) and plain.prepends_bos
    tokens_BT = next(bare.chunks(None)).tokens_BT
    assert tokens_BT.shape[1] == 16 and not bool((tokens_BT == bos).any()) and not bare.prepends_bos
    report = run_suites(sae_folder(tmp_path / "sae", **LLAMA, context_size=16, prepend_bos=False), QUICK)
    assert report["saes"]["sae"]["core"]["token_stats"]["total_tokens_eval_sparsity_variance"] == 128


def test_rows_that_training_left_out_are_left_out(tmp_path: Path):
    assert run_of(LLAMA).buffer.norm_limit == 10.0
    found = formats.open_folder(sae_folder(tmp_path / "sae", **LLAMA, norm_limit=3.0))
    assert run_of(found.metadata).buffer.norm_limit == 3.0
    found = formats.open_folder(sae_folder(tmp_path / "every", **LLAMA, norm_limit=None))
    assert run_of(found.metadata).buffer.norm_limit is None
    with pytest.raises(FormatError, match=r"norm_limit is 0\.5; expected a number above 1"):
        formats.load(sae_folder(tmp_path / "odd", **LLAMA, norm_limit=0.5))


def test_the_stream_before_a_block_is_the_stream_after_the_one_below(tmp_path: Path):
    after = run_suites(
        sae_folder(tmp_path / "a", model_name="random:llama", hook_name="blocks.0.hook_resid_post"), QUICK
    )
    before = run_suites(
        sae_folder(tmp_path / "b", model_name="random:llama", hook_name="blocks.1.hook_resid_pre"), QUICK
    )
    assert before["saes"]["b"]["site"] == "resid_pre.1" and not before["skipped"]
    assert before["saes"]["b"]["core"] == after["saes"]["a"]["core"]


@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("blocks.1.hook_resid_mid", "resid_mid.1"),
        ("blocks.1.attn.hook_z", "attn_z.1"),
        ("blocks.1.ln2.hook_normalized", "mlp_normed.1"),
        ("blocks.1.hook_mlp_in", "resid_mid.1"),
        ("blocks.1.mlp.hook_post", "mlp_act.1"),
        ("hook_embed", "embed"),
    ],
)
def test_hooks_become_sites(hook, site):
    assert run_of({"model_name": "random:llama", "hook_name": hook}).model.sites == [site]


def test_gemmas_embeddings_are_read_behind_their_scale():
    assert run_of({"model_name": "google/gemma-2-2b", "hook_name": "hook_embed"}).model.sites == ["resid_pre.0"]


def test_the_submodule_of_a_dictionary_learning_folder_is_its_site(tmp_path: Path):
    folder = sae_folder(tmp_path / "trainer_0", "dictionary_learning", model_name="random:llama")
    config = json.loads((folder / "config.json").read_text())
    config["trainer"] |= {"submodule_name": "resid_post_layer_1", "layer": 1}
    (folder / "config.json").write_text(json.dumps(config))
    assert run_suites(folder, QUICK)["saes"]["trainer_0"]["site"] == "resid_post.1"
    config["trainer"]["submodule_name"] = "model.gpt_neox.layers[1]"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(EvaluationError, match=r"submodule_name 'model.gpt_neox.layers\[1\]'.*give --site"):
        run_suites(folder, QUICK)


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({"model_name": "random:llama"}, "does not say which site"),
        ({"hook_name": "blocks.1.hook_resid_post"}, "does not say which model"),
        (LLAMA | {"hook_name": "blocks.1.attn.hook_pattern"}, r"hook_name 'blocks\.1\.attn\.hook_pattern'"),
        (LLAMA | {"hook_name_out": "blocks.1.hook_mlp_out"}, "it is a transcoder"),
        (LLAMA | {"model_from_pretrained_kwargs": {"n_ctx": 4096}}, r"model_from_pretrained_kwargs\.n_ctx is 4096"),
        (LLAMA | {"model_from_pretrained_kwargs": {"trust_remote_code": True}}, "trust_remote_code is True"),
        (LLAMA | {"model_from_pretrained_kwargs": {"dtype": "int8"}}, "dtype is 'int8'"),
        (LLAMA | {"context_size": 1}, "context_size"),
    ],
)
def test_what_cannot_be_followed_is_a_failure_that_names_it(metadata, problem, tmp_path: Path, capsys):
    folder = sae_folder(tmp_path / "sae", **metadata)
    with pytest.raises(EvaluationError, match=rf"every suite was skipped.*{problem}"):
        run_suites(folder, QUICK)
    with pytest.raises(SystemExit) as ended:
        main(["eval", str(folder), "--suite", "core", "--text.source", "generated"])
    assert ended.value.code == 1 and "every suite was skipped" in capsys.readouterr().err
    assert not (folder / "evaluation.json").exists()


def transcoder_folder(folder: Path, **metadata) -> Path:
    shapes = {"W_enc": (64, 96), "b_enc": (96,), "W_dec": (96, 64), "b_dec": (64,)}
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, folder / "sae_weights.safetensors")
    hooks = {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_mlp_out"}
    settings = {"architecture": "transcoder", "d_in": 64, "d_out": 64, "d_sae": 96, "apply_b_dec_to_input": False}
    (folder / "cfg.json").write_text(
        json.dumps(settings | {"metadata": {"model_name": "random:llama"} | hooks | metadata})
    )
    return folder


def test_a_transcoder_reads_one_site_of_its_model_and_is_edited_at_another(tmp_path: Path):
    fm = unbraid.features(transcoder_folder(tmp_path / "tc"))
    assert fm.dictionaries["tc"].site == "mlp_in.1 -> mlp_out.1"
    lm = load_language_model(ModelConfig(name="random:llama", sites=["mlp_in.1", "mlp_out.1"]))
    reading = fm.read("bade gale")
    mlp_in, _ = lm.activations(reading.ids_BT)
    expected = fm.dictionaries["tc"].sae.encode(mlp_in) * reading.read_BT.unsqueeze(-1)
    torch.testing.assert_close(reading.codes["tc"].to_dense(), expected, rtol=1e-5, atol=1e-5)
    assert len(reading.codes["tc"].values()) > 0
    centred = transcoder_folder(tmp_path / "centred", model_from_pretrained_kwargs={"center_writing_weights": True})
    with pytest.raises(FeatureError, match=r"center_writing_weights is true for a transcoder that predicts mlp_out\.1"):
        unbraid.features(centred)


def test_how_the_model_was_loaded_is_followed():
    kwargs = {"dtype": "torch.bfloat16", "revision": "step1000", "fold_ln": True, "device_map": None, "n_devices": 2}
    model = run_of(LLAMA | {"model_from_pretrained_kwargs": kwargs, "model_name": "pythia-70m-deduped"}).model
    assert (model.name, model.dtype, model.revision) == ("EleutherAI/pythia-70m-deduped", "bfloat16", "step1000")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_weights_that_write_centred_are_followed_where_the_model_cannot_tell(family, tmp_path: Path):
    """GPT-2's LayerNorm takes any mean out again; Llama's RMSNorm does not, and TransformerLens leaves it alone."""
    kwargs = {"center_writing_weights": True}
    metadata = LLAMA | {"model_name": f"random:{family}", "model_from_pretrained_kwargs": kwargs}
    folder = sae_folder(tmp_path / "sae", **metadata)
    report = run_suites(folder, QUICK)
    (subject,), run = open_subjects(folder, QUICK, torch.device("cpu"))
    from unbraid.activations.live import LiveActivations

    source = LiveActivations(run, torch.device("cpu"))
    centre_where_needed([subject], source.model.model)
    assert isinstance(subject.sae, CentredInput) == (family == "gpt2")
    x = next(source.chunks(None)).activations[0]
    mean = x.mean(-1, keepdim=True) if family == "gpt2" else torch.zeros(())
    plain = formats.load(folder)
    torch.testing.assert_close(subject.sae.encode(x), plain.encode(x - mean))
    torch.testing.assert_close(subject.sae.decode(subject.sae.encode(x)), plain(x - mean) + mean)
    assert 0 < report["saes"]["sae"]["core"]["sparsity"]["l0"] <= 8


def test_names_of_transformer_lens_become_names_of_the_hub():
    names = ["gpt2-small", "gemma-2-2b", "gemma-2b-it", "Qwen3-1.7B", "google/gemma-2-2b", "random:gpt2"]
    assert [hub_name(name) for name in names] == [
        *("openai-community/gpt2", "google/gemma-2-2b", "google/gemma-2b-it", "Qwen/Qwen3-1.7B"),
        *("google/gemma-2-2b", "random:gpt2"),
    ]
    assert hub_name("qwen3-0.6b") == "Qwen/Qwen3-0.6B"


@pytest.mark.parametrize("name", ["Qwen/Qwen3-1.7B-Base", "meta-llama/Llama-3.1-8B", "someone/gpt2", "Qwen/local"])
def test_a_name_with_an_owner_is_the_hubs_own(name: str):
    assert hub_name(name) == name
