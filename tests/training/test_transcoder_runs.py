"""Runs with transcoders: both ends read in one pass, exact resume, beside SAEs as alone, every command answers."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from stopped_runs import Stop, stop_at

import unbraid
from unbraid import recipes
from unbraid.activations.cache import harvest
from unbraid.activations.language_model import load_language_model
from unbraid.cli import main
from unbraid.config import EvaluationConfig, RunConfig, overridden, validated
from unbraid.errors import ConfigError
from unbraid.evaluation.core import CoreMeter
from unbraid.evaluation.splice import Together, preservation
from unbraid.evaluation.suites import run_suites
from unbraid.files import checksum
from unbraid.sites import Route

SITE, NAME = "mlp_in.1 -> mlp_out.1", "mlp_in.1--to--mlp_out.1"
CPU = torch.device("cpu")
QUICK = ["--control-tokens", "1024", "--meta-steps", "5", "--replicates", "4"]


def config(sites: list[str], skip: bool = True, **training) -> RunConfig:
    data = recipes.tiny().model_dump(mode="json")
    data["model"]["sites"] = sites
    if skip:
        data["sae"]["skip"] = True
    data["training"] |= {"tokens": 4_096, "batch_tokens": 128, "checkpoint_every": 4, "held_out_tokens": 512} | training
    data["variants"] = {"decorrelated": {}, "twin": {"decorrelation.lambda2": 0.0}}
    return validated(RunConfig, data, "test")


def weights(path: Path, name: str = f"{NAME}_twin") -> str:
    return checksum(path / "saes" / name / "sae_weights.safetensors")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run of a transcoder and an SAE."""
    return unbraid.train(config([SITE, "resid_post.0"]), tmp_path_factory.mktemp("run") / "run").path


def test_a_run_reads_both_ends_and_says_where_its_transcoder_belongs(run):
    summary = json.loads((run / "summary.json").read_text())["saes"]
    assert list(summary) == [f"{NAME}_decorrelated", f"{NAME}_twin", "resid_post.0_decorrelated", "resid_post.0_twin"]
    for metrics in summary.values():
        assert metrics["r2"] is not None and metrics["ce_loss_score"] is not None and metrics["l0"] > 0
    cfg = json.loads((run / "saes" / f"{NAME}_twin" / "cfg.json").read_text())
    assert cfg["architecture"] == "skip_transcoder" and cfg["d_out"] == cfg["d_in"] == 64
    hooks = [cfg["metadata"][key] for key in ("hook_name", "hook_name_out")]
    assert hooks == ["blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"]
    assert unbraid.load(run / "saes" / f"{NAME}_twin").is_transcoder


