"""Published dictionaries by name: found in SAELens' list, downloaded file by file, read with what the list knows."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from published_fixtures import D, doubled, drawn, jump, llama_scope_r1, plain_form, qwen_scope
from safetensors.torch import save_file
from stand_in_hub import stand_in_hub

import unbraid
from unbraid.cli import main
from unbraid.errors import FormatError
from unbraid.formats import registry

DTYPES = ("float32", "bfloat16", "float16")
LIST = """
gemma-scope-2b-pt-res-canonical:
  conversion_func: gemma_2
  model: gemma-2-2b
  repo_id: google/gemma-scope-2b-pt-res
  links: {model: x}
  saes:
  - {id: layer_12/width_16k/canonical, path: layer_12/width_16k/average_l0_82, l0: 82,
     neuronpedia: gemma-2-2b/12-gemmascope-res-16k}
  - {id: layer_1/width_16k/canonical, path: layer_1/width_16k/average_l0_112, l0: 112}
gemma-scope-2-4b-pt-att:
  conversion_func: gemma_3
  model: google/gemma-3-4b-pt
  repo_id: google/gemma-scope-2-4b-pt
  saes: [{id: layer_17, path: attn_out_all/layer_17_width_16k_l0_small, l0: 20}]
qwen:
  conversion_func: qwen_scope
  model: Qwen/Qwen3-1.7B-Base
  repo_id: Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_5
  saes: [{id: layer1, path: layer1.sae.pt}]
r1:
  conversion_func: llama_scope_r1_distill
  model: meta-llama/Llama-3.1-8B
  repo_id: fnlp/R1
  saes: [{id: l5r, path: L5R, norm_scaling_factor: 1.7}]
mistral:
  model: mistral-7b
  repo_id: josh/mistral
  config_overrides: {normalize_activations: constant_norm_rescale, model_from_pretrained_kwargs: {fold_ln: true}}
  saes: [{id: layer_8, path: mistral_7b_layer_8}]
clt:
  conversion_func: mntss_clt_layer_transcoder
  model: gemma-2-2b
  repo_id: mntss/clt
  saes: [{id: layer_0, path: 0}]
