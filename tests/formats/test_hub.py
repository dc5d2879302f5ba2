"""The hub, as a stand-in on loopback: what goes up comes down again, with a card that says what it is."""

import io
import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from published_fixtures import gemma_scope_2, goodfire, llama_scope
from rich.console import Console
from sae_samples import make_sae
from stand_in_hub import stand_in_hub

from unbraid import formats
from unbraid.errors import FormatError, UnbraidError
from unbraid.formats.hub import from_hub, push_to_hub

NAMES = ("resid_post.3_decorrelated", "resid_post.3_twin")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    with stand_in_hub() as hub:
        yield hub


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    for seed, name in enumerate(NAMES):
        metadata = {"model_name": "google/gemma-2-2b", "hook_name": "blocks.3.hook_resid_post"}
        formats.save(
            make_sae("topk", seed=seed), run / "saes" / name, metadata=metadata, frequency_N=torch.full((40,), 0.1)
        )
    (run / "config.json").write_text('{"name": "tiny"}')
    (run / "summary.json").write_text(json.dumps({"saes": {name: {"r2": 0.87654, "l0": 5.0} for name in NAMES}}))
    (run / "figures").mkdir()
    (run / "figures" / "figure1.png").write_bytes(b"png")
    return run


def test_a_run_goes_up_with_its_card_and_each_sae_comes_down_as_it_was(hub, run: Path, tmp_path: Path, x):
    address = push_to_hub(run, "me/saes", token="hf_secret", endpoint=hub.endpoint)
    assert address.startswith(f"{hub.endpoint}/me/saes/commit/")
    files = hub.repositories["me/saes"]
    assert set(files) == {"README.md", "config.json", "summary.json", "figures/figure1.png"} | {
        f"{name}/{file}" for name in NAMES for file in ("cfg.json", "sae_weights.safetensors", "sparsity.safetensors")
    }
    assert "Bearer hf_secret" in hub.tokens
    for seed, name in enumerate(NAMES):
        found = from_hub("me/saes", name, endpoint=hub.endpoint, cache=tmp_path / "cache")
        assert torch.equal(found.sae.encode(x), make_sae("topk", seed=seed).encode(x))
        assert found.metadata["model_name"] == "google/gemma-2-2b"
        torch.testing.assert_close(found.log10_frequency_N, torch.full((40,), -1.0))


def test_the_card_says_what_the_saes_are_how_good_they_are_and_how_to_load_them(hub, run: Path):
    push_to_hub(run, "me/saes", endpoint=hub.endpoint)
    card = hub.repositories["me/saes"]["README.md"].decode()
    for expected in (
        'base_model: "google/gemma-2-2b"',
        "![Training: threshold, correlations, updates, loss](figures/figure1.png)",
        'from_hub("me/saes", "resid_post.3_decorrelated")',
        'SAE.from_pretrained(release="me/saes", sae_id="resid_post.3_decorrelated")',
        "| `resid_post.3_twin` | topk | 40 | `blocks.3.hook_resid_post` | 0.8765 | 5 |",
    ):
        assert expected in card


def test_a_second_push_goes_into_the_same_repository(hub, run: Path):
    push_to_hub(run, "me/saes", endpoint=hub.endpoint)
    push_to_hub(run / "saes" / NAMES[0], "me/saes", endpoint=hub.endpoint)
    assert list(hub.repositories) == ["me/saes"]


def test_a_repository_with_one_sae_needs_no_name_and_one_with_several_lists_them(hub, run: Path, tmp_path: Path):
    push_to_hub(run / "saes" / NAMES[1], "me/one", endpoint=hub.endpoint)
    assert from_hub("me/one", endpoint=hub.endpoint, cache=tmp_path).sae.architecture == "topk"
    push_to_hub(run, "me/two", endpoint=hub.endpoint)
    with pytest.raises(FormatError, match=r"no SAE was named.*resid_post\.3_decorrelated"):
        from_hub("me/two", endpoint=hub.endpoint, cache=tmp_path)
    with pytest.raises(FormatError, match=r"no SAE 'x'"):
        from_hub("me/two", "x", endpoint=hub.endpoint, cache=tmp_path)


def test_layouts_of_other_libraries_come_down_by_folder_and_by_file(hub, tmp_path: Path, x):
    for make in (llama_scope, goodfire, gemma_scope_2):
        made = make(tmp_path / make.__name__ / "up", "float32")
        root = made.place.parent
        files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        hub.repositories["me/other"] = files | {"optimiser.pt": b"x"}
        found = from_hub("me/other", str(made.place.relative_to(root)), endpoint=hub.endpoint, cache=tmp_path / "cache")
        assert torch.equal(found.sae.encode(x) != 0, made.run(x.double())[0] != 0)
    assert not any("optimiser" in request for request in hub.requests)


def test_a_refusal_a_missing_repository_and_offline_mode_end_in_one_message(hub, run, tmp_path, monkeypatch):
    with pytest.raises(FormatError, match="me/none"):
        from_hub("me/none", endpoint=hub.endpoint, cache=tmp_path)
    hub.denied = True
    with pytest.raises(FormatError, match="hf auth login"):
        push_to_hub(run, "me/saes", endpoint=hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FormatError, match="offline"):
        from_hub("me/saes", endpoint=hub.endpoint, cache=tmp_path)


def test_what_goes_up_says_nothing_of_where_things_lie_on_this_machine(hub, run: Path, tmp_path: Path):
    local = tmp_path / "private" / "model"
    local.mkdir(parents=True)
    settings = {
        "cache": "~/cache",
        "model": {"name": str(local)},
        "text": {"paths": ["../mine/a.txt", "C:\\Users\\me\\b.txt"]},
    }
    (run / "config.json").write_text(json.dumps(settings | {"text_column": "text", "hub": "google/gemma-2-2b"}))
    for name in NAMES:
        config = json.loads((run / "saes" / name / "cfg.json").read_text())
        config["metadata"]["model_name"] = str(local)
        (run / "saes" / name / "cfg.json").write_text(json.dumps(config))
    push_to_hub(run, "me/saes", endpoint=hub.endpoint)
    files = hub.repositories["me/saes"]
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
    assert json.loads(files["config.json"]) == {
        "cache": "cache",
        "model": {"name": "model"},
        "text": {"paths": ["a.txt", "b.txt"]},
        "text_column": "text",
        "hub": "google/gemma-2-2b",
    }


@pytest.mark.parametrize("name", ["config.json", "summary.json", "figures/figure1.png", "figures", f"saes/{NAMES[0]}"])
def test_nothing_goes_up_through_a_link(hub, run: Path, tmp_path: Path, name: str):
    (run / name).rename(tmp_path / "private")
    (run / name).symlink_to(tmp_path / "private")
    with pytest.raises(UnbraidError, match="symbolic link"):
        push_to_hub(run, "me/saes", endpoint=hub.endpoint)
    assert not hub.repositories.get("me/saes")


def test_an_upload_shows_how_far_it_is(hub, run):
    said = io.StringIO()
    push_to_hub(run, "me/saes", endpoint=hub.endpoint, console=Console(file=said, width=200))
    (line,) = said.getvalue().splitlines()
    assert re.match(r"uploading to me/saes: ([\d,]+) of \1 kB", line), line