def test_r2_and_ce_score_are_those_of_the_mlps_output_replaced(run):
    """The summary's numbers again, from the exported folder and the model alone."""
    sae = unbraid.load(run / "saes" / f"{NAME}_twin")
    model = load_language_model(config([SITE]).model, CPU)
    tokens = torch.arange(3, 3 + 120).view(2, 60) % 90
    seen = {}
    with model.visiting(
        {"mlp_in.1": lambda x: seen.update(x=x.clone()), "mlp_out.1": lambda y: seen.update(y=y.clone())}
    ):
        intact = model.logits(tokens)
    keep_CT = torch.ones(2, 60, dtype=torch.bool)
    meter = CoreMeter(sae)
    meter.add(seen["x"], keep_CT, seen["y"])
    y_BM, y_hat_BM = seen["y"].flatten(0, 1).double(), sae(seen["x"]).flatten(0, 1).double()
    expected = 1 - (y_BM - y_hat_BM).square().sum() / (y_BM - y_BM.mean(0)).square().sum()
    found = meter.result().categories["reconstruction_quality"]["r2"]
    assert found == pytest.approx(float(expected), abs=1e-6)

    replaced = model.logits(tokens, "mlp_out.1", lambda y: sae(seen["x"]))
    wanted = torch.nn.functional.cross_entropy(replaced[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    scores = preservation(model, {Route.parse(SITE): {"one": sae}}, [(tokens, keep_CT)])["one"]
    got = scores["model_performance_preservation"]
    assert got["ce_loss_with_sae"] == pytest.approx(float(wanted), abs=1e-5)
    assert got["ce_loss_without_sae"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(intact[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())), abs=1e-5
    )


def test_replaced_together_each_reads_what_the_others_have_left(run, tmp_path):
    """Written out for a transcoder and an SAE below it; `eval` says the same of both, in a column of its own."""
    transcoder, below = (unbraid.load(run / "saes" / f"{name}_twin") for name in (NAME, "resid_post.0"))
    model, tokens = load_language_model(config([SITE]).model, CPU), torch.arange(3, 123).view(2, 60) % 90
    keep_CT = torch.ones(2, 60, dtype=torch.bool)
    seen = {}
    visits = {
        "resid_post.0": lambda x: below(x),
        "mlp_in.1": lambda x: seen.update(x=x.clone()),
        "mlp_out.1": lambda y: transcoder(seen["x"]),
    }
    with model.visiting(visits):
        wanted = torch.nn.functional.cross_entropy(model.logits(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    routes = (Route.parse(SITE), Route.parse("resid_post.0"))
    saes = {Together(routes): {"both": (transcoder, below)}, routes[0]: {"one": transcoder}}
    found = preservation(model, saes, [(tokens, keep_CT)])
    both, one = (found[name]["model_performance_preservation"]["ce_loss_with_sae"] for name in ("both", "one"))
    assert both == pytest.approx(float(wanted), abs=1e-5) and abs(both - one) > 1e-4

    settings, shown = EvaluationConfig(suites=["core"], tokens=1024, controls=False), io.StringIO()
    report = run_suites(run, settings, console=Console(file=shown, width=100), out=tmp_path / "out")["saes"]
    assert "CE all" in shown.getvalue()
    sets = {name: one["core"]["replaced_together"] for name, one in report.items()}
    assert sets[f"{NAME}_twin"] == sets["resid_post.0_twin"] != sets["resid_post.0_decorrelated"]
    assert sets[f"{NAME}_twin"]["dictionaries"] == 2 and sets[f"{NAME}_twin"]["ce_loss_score"] is not None


def test_a_killed_run_ends_with_the_bytes_of_one_that_was_not(tmp_path):
    whole = unbraid.train(config([SITE]), tmp_path / "whole").path
    with pytest.raises(Stop):
        unbraid.train(config([SITE]), tmp_path / "cut", callbacks=[stop_at(9)])
    unbraid.resume(tmp_path / "cut")
    for file in ("saes/{}/sae_weights.safetensors", "saes/{}/cfg.json"):
        for variant in ("decorrelated", "twin"):
            path = file.format(f"{NAME}_{variant}")
            assert (whole / path).read_bytes() == (tmp_path / "cut" / path).read_bytes(), path
    assert (whole / "metrics.jsonl").read_bytes() == (tmp_path / "cut" / "metrics.jsonl").read_bytes()


def test_beside_saes_a_transcoder_is_the_one_trained_alone_and_so_are_they(tmp_path):
    """SAEs at both ends read the same sites, so nothing about the rows differs."""
    both = unbraid.train(config([SITE, "mlp_in.1", "mlp_out.1"], skip=False), tmp_path / "both").path
    alone = unbraid.train(config([SITE], skip=False), tmp_path / "alone").path
    others = unbraid.train(config(["mlp_in.1", "mlp_out.1"], skip=False), tmp_path / "others").path
    assert weights(both) == weights(alone)
    for name in ("mlp_in.1_twin", "mlp_out.1_twin"):
        assert weights(both, name) == weights(others, name)
    settings, shown = EvaluationConfig(suites=["core"], tokens=512, controls=False), io.StringIO()
    report = run_suites(both, settings, console=Console(file=shown, width=200), out=tmp_path / "out")
    assert report["skipped"]["core at all sites of twin at once"] == "several of its dictionaries predict mlp_out.1"
    table, skipped = shown.getvalue().split("skipped", 1)
    assert " core at all sites of twin at once: several" in skipped and "CE all" not in table


def test_from_a_cache_the_same_transcoder(tmp_path, run):
    settings = config([SITE, "resid_post.0"])
    harvest(settings, tmp_path / "cache", CPU)
    cached = overridden(settings, {"cache": str(tmp_path / "cache")})[0]
    assert weights(unbraid.train(cached, tmp_path / "run").path) == weights(run)


def test_activations_of_ones_own_come_in_pairs_and_resume_needs_them_again(tmp_path):
    x_RD = torch.randn(6000, 12, generator=torch.Generator().manual_seed(0)) + 3
    y_RM = (x_RD @ torch.randn(12, 7, generator=torch.Generator().manual_seed(1))).numpy()
    np.save(tmp_path / "y.npy", y_RM)
    given = {"x -> y": (x_RD, np.load(tmp_path / "y.npy", mmap_mode="r")), "x": x_RD}
    settings = config(["resid_post.0"], skip=False)
    whole = unbraid.train(settings, tmp_path / "whole", activations=given)
    assert list(whole.saes) == ["x--to--y_decorrelated", "x--to--y_twin", "x_decorrelated", "x_twin"]
    assert (whole.saes["x--to--y_twin"].d_in, whole.saes["x--to--y_twin"].d_out) == (12, 7)
    with pytest.raises(Stop):
        unbraid.train(settings, tmp_path / "cut", activations=given, callbacks=[stop_at(9)])
    with pytest.raises(ConfigError, match="handed in"):
        unbraid.resume(tmp_path / "cut")
    unbraid.resume(tmp_path / "cut", activations=given)
    assert weights(whole.path, "x--to--y_twin") == weights(tmp_path / "cut", "x--to--y_twin")


def test_every_command_answers_for_a_run_with_a_transcoder(run, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for words in (
        ["eval", str(run), "--suites", "core,correlation,geometry", "--tokens", "1024", *QUICK],
        ["figure", str(run)],
        ["compare", str(run)],
        ["dashboard", str(run), "--tokens", "2048"],
        ["read", str(run), "bare tade"],
        ["feature", str(run), f"{NAME}_twin/3"],
        ["export", str(run), "--to", "sae_lens", "--out", "out"],
    ):
        main(words)
    said = capsys.readouterr().out
    assert SITE in said
    report = json.loads((run / "evaluation.json").read_text())
    assert report["saes"][f"{NAME}_twin"]["site"] == SITE
    assert 0 <= report["saes"][f"{NAME}_twin"]["core"]["sparsity"]["l0"] < 128
    assert "transcoder" in report["skipped"][f"controls of {NAME}_twin"]
    assert (run / "report" / "index.html").is_file()


def test_what_predicts_an_earlier_site_has_no_ce_score(tmp_path):
    run = unbraid.train(config(["resid_post.1 -> resid_post.0"], skip=False), tmp_path / "run")
    for metrics in run.summary["saes"].values():
        assert metrics["ce_loss_score"] is None and metrics["r2"] is not None


def test_sites_that_cannot_be_trained_are_refused_in_a_sentence():
    for site, words in {
        "mlp_in.1 -> mlp_in.1": "the same two ends",
        "mlp_in.1 -> mlp_out.1 -> resid_post.1": "has 3 ends",
        "resid_post.0 + resid_post.0": "names a site twice",
        "mlp_in.1 -> nowhere.1": "is not understood",
    }.items():
        with pytest.raises(ConfigError, match=words):
            overridden(recipes.tiny(), {"model.sites": [site]})
    with pytest.raises(ConfigError, match=r"is read only while model\.sites is a list with a transcoder"):
        overridden(recipes.tiny(), {"sae.skip": True})