nested: {whole: {release: 1}}
"""


@pytest.fixture
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "pretrained_saes.yaml"
    path.write_text(LIST)
    monkeypatch.setenv("UNBRAID_REGISTRY", str(path))
    monkeypatch.setenv("UNBRAID_CACHE", str(tmp_path / "cache"))
    return path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with stand_in_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield hub


def uploaded(hub, repository: str, folder: Path) -> None:
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.repositories[repository] = files | {"unwanted/optimiser.pt": b"x" * 100}


def test_a_name_is_downloaded_and_read_with_what_the_registry_knows(listed, hub, x, tmp_path: Path):
    made = qwen_scope(tmp_path / "up", "bfloat16")
    uploaded(hub, "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_5", made.place.parent)
    sae = unbraid.load("qwen/layer1")
    f, _ = made.run(x.double())
    assert torch.equal(sae.encode(x) != 0, f != 0)
    assert sae.metadata["registry_name"] == "qwen/layer1" and sae.metadata["model_name"] == "Qwen/Qwen3-1.7B-Base"
    assert not any("optimiser" in request or "layer0" in request for request in hub.requests)
    assert torch.equal(
        unbraid.load("hf://Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_5/layer1.sae.pt").encode(x), sae.encode(x)
    )


def test_a_scale_that_only_the_registry_knows_is_applied(listed, hub, x, tmp_path: Path):
    made = llama_scope_r1(tmp_path / "up", "float32")
    uploaded(hub, "fnlp/R1", made.place.parent)
    hub.repositories["fnlp/R1"] = {name: data for name, data in hub.repositories["fnlp/R1"].items()}
    sae = unbraid.load("r1/l5r")
    torch.testing.assert_close(sae(x).double(), made.run(x.double())[1], rtol=1e-5, atol=1e-4)


def test_what_the_registry_overrides_goes_before_the_files(listed, hub, x, tmp_path: Path):
    t = drawn("W_enc", "b_enc", "W_dec", "b_dec")
    folder = tmp_path / "up" / "mistral_7b_layer_8"
    folder.mkdir(parents=True)
    save_file(t, folder / "sae_weights.safetensors")
    config = {"d_in": D, "hook_point": "blocks.8.hook_resid_pre", "normalize_activations": "expected_average_only_in"}
    (folder / "cfg.json").write_text(json.dumps(config))
    uploaded(hub, "josh/mistral", folder.parent)
    sae = unbraid.load("mistral/layer_8")
    assert sae.metadata["model_from_pretrained_kwargs"] == {"fold_ln": True}
    assert sae.metadata["model_name"] == "mistral-7b"
    z = x.double() * D**0.5 / x.double().norm(dim=-1, keepdim=True)
    t = doubled(t)
    f = ((z - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
    torch.testing.assert_close(sae.encode(x).double(), f, rtol=1e-5, atol=1e-5)


def test_a_path_on_the_hub_needs_no_registry(hub, x, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "registry_path", lambda: None)
    monkeypatch.setattr(registry, "REGISTRY_ADDRESS", hub.endpoint + "/nowhere")
    t = drawn("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    folder = tmp_path / "up" / "resid_post" / "layer_3_width_16k_l0_big"
    folder.mkdir(parents=True)
    names = {"W_enc": "w_enc", "W_dec": "w_dec"}
    save_file({names.get(name, name): tensor for name, tensor in t.items()}, folder / "params.safetensors")
    uploaded(hub, "google/gemma-scope-2-1b-pt", tmp_path / "up")
    sae = unbraid.load("google/gemma-scope-2-1b-pt/resid_post/layer_3_width_16k_l0_big")
    f, _ = plain_form(t := doubled(t), lambda pre: jump(t, pre))(x.double())
    assert torch.equal(sae.encode(x) != 0, f != 0)
    unbraid.load("hf://google/gemma-scope-2-1b-pt@v1.0/resid_post/layer_3_width_16k_l0_big")
    assert any(request.endswith("gemma-scope-2-1b-pt/revision/v1.0") for request in hub.requests)
    assert sae.metadata["hook_name"] == "blocks.3.hook_resid_post"
    assert sae.metadata["model_name"] == "google/gemma-3-1b-pt"
    with pytest.raises(FormatError, match=r"registry .* cannot be downloaded .*pip install --no-deps sae-lens"):
        registry.search("gemma")


@pytest.fixture
def unlisted(hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """No registry on this machine; one where SAELens' repository would be."""
    monkeypatch.delenv("UNBRAID_REGISTRY", raising=False)
    monkeypatch.setenv("UNBRAID_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(registry, "REGISTRY_ADDRESS", hub.endpoint + "/owner/lens/resolve/main/list.yaml")
    hub.repositories["owner/lens"] = {"list.yaml": LIST.encode()}
    return hub


def fetched(hub) -> int:
    return sum(request.endswith("/list.yaml") for request in hub.requests)


def test_without_a_registry_it_is_downloaded_once(unlisted, x, tmp_path: Path, capsys):
    made = qwen_scope(tmp_path / "up", "float32")
    uploaded(unlisted, "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_5", made.place.parent)
    sae = unbraid.load("qwen/layer1")
    assert torch.equal(sae.encode(x) != 0, made.run(x.double())[0] != 0)
    assert registry.search("mistral") and fetched(unlisted) == 1
    unlisted.repositories["owner/lens"] = {"list.yaml": LIST.replace("mistral", "ministral").encode()}
    main(["search", "ministral", "--refresh"])
    assert "ministral/layer_8" in capsys.readouterr().out and fetched(unlisted) == 2


@pytest.mark.parametrize("content", [b"<html>", b"a: [", b"- 1", b"\xff\xfe\0", b""])
def test_a_download_that_is_no_registry_leaves_the_earlier_one(content: bytes, unlisted):
    registry.download()
    unlisted.repositories["owner/lens"] = {"list.yaml": content}
    with pytest.raises(FormatError, match="cannot be downloaded"):
        registry.download()
    assert registry.search("mistral")


def test_offline_no_registry_is_asked_for_and_hub_paths_say_so(unlisted, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FormatError, match=r"downloaded \(offline mode is on; unset HF_HUB_OFFLINE\)"):
        registry.search("gemma")
    with pytest.raises(FormatError, match=r"no folder 'some/where'.*as a path on the hub: .*as a name: .*offline") as e:
        unbraid.load("some/where")
    assert "\n" not in str(e.value) and not unlisted.requests


def test_a_list_that_would_not_be_read_is_not_downloaded(listed, hub):
    with pytest.raises(FormatError, match="a downloaded one would not be read"):
        registry.download()


def test_commands_take_names(hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (64, 96), "b_enc": (96,), "W_dec": (96, 64), "b_dec": (64,)}
    folder = tmp_path / "up" / "one"
    folder.mkdir(parents=True)
    save_file(
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()},
        folder / "sae_weights.safetensors",
    )
    hook = {"hook_name": "blocks.1.hook_resid_post", "model_name": "random:llama"}
    settings = {"architecture": "standard", "d_in": 64, "d_sae": 96, "apply_b_dec_to_input": True, "metadata": hook}
    (folder / "cfg.json").write_text(json.dumps(settings))
    uploaded(hub, "me/saes", folder.parent)
    name = "hf://me/saes/one"
    main(["export", name, "--to", "dictionary_learning", "--out", "out"])
    assert torch.equal(unbraid.load("out/me_saes_one").W_dec, unbraid.load(name).W_dec)
    main(["eval", name, "--suite", "geometry", "--controls", "false"])
    assert list(json.loads(Path("evaluations/me_saes_one/evaluation.json").read_text())["saes"]) == ["me_saes_one"]
    fm = unbraid.features(name)
    assert {one: str(fm.dictionaries[one].site) for one in fm.dictionaries} == {"me_saes_one": "resid_post.1"}


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("clt/layer_0", r"layout 'mntss_clt_layer_transcoder', which unbraid does not read: a layer of a cross-layer"),
        ("qwen/layer7", "such as qwen/layer1"),
        ("gemma-scope-2b-pt-res-canonical/layer_12/width_16k/canonica", "layer_12/width_16k/canonical"),
        ("hf://x", "no path on the hub"),
        ("hf://me/saes/../../etc", "leads out of the repository"),
    ],
)
def test_names_that_are_not_to_be_had_say_why(name, problem, listed, hub):
    with pytest.raises(FormatError, match=problem):
        unbraid.load(name)


