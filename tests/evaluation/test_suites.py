"""A finished run and a bare SAE folder are evaluated end to end; what does not apply is skipped with its reason."""

import io
import json
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from unbraid import formats
from unbraid.config import EvaluationConfig, ProbingConfig, SynthConfig
from unbraid.errors import EvaluationError, FormatError
from unbraid.evaluation.suites import run_suites
from unbraid.evaluation.synth import run_synth
from unbraid.formats.export import export
from unbraid.synthetic import build_world
from unbraid.synthetic.learning import train_on_world

QUICK = EvaluationConfig(
    tokens=512,  # 16 contexts of 32 tokens: the run's own 496 held-out rows, first positions left out
    splice_contexts=2,
    meta_steps=5,
    context_features=4,
    replicates=4,
    control_tokens=1024,
    probing=ProbingConfig(train=16, test=8, max_tokens=16, tasks=["96_spam_is", "92_glue_sst2"]),
)

CONTROLS = ("random", "permuted", "pca", "frozen-decoder", "soft-frozen-decoder", "frozen-encoder")


@pytest.fixture(scope="module")
def run_path(tmp_path_factory):
    import unbraid

    config = unbraid.recipes.tiny()
    training = config.training.model_copy(update={"tokens": 2560, "held_out_tokens": 496, "checkpoint_every": 0})
    run = unbraid.train(config.model_copy(update={"training": training}), tmp_path_factory.mktemp("runs") / "tiny")
    return run.path


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("UNBRAID_CACHE", str(tmp_path_factory.getbasetemp() / "unbraid-cache"))


def test_a_run_is_evaluated_with_every_suite_that_applies_and_controls_beside(run_path, tmp_path):
    shown = io.StringIO()
    report = run_suites(run_path, QUICK, out=tmp_path, console=Console(file=shown, width=80))
    assert all(f"{suite}: " in shown.getvalue() for suite in ("core", "correlation", "contexts", "geometry", "probing"))
    assert "resid_post.0_decorrelated " in shown.getvalue() and "…" not in shown.getvalue()
    assert json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=pytest.fail) == report
    assert set(report["saes"]) == {
        f"resid_post.{layer}_{name}" for layer in (0, 1) for name in ("decorrelated", "twin")
    }
    assert set(report["controls"]) == {f"resid_post.{layer}: {name}" for layer in (0, 1) for name in CONTROLS}
    for control in report["controls"].values():
        assert {"site", "core"} <= set(control)
    for name, sae in report["saes"].items():
        assert set(sae) == {"site", "core", "correlation", "contexts", "geometry", "probing"}
        assert set(sae["core"]) == {
            "model_behavior_preservation",
            "model_performance_preservation",
            "reconstruction_quality",
            "shrinkage",
            "sparsity",
            "token_stats",
            "misc_metrics",
            "replaced_together",
        }
        assert ("reduction" in sae["correlation"]) == name.endswith("decorrelated")
        assert sae["core"]["token_stats"]["total_tokens_eval_sparsity_variance"] == 512
        assert len(sae["geometry"]["agreement"]) == 1 and len(sae["probing"]["tasks"]) == 2
        assert 0 <= sae["contexts"]["intruder_accuracy"] <= 1 and 0 < sae["contexts"]["features"] <= 4
    assert set(report["skipped"]) == {"absorption", "ground-truth"}
    features = load_file(tmp_path / "evaluation_features.safetensors")
    assert features["resid_post.0_twin.feature_density"].shape == (128,)


def test_the_summary_of_the_run_and_the_evaluation_agree(run_path, tmp_path):
    quick = QUICK.model_copy(update={"suites": ["core"], "controls": False})
    report = run_suites(run_path, quick, out=tmp_path)
    summary = json.loads((run_path / "summary.json").read_text())
    for name, sae in report["saes"].items():
        assert sae["core"]["sparsity"]["l0"] == pytest.approx(summary["saes"][name]["l0"], rel=1e-3)
        assert sae["core"]["reconstruction_quality"]["r2"] == pytest.approx(summary["saes"][name]["r2"], abs=1e-3)


def test_one_sae_of_a_run_is_evaluated_as_the_run_evaluates_it(run_path, tmp_path):
    quick = QUICK.model_copy(update={"suites": ["core", "contexts"]})
    together = run_suites(run_path, quick, out=tmp_path)
    alone = run_suites(run_path / "saes" / "resid_post.1_decorrelated", quick, out=tmp_path)
    assert list(alone["saes"]) == ["resid_post.1_decorrelated"] and not alone["skipped"]
    assert set(alone["controls"]) == {f"resid_post.1: {name}" for name in CONTROLS}
    for kind in ("saes", "controls"):
        for name, judged in alone[kind].items():
            beside_others = together[kind][name]
            beside_others["core"].pop("replaced_together", None)  # one alone is replaced with no other
            assert judged == beside_others, name


def test_an_sae_folder_is_evaluated_at_the_model_and_site_it_names(run_path, tmp_path):
    (folder,) = export(run_path / "saes" / "resid_post.1_twin", "dictionary_learning", tmp_path)
    text = {"source": "generated", "context_length": 32}
    suites = ["core", "geometry"]
    quick = EvaluationConfig(suites=suites, text=text, tokens=512, splice_contexts=2, meta_steps=5, control_tokens=1024)
    report = run_suites(folder, quick)
    assert list(report["saes"]) == ["resid_post.1_twin"] and report["model"] == "random:llama"
    assert report["saes"]["resid_post.1_twin"]["site"] == "resid_post.1" and not report["skipped"]


