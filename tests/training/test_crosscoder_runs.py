"""Runs with dictionaries of several sites: numbers by site, exact resume, from a cache, and every command."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from stopped_runs import Stop, stop_at
from torch.nn import functional as F

import unbraid
from unbraid import recipes
from unbraid.activations.cache import harvest
from unbraid.activations.language_model import load_language_model
from unbraid.cli import main
from unbraid.config import RunConfig, SAEConfig, overridden, validated
from unbraid.errors import ConfigError
from unbraid.evaluation.splice import preservation
from unbraid.files import checksum
from unbraid.formats import save
from unbraid.sae.build import build
from unbraid.sites import Route

CROSS, CROSS_NAME = "resid_post.0 + resid_post.1", "resid_post.0--and--resid_post.1"
LAYER, LAYER_NAME = "mlp_in.0 -> mlp_out.0 + mlp_out.1", "mlp_in.0--to--mlp_out.0--and--mlp_out.1"
WHOLE, WHOLE_NAME = (
    "mlp_in.0 + mlp_in.1 -> mlp_out.0 + mlp_out.1",
    "mlp_in.0--and--mlp_in.1--to--mlp_out.0--and--mlp_out.1",
)
CPU = torch.device("cpu")
QUICK = ["--control-tokens", "1024", "--meta-steps", "5", "--replicates", "4"]


def config(*sites: str) -> RunConfig:
    data = recipes.tiny().model_dump(mode="json")
    data["model"]["sites"] = list(sites)
    data["sae"] = {"architecture": "batch_topk", "n_features": 128, "k": 8}
    del data["optimiser"]["sparsity_warmup_steps"]
    data["training"] |= {"tokens": 4_096, "batch_tokens": 128, "checkpoint_every": 8, "held_out_tokens": 512}
    data["variants"] = {"decorrelated": {}, "twin": {"decorrelation.lambda2": 0.0}}
    return validated(RunConfig, data, "test")


def weights(path: Path, name: str) -> str:
    return checksum(path / "saes" / name / "sae_weights.safetensors")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return unbraid.train(config(CROSS, LAYER, "resid_post.0"), tmp_path_factory.mktemp("run") / "run").path


def test_a_run_says_how_well_each_site_is_predicted_and_where_its_dictionaries_belong(run):
    summary = json.loads((run / "summary.json").read_text())["saes"]
    assert list(summary)[::2] == [
        f"{CROSS_NAME}_decorrelated",
        f"{LAYER_NAME}_decorrelated",
        "resid_post.0_decorrelated",
    ]
    for name, sites in ((CROSS_NAME, ["resid_post.0", "resid_post.1"]), (LAYER_NAME, ["mlp_out.0", "mlp_out.1"])):
        found = summary[f"{name}_twin"]
        assert list(found["r2_by_site"]) == sites
        assert min(found["r2_by_site"].values()) < found["r2"] < max(found["r2_by_site"].values())
    assert "r2_by_site" not in summary["resid_post.0_twin"]
    crosscoder = unbraid.load(run / "saes" / f"{CROSS_NAME}_twin")
    assert crosscoder.metadata["hook_name"] == "blocks.0.hook_resid_post + blocks.1.hook_resid_post"
    assert [tuple(rows.shape) for rows in crosscoder.by_site(crosscoder.W_dec)] == [(128, 64)] * 2
    layer = unbraid.load(run / "saes" / f"{LAYER_NAME}_twin")
    assert layer.is_transcoder and (layer.d_in, layer.d_out) == (64, 128)


@pytest.mark.parametrize(("site", "name"), [(CROSS, CROSS_NAME), (LAYER, LAYER_NAME)])
def test_the_ce_score_is_that_of_all_predicted_sites_replaced_from_the_intact_models_activations(run, site, name):
    sae, route = unbraid.load(run / "saes" / f"{name}_twin"), Route.parse(site)
    model = load_language_model(config(site).model, CPU)
    tokens = torch.arange(3, 63).view(1, 60)
    keep_CT = torch.ones(1, 60, dtype=torch.bool)
    keep_CT[:, :2] = False
    seen = dict(zip(model.sites, model.activations(tokens), strict=True))
    parts = dict(zip(route.outputs, sae.by_site(sae(torch.cat([seen[one] for one in route.inputs], -1))), strict=True))

    def put(one):
        return lambda y: torch.cat([y[:, :2], parts[one][:, 2:]], 1)

    with model.visiting({one: put(one) for one in route.outputs}):
        logits = model.logits(tokens)
    wanted = F.cross_entropy(logits[0, 2:-1], tokens[0, 3:])
    scores = preservation(model, {route: {"one": sae}}, [(tokens, keep_CT)])["one"]["model_performance_preservation"]
    assert scores["ce_loss_with_sae"] == pytest.approx(float(wanted), abs=1e-5)
    with model.visiting(dict.fromkeys(route.outputs, torch.zeros_like)):
        nothing = F.cross_entropy(model.logits(tokens)[0, 2:-1], tokens[0, 3:])
    assert scores["ce_loss_with_ablation"] == pytest.approx(float(nothing), abs=1e-5)


def test_a_killed_run_ends_with_the_bytes_of_one_that_was_not(tmp_path):
    whole = unbraid.train(config(CROSS, LAYER), tmp_path / "whole").path
    with pytest.raises(Stop):
        unbraid.train(config(CROSS, LAYER), tmp_path / "cut", callbacks=[stop_at(9)])
    unbraid.resume(tmp_path / "cut")
    for name in (CROSS_NAME, LAYER_NAME):
        assert weights(whole, f"{name}_decorrelated") == weights(tmp_path / "cut", f"{name}_decorrelated")
    assert (whole / "metrics.jsonl").read_bytes() == (tmp_path / "cut" / "metrics.jsonl").read_bytes()


def test_a_whole_cross_layer_transcoder_resumes_exactly_and_goes_to_circuit_tracer_and_back(tmp_path, capsys):
    settings, _ = overridden(config(WHOLE, "resid_post.0"), {"sae.cross_layer": True})
    with pytest.raises(Stop):
        unbraid.train(settings, tmp_path / "cut", callbacks=[stop_at(9)])
    unbraid.resume(tmp_path / "cut")
    run = unbraid.train(settings, tmp_path / "whole").path
    assert weights(run, f"{WHOLE_NAME}_decorrelated") == weights(tmp_path / "cut", f"{WHOLE_NAME}_decorrelated")
    ours = unbraid.load(run / "saes" / f"{WHOLE_NAME}_twin")
    assert not ours.W_enc[64:, :64].any() and not ours.W_enc[:64, 64:].any() and not ours.W_dec[64:, :64].any()
    summary = json.loads((run / "summary.json").read_text())["saes"][f"{WHOLE_NAME}_twin"]
    assert list(summary["r2_by_site"]) == ["mlp_out.0", "mlp_out.1"]

    for refused in (run, run / "saes" / "resid_post.0_twin"):
        with pytest.raises(SystemExit):
            main(["export", str(refused), "--to", "circuit-tracer", "--out", str(tmp_path / "clt")])
        assert (
            "expected one cross-layer transcoder" if refused == run else "resid_post.0_twin"
        ) in capsys.readouterr().err
    main(["export", str(run / "saes" / f"{WHOLE_NAME}_twin"), "--to", "circuit-tracer", "--out", str(tmp_path / "clt")])
    theirs = unbraid.load(tmp_path / "clt")
    assert theirs.metadata["hook_names_out"] == ["blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"]
    x_RD = torch.randn(50, 128, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(theirs.encode(x_RD.view(50, 2, 64)), ours.encode(x_RD), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(theirs(x_RD.view(50, 2, 64)).flatten(1), ours(x_RD), rtol=1e-5, atol=1e-5)


def test_from_a_cache_the_same_dictionaries(tmp_path, run):
    settings = config(CROSS, LAYER, "resid_post.0")
    harvest(settings, tmp_path / "cache", CPU)
    cached = unbraid.train(overridden(settings, {"cache": str(tmp_path / "cache")})[0], tmp_path / "cached").path
    for name in ("resid_post.0_twin", f"{LAYER_NAME}_twin", f"{CROSS_NAME}_twin"):
        assert weights(cached, name) == weights(run, name)


def test_every_command_answers_or_says_that_it_wants_one_site(run, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for words in (
        ["figure", str(run)],
        ["compare", str(run)],
        ["dashboard", str(run), "--tokens", "2048"],
        ["eval", str(run), "--suites", "core,correlation,geometry", "--tokens", "1024", *QUICK],
    ):
        main(words)
    said = capsys.readouterr().out
    assert CROSS in said and LAYER in said
    assert (run / "report" / "index.html").is_file()
    report = json.loads((run / "evaluation.json").read_text())
    summary = json.loads((run / "summary.json").read_text())["saes"]
    for site, name in ((CROSS, f"{CROSS_NAME}_twin"), (LAYER, f"{LAYER_NAME}_twin")):
        found = report["saes"][name]
        assert found["site"] == site and "crosscoder" in report["skipped"][f"controls of {name}"]
        assert found["core"]["sparsity"]["l0"] == pytest.approx(summary[name]["l0"], rel=0.1)
        assert 0 < found["core"]["model_performance_preservation"]["ce_loss_with_sae"] < 20
    for words in (["read", str(run), "bare tade"], ["steer", str(run), "bare", f"{CROSS_NAME}_twin/3=+1"]):
        with pytest.raises(SystemExit):
            main(words)
        assert "stands on several sites" in capsys.readouterr().err
    for name, words in ((CROSS_NAME, "reads several sites"), (LAYER_NAME, "predicts several sites")):
        shutil.copytree(run / "saes" / f"{name}_twin", tmp_path / name)
        for command in (["eval", "--suites", "core"], ["dashboard"]):
            with pytest.raises(SystemExit):
                main([command[0], str(tmp_path / name), *command[1:], "--model", "random:llama"])
            assert words in " ".join(capsys.readouterr().err.split())


def test_what_a_cross_layer_transcoder_cannot_start_from_is_refused_before_there_is_a_folder(tmp_path):
    chance = torch.Generator().manual_seed(0)
    sae = build(SAEConfig(architecture="batch_topk", n_features=128, k=8), 128, chance, d_out=128)
    data = config(WHOLE).model_dump(mode="json")
    del data["sae"]["decoder_init_norm"]
    data["sae"] |= {"cross_layer": True, "start_from": str(save(sae, tmp_path / "everywhere"))}
    with pytest.raises(ConfigError, match="reads or writes sites that features of their layer do not"):
        unbraid.train(validated(RunConfig, data, "test"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
