"""The dictionary that comes with unbraid: by name everywhere, with maxima and contexts, and without text of others."""

import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import unbraid
from unbraid.activations.packaged_model import find_packaged_model
from unbraid.bundled import BUNDLED, bundled_folder
from unbraid.cli import main
from unbraid.completion import command_words
from unbraid.errors import FeatureError, TextError
from unbraid.feature_model import stored_held_out
from unbraid.feature_model.stored_held_out import FILE, load_held_out
from unbraid.formats import open_folder, path_or_name
from unbraid.text.packaged import find_packaged_corpus

NAME = "smollm2-demo"
LARGEST_BYTES = 12_000_000
packages = pytest.mark.skipif(
    find_packaged_model() is None or None in dict(find_packaged_corpus()).values(),
    reason="the packaged model and text are not installed",
)


def quiet() -> Console:
    return Console(file=io.StringIO())


def test_it_is_loaded_by_name_in_float32_and_says_where_it_belongs():
    sae = unbraid.load(NAME)
    assert tuple(sae.W_dec.shape) == (4608, 576) and sae.W_dec.dtype == torch.float32
    assert sae.metadata["model_name"] == "packaged:smollm2"
    assert sae.metadata["hook_name"] == "blocks.3.hook_resid_post" and sae.metadata["norm_limit"] == 3.0
    assert sae.metadata["training_tokens"] >= 7_000_000
    found = open_folder(NAME)
    assert found.layout == "sae_lens" and found.log10_frequency_N is not None


def test_the_folder_is_small_and_holds_a_card_and_no_text():
    folder = bundled_folder(NAME)
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert names == {"README.md", "cfg.json", "sae_weights.safetensors", "sparsity.safetensors", FILE}
    assert sum(path.stat().st_size for path in folder.iterdir()) <= LARGEST_BYTES
    card = (folder / "README.md").read_text()
    assert all(words in card for words in ("cross-entropy score", "R²", "L0", "study/dictionary.py"))
    assert "{" not in card, "every number of the template was filled in"
    with np.load(folder / FILE, allow_pickle=False) as file:
        assert {array.dtype.kind for array in map(file.__getitem__, file.files)} <= set("iuf"), "numbers only"


def test_a_folder_of_that_name_here_goes_before_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert path_or_name(NAME) == NAME
    shutil.copytree(bundled_folder(NAME), tmp_path / NAME)
    assert path_or_name(NAME) == Path(NAME)


def test_search_finds_it_without_a_list_of_published_dictionaries(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("UNBRAID_REGISTRY", str(tmp_path / "none.yaml"))
    main(["search", "smollm2 layer 3"])
    assert capsys.readouterr().out.split()[0] == NAME


def test_completion_offers_it_where_a_name_may_stand():
    table = command_words()
    for command in ("eval", "read", "feature", "steer", "attribute", "live", "export", "compare"):
        assert set(BUNDLED) <= set(table[command].words), command


@packages
def test_features_work_at_once_and_contexts_show_the_codes_of_their_text(capsys):
    fm = unbraid.features(NAME, console=quiet())
    fired_N = (fm.held_out.maxima[NAME] > 0).sum()
    assert fired_N > 0.97 * 4608
    codes = fm.held_out.seen.codes[NAME]
    counts = np.diff(codes.indptr)
    index = int(np.argsort(-counts)[500])
    address = f"{NAME}/{index}"
    shown = fm.contexts(address, k=4)
    assert len(shown) == 4 and shown.fires == counts[index]
    assert shown.largest <= (fm.held_out.maximum(fm.feature(address)) or 0.0) * (1 + 1e-6)
    # The stored codes are those of the model: the same text read again fires as strongly.
    best = int(codes.indices[codes.indptr[index] : codes.indptr[index + 1]][0])
    context, position = int(fm.held_out.seen.context_R[best]), int(fm.held_out.seen.position_R[best])
    read = fm.read(torch.from_numpy(fm.held_out.seen.tokens_CT[context]))
    code = float(read.code(NAME, index)[0, position])
    assert code == pytest.approx(codes[best, index], rel=0.02, abs=0.01 * shown.largest)
    assert fm.pairs(address).rows


@packages
def test_where_a_document_is_missing_its_rows_are_left_out_and_said(monkeypatch):
    tokenizer = unbraid.features(NAME, console=quiet()).tokenizer
    texts, domains = stored_held_out.corpus_texts()
    whole = load_held_out(bundled_folder(NAME) / FILE, NAME, tokenizer, quiet())
    monkeypatch.setattr(stored_held_out, "corpus_texts", lambda: (texts[: len(texts) // 2], domains))
    console = Console(file=(said := io.StringIO()))
    part = load_held_out(bundled_folder(NAME) / FILE, NAME, tokenizer, console)
    assert "are not installed here" in said.getvalue()
    assert 0 < len(part.seen.context_R) < len(whole.seen.context_R)
    assert part.seen.codes[NAME].shape == (len(part.seen.context_R), 4608)
    assert np.array_equal(part.maxima[NAME], whole.maxima[NAME])

    def none():
        raise TextError("sae-probes is not installed")

    monkeypatch.setattr(stored_held_out, "corpus_texts", none)
    console = Console(file=(said := io.StringIO()))
    empty = load_held_out(bundled_folder(NAME) / FILE, NAME, tokenizer, console)
    assert len(empty.seen.context_R) == 0 and np.array_equal(empty.maxima[NAME], whole.maxima[NAME])
    assert "maxima are there, but no contexts" in said.getvalue()


def test_a_damaged_file_is_refused_in_one_message(tmp_path):
    path = tmp_path / FILE
    path.write_bytes(b"PK")
    with pytest.raises(FeatureError, match=r"held_out\.npz.*is damaged"):
        load_held_out(path, NAME, None, quiet())
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("version.npy", b"")
    with pytest.raises(FeatureError, match=r"is damaged"):
        load_held_out(path, NAME, None, quiet())
    assert json.loads((bundled_folder(NAME) / "cfg.json").read_text())["d_sae"] == 4608