def test_without_held_out_text_the_suites_that_need_it_are_skipped_with_the_reason(run_path, tmp_path):
    run = shutil.copytree(run_path, tmp_path / "run")
    settings = json.loads((run / "config.json").read_text())
    settings["text"]["held_out_fraction"] = 0.0
    (run / "config.json").write_text(json.dumps(settings))
    quick = QUICK.model_copy(update={"suites": ["core", "correlation", "geometry"]})
    report = run_suites(run, quick)
    assert set(report["skipped"]) == {"core", "correlation"}
    assert "held_out_fraction = 0.0" in report["skipped"]["core"]
    assert all("geometry" in sae for sae in report["saes"].values())
    assert "geometry" in report["controls"]["resid_post.0: random"]


def test_directions_alone_are_judged_beside_random_ones_without_a_model(run_path, tmp_path):
    quick = QUICK.model_copy(update={"suites": ["geometry"]})
    report = run_suites(run_path, quick, out=tmp_path)
    assert set(report["controls"]) == {"resid_post.0: random", "resid_post.1: random"}
    assert set(report["seconds"]) == {"controls", "geometry"}


def test_suites_of_earlier_evaluations_stay_until_they_are_run_again_or_the_weights_change(run_path, tmp_path):
    run = shutil.copytree(run_path, tmp_path / "run")
    core = run_suites(run, QUICK.model_copy(update={"suites": ["core", "ground-truth"]}))
    shown = io.StringIO()
    geometry = QUICK.model_copy(update={"suites": ["geometry"]})
    both = run_suites(run, geometry, console=Console(file=shown, width=80))
    assert "kept there from an earlier evaluation: core, ground-truth" in shown.getvalue()
    assert "core: the reconstruction" not in shown.getvalue()
    assert json.loads((run / "evaluation.json").read_text()) == both
    for name, sae in both["saes"].items():
        assert list(sae) == ["site", "core", "geometry"] and sae["core"] == core["saes"][name]["core"]
    assert set(both["controls"]["resid_post.0: pca"]) == {"site", "core"}
    assert set(both["settings"]) == {"core", "geometry", "ground-truth"} and "ground-truth" in both["skipped"]
    again = run_suites(run, QUICK.model_copy(update={"suites": ["geometry"], "meta_steps": 6, "controls": False}))
    assert again["saes"]["resid_post.0_twin"]["geometry"]["composition_steps"] == 6
    assert set(again["controls"]["resid_post.0: random"]) == {"site", "core"}

    sae = formats.load(run / "saes" / "resid_post.0_twin")
    with torch.no_grad():
        sae.b_dec += 1
    shutil.rmtree(run / "saes" / "resid_post.0_twin")
    formats.save(sae, run / "saes" / "resid_post.0_twin")
    fresh = run_suites(run, geometry)
    assert all(set(sae) == {"site", "geometry"} for sae in fresh["saes"].values())
    assert set(fresh["settings"]) == {"geometry"} and not (run / "evaluation_features.safetensors").exists()
    (run / "evaluation.json").write_text("{")
    with pytest.raises(EvaluationError, match="is not JSON"):
        run_suites(run, geometry)


def test_an_sae_of_a_world_is_judged_by_its_truth_and_needs_no_model(tmp_path):
    from unbraid.config import DecorrelationConfig, OptimiserConfig, SAEConfig, VariantConfig

    settings = VariantConfig(
        seed=0,
        sae=SAEConfig(architecture="topk", n_features=21, k=2),
        decorrelation=DecorrelationConfig(lambda2=0.0),
        optimiser=OptimiserConfig(lr=3e-3, warmup_steps=10),
    )
    (sae,) = train_on_world(build_world("unit"), [settings], samples=64 * 256, batch=256)
    formats.save(sae, tmp_path / "sae")
    quick = QUICK.model_copy(update={"world": "unit", "world_samples": 2000, "meta_steps": 5})
    report = run_suites(tmp_path / "sae", quick)
    assert report["saes"]["sae"]["ground-truth"]["mcc"] > 0.4
    assert set(report["controls"]) == {"sae: random", "sae: permuted", "sae: pca"}
    assert all("ground-truth" in control for control in report["controls"].values())
    assert set(report["skipped"]) == {"core", "correlation", "contexts", "probing", "absorption"}
    assert "does not say which model" in report["skipped"]["core"]


def test_what_holds_no_sae_is_refused(tmp_path):
    with pytest.raises(FormatError):
        run_suites(tmp_path, QUICK)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(EvaluationError, match="no finished SAE"):
        run_suites(tmp_path, QUICK)


def test_synth_trains_judges_and_shows_controls(tmp_path):
    config = SynthConfig(
        world="unit",
        architectures=["topk", "relu"],
        seeds=[0, 1],
        samples=300 * 512,
        batch=512,
        lr=3e-3,
        eval_samples=4096,
    )
    report = run_synth(config, out=tmp_path / "synth.json")
    assert set(report["rows"]) == {"topk", "relu", "control: random", "control: permuted", "control: pca"}
    assert all(len(rows) == 2 for rows in report["rows"].values())
    mean = {name: sum(row["f1"] for row in rows) / 2 for name, rows in report["rows"].items()}
    assert mean["topk"] > mean["control: random"] and mean["topk"] > mean["control: permuted"]
    assert json.loads((tmp_path / "synth.json").read_text())["k"] == report["k"] == 2