def test_no_hub_and_a_damaged_registry_are_one_message(listed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(FormatError, match=r"cannot download 'layer1\.sae\.pt' of the repository"):
        unbraid.load("qwen/layer1")
    for content in ("a: [", "- 1", "\0"):
        listed.write_text(content)
        with pytest.raises(FormatError, match="pretrained_saes"):
            registry.search("x")
    listed.unlink()
    with pytest.raises(FormatError, match="cannot read the registry"):
        registry.search("x")


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("gemma 2b layer 12", ["gemma-scope-2b-pt-res-canonical/layer_12/width_16k/canonical"]),
        ("gemma 2b layer 1", ["gemma-scope-2b-pt-res-canonical/layer_1/width_16k/canonical"]),
        ("GEMMASCOPE-RES", ["gemma-scope-2b-pt-res-canonical/layer_12/width_16k/canonical"]),
        ("gemma-3 17", ["gemma-scope-2-4b-pt-att/layer_17"]),
        ("nothing at all", []),
    ],
)
def test_search_finds_every_word_and_whole_numbers(query, found, listed):
    assert [entry.name for entry in registry.search(query)] == found


def test_the_list_is_kept_in_a_form_that_is_read_at_once_and_read_again_when_it_changes(listed, monkeypatch):
    names = list(registry.registry())
    registry._read.cache_clear()
    monkeypatch.setattr(registry, "_parse", None)
    assert list(registry.registry()) == names
    monkeypatch.undo()
    monkeypatch.setenv("UNBRAID_REGISTRY", str(listed))
    monkeypatch.setenv("UNBRAID_CACHE", str(listed.parent / "cache"))
    for kept in (listed.parent / "cache").rglob("*.json"):
        kept.write_text('{"entries": [1]}')
    listed.write_text(LIST.replace("id: layer1,", "id: layer_one,"))
    registry._read.cache_clear()
    assert "qwen/layer_one" in registry.registry()


def test_search_on_the_command_line_lists_names_l0_and_neuronpedia(listed, capsys):
    main(["search", "gemma 2b layer 12"])
    out = capsys.readouterr().out
    for part in (
        "gemma-scope-2b-pt-res-canonical/layer_12/width_16k/canonical",
        "82",
        "gemma-2-2b/12-gemmascope-res-16k",
    ):
        assert part in out
    main(["search", "gemma", "--limit", "1"])
    assert "1 of 4 shown" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["search", "no such thing"])
    assert "nothing in the registry" in capsys.readouterr().err


def test_the_share_of_the_registry_that_is_read(listed):
    from registry_share import KINDS, passing, share

    assert share(set(KINDS)) == (6, 7)
    assert share(set()) == (0, 7)
    outcomes = {f"test_layout[{name}-{dtype}]": True for name in ("gemma_scope", "qwen_scope") for dtype in DTYPES}
    assert share(passing(outcomes)) == (3, 7)
    assert share(passing(outcomes | {"test_layout[gemma_scope-bfloat16]": False})) == (1, 7), "one that fails"
    del outcomes["test_layout[qwen_scope-float16]"]
    assert share(passing(outcomes)) == (2, 7), "one that is missing"
