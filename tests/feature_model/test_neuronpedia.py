"""Features as SAEDashboard's JSON: its fields, our numbers, the same bytes each time, nobody else's files replaced."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from feature_models import random_feature_model, random_sae

import unbraid
from unbraid import cli
from unbraid.config import RunConfig, TextConfig
from unbraid.errors import FormatError
from unbraid.feature_model import neuronpedia
from unbraid.feature_model.neuronpedia import export_neuronpedia

BATCH = ["model_id", "layer", "sae_set", "sae_id_suffix", "features"]
FEATURE = [
    "feature_index",
    *(f"neuron_alignment_{part}" for part in ("indices", "values", "l1")),
    *(f"correlated_{what}_{part}" for what in ("neurons", "features") for part in ("indices", "l1", "pearson")),
    *("neg_str", "neg_values", "pos_str", "pos_values", "frac_nonzero"),
    *("freq_hist_data_bar_values", "freq_hist_data_bar_heights"),
    *("logits_hist_data_bar_heights", "logits_hist_data_bar_values"),
    *("n_prompts_total", "n_tokens_in_prompt", "dataset", "decoder_weights_dist", "vector", "activations"),
]
ACTIVATION = ["bin_min", "bin_max", "bin_contains", "tokens", "values", "qualifying_token_index"]
SKIPPED = ["model_id", "layer", "sae_set", "log_sparsity", "skipped_indexes"]


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exported")
    cli.main(["export", str(run.path), "--to", "neuronpedia", "--out", str(out), "--tokens", "2000"])
    return out


def read(path: Path):
    text = path.read_bytes().decode("ascii")
    return json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} in {path.name}"))


def test_every_field_that_the_layout_has_is_there_and_no_other(run, exported):
    assert sorted(path.name for path in exported.iterdir()) == sorted(run.saes)
    for name in run.saes:
        batch, skipped = (read(exported / name / f"{file}.json") for file in ("batch-0", "skipped_indexes"))
        assert sorted(batch) == sorted(BATCH) and sorted(skipped) == sorted(SKIPPED)
        assert batch["features"] and isinstance(batch["layer"], int) and isinstance(skipped["layer"], str)
        for feature in batch["features"]:
            assert sorted(feature) == sorted(FEATURE)
            assert all(sorted(one) == sorted(ACTIVATION) for one in feature["activations"])
        shown = [feature["feature_index"] for feature in batch["features"]]
        assert sorted(shown + skipped["skipped_indexes"]) == list(range(run.saes[name].n_features))
        assert read(exported / name / "run_settings.json")["layer"] == batch["layer"] == int(skipped["layer"])
    first = read(exported / "resid_post.1_twin" / "batch-0.json")
    assert (first["model_id"], first["layer"], first["sae_set"]) == ("llama", 1, "resid-post-twin")


def test_numbers_are_those_of_the_features_with_decoder_rows_scaled_to_one(run, exported):
    name = "resid_post.1_decorrelated"
    fm = unbraid.features(run, tokens=2000)
    rows, held_out = len(fm.held_out.seen.context_R), fm.held_out
    W_dec = fm.dictionaries[name].W_dec
    for feature in read(exported / name / "batch-0.json")["features"][:20]:
        index = feature["feature_index"]
        address, norm = f"{name}/{index}", float(W_dec[index].norm())
        codes = held_out.firing(fm.feature(address)).values * norm
        assert feature["frac_nonzero"] == pytest.approx(len(codes) / rows, abs=1e-5)
        assert sum(feature["freq_hist_data_bar_heights"]) == len(codes)
        assert sum(feature["logits_hist_data_bar_heights"]) == fm.hf_model.get_input_embeddings().weight.shape[0]
        lens = fm.lens(address, k=10).rows
        words = zip(feature["pos_str"], (row["raised"] for row in lens), strict=True)
        assert all(word == raised or ("⟨" in word and "\ufffd" in raised) for word, raised in words)
        assert feature["neg_values"] == pytest.approx([row["by "] / norm for row in lens], abs=2e-3)
        top = [one for one in feature["activations"] if one["bin_contains"] == -1]
        theirs = fm.contexts(address, k=20)
        assert len(top) == len(theirs)
        for one, context in zip(top, theirs.items, strict=True):
            assert (one["bin_min"], one["bin_max"]) == (-1, pytest.approx(codes.max(), abs=1e-3))
            assert one["values"][one["qualifying_token_index"]] == pytest.approx(context.codes.max() * norm, abs=1e-3)
            assert "".join(context.tokens).removeprefix("<bos>") in "".join(one["tokens"])
            assert len(one["tokens"]) == len(one["values"]) == feature["n_tokens_in_prompt"] - 1


def test_intervals_go_from_the_highest_down_and_hold_what_they_say(run, exported):
    for feature in read(exported / "resid_post.0_twin" / "batch-0.json")["features"]:
        intervals = [one for one in feature["activations"] if one["bin_contains"] != -1]
        assert [one["bin_max"] for one in intervals] == sorted((one["bin_max"] for one in intervals), reverse=True)
        for one in intervals:
            assert one["bin_min"] - 2e-3 <= one["values"][one["qualifying_token_index"]] <= one["bin_max"] + 2e-3
            assert 0 < one["bin_contains"] <= 1


def test_correlated_features_are_the_largest_pearson_correlations(run, exported):
    name = "resid_post.0_twin"
    codes = unbraid.features(run, tokens=2000).held_out.seen.codes[name].toarray()
    for feature in read(exported / name / "batch-0.json")["features"][:10]:
        index = feature["feature_index"]
        alive = codes.std(axis=0) > 0
        pearson = np.full(codes.shape[1], -np.inf)
        pearson[alive] = np.corrcoef(codes[:, alive].T)[int(alive[:index].sum())]
        pearson[index] = -np.inf
        assert feature["correlated_features_pearson"] == pytest.approx(np.sort(pearson)[:-4:-1], abs=1e-3)
        assert [pearson[other] for other in feature["correlated_features_indices"]] == pytest.approx(
            feature["correlated_features_pearson"], abs=1e-3
        )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_run_gives_the_same_bytes(run, exported, tmp_path: Path):
    export_neuronpedia(run.path, tmp_path, tokens=2000)
    assert contents(tmp_path) == contents(exported)


@pytest.mark.parametrize("nasty", ['"quoted" \\ back', "</script>\u2028line", "emoji 🙂 \x00 nul", "naïve 中文"])
def test_whatever_a_text_holds_comes_back_from_plain_ascii(nasty: str, tmp_path: Path):
    fm = random_feature_model(saes={"resid_post.0": random_sae(0)}, text=[f"mima {nasty} mima"])
    (folder,) = export_neuronpedia(fm, tmp_path)
    features = read(folder / "batch-0.json")["features"]
    texts = {"".join(one["tokens"]) for feature in features for one in feature["activations"]}
    assert texts == {f"mima {nasty} mima"}


def test_a_site_that_the_unembedding_does_not_read_has_no_logits(tmp_path: Path):
    sae = random_sae(0)
    sae.W_dec = torch.nn.Parameter(torch.randn(96, 64), requires_grad=False)
    fm = random_feature_model(saes={"attn_out.1": sae}, text=["mima zuka"])
    fm.hf_model.get_output_embeddings = lambda: None  # pyright: ignore
    (folder,) = export_neuronpedia(fm, tmp_path, set_name="att-16k")
    batch = read(folder / "batch-0.json")
    assert batch["features"][0]["pos_str"] == batch["features"][0]["logits_hist_data_bar_heights"] == []
    assert (batch["layer"], batch["sae_set"], batch["sae_id_suffix"]) == (1, "att-16k", None)


def test_only_our_own_earlier_export_is_replaced_and_only_when_asked(run, exported, tmp_path: Path):
    with pytest.raises(FormatError, match=r"holds a Neuronpedia already; .*--overwrite"):
        export_neuronpedia(run.path, exported, tokens=2000)
    before = contents(exported)
    export_neuronpedia(run.path, exported, tokens=2000, overwrite=True)
    assert contents(exported) == before
    name = sorted(run.saes)[-1]
    (tmp_path / name).mkdir()
    (tmp_path / name / "batch-0.json").write_text("mine")
    with pytest.raises(FormatError, match=r"holds batch-0\.json, which unbraid did not write"):
        export_neuronpedia(run.path, tmp_path, tokens=2000, overwrite=True)
    assert contents(tmp_path) == {f"{name}/batch-0.json": b"mine"}


@pytest.mark.parametrize(("dataset", "named"), [("a/b", "a/b"), ("/home/me/texts", "")])
def test_the_hubs_data_set_is_named_and_a_place_on_this_machine_is_not(dataset: str, named: str, tmp_path: Path):
    config = RunConfig(text=TextConfig(source="hub", dataset=dataset))
    (tmp_path / "config.json").write_text(config.model_dump_json())
    (tmp_path / "saes" / "one").mkdir(parents=True)
    assert neuronpedia._dataset(tmp_path) == neuronpedia._dataset(str(tmp_path / "saes" / "one")) == named
    assert neuronpedia._dataset("smollm2-demo") == ""


def test_what_cannot_be_filed_there_is_said(run, tmp_path: Path, capsys):
    with pytest.raises(FormatError, match="tokens is 0; expected at least 1"):
        export_neuronpedia(run.path, tmp_path, tokens=0)
    with pytest.raises(FormatError, match="set name 'a/b'; expected letters"):
        export_neuronpedia(run.path, tmp_path, set_name="a/b")
    with pytest.raises(FormatError, match=r"stands at embed, which is in no layer; expected a site such as"):
        export_neuronpedia(random_feature_model(saes={"embed": random_sae(0)}), tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["export", str(run.path), "--to", "sparsify", "--out", str(tmp_path / "x"), "--tokens", "5"])
    assert "--tokens is read with --to neuronpedia only" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.peers
def test_sae_dashboard_reads_it_back_as_it_is(exported):
    reason = "sae-dashboard, from `make test-peers`"
    theirs = pytest.importorskip("sae_dashboard.neuronpedia.neuronpedia_dashboard", reason=reason)
    for path in exported.glob("*/batch-*.json"):
        assert theirs.NeuronpediaDashboardBatch(**read(path)).to_dict() == read(path)
