"""Runs with transcoders: through the whole of a run, stopped and resumed, and beside SAEs."""

import copy

import pytest
import torch

import unbraid
from unbraid.activations.language_model import load_language_model
from unbraid.activations.live import LiveActivations
from unbraid.config import EvaluationConfig, ModelConfig, overridden
from unbraid.errors import EvaluationError, FeatureError, ModelError
from unbraid.evaluation.splice import preservation
from unbraid.evaluation.suites import run_suites
from unbraid.reporting.dashboard.build import write_dashboard
from unbraid.sites import Route

ROUTE = "mlp_in.0 -> mlp_out.0"
NAME = "mlp_in.0--to--mlp_out.0"


def settings(*sites: str, **sae: object) -> unbraid.RunConfig:
    given = {"model.sites": list(sites), "training.tokens": 10_240, "training.held_out_tokens": 512}
    given |= {"training.checkpoint_every": 10, "sae.architecture": "batch_topk", "sae.k": 8}
    given |= {f"sae.{name}": value for name, value in sae.items()}
    return overridden(unbraid.recipes.tiny(), given)[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return unbraid.train(settings(ROUTE, "resid_post.1", skip=True), tmp_path_factory.mktemp("runs") / "both")


def test_a_run_measures_saves_and_splices_transcoders(run):
    assert list(run.saes) == [f"{NAME}_decorrelated", f"{NAME}_twin", "resid_post.1_decorrelated", "resid_post.1_twin"]
    sae, measured = run.saes[f"{NAME}_twin"], run.summary["saes"][f"{NAME}_twin"]
    assert sae.architecture == "jumprelu_skip_transcoder" and sae.W_skip.abs().sum() > 0
    assert (
        sae.metadata["hook_name"] == "blocks.0.mlp.hook_in" and sae.metadata["hook_name_out"] == "blocks.0.hook_mlp_out"
    )
    assert 0.2 < measured["r2"] < 1 and 0.5 < measured["ce_loss_score"] < 1.3
    assert run.saes["resid_post.1_twin"].W_skip is None


def test_r2_is_that_of_the_mlps_output(run):
    """From the saved weights on held-out activations read anew."""
    source = LiveActivations(run.config, torch.device("cpu"))
    chunk = next(source.chunks(None, held_out=True))
    x, y = (found[:, 1:].flatten(0, 1)[:512] for found in chunk.activations[:2])
    sae = run.saes[f"{NAME}_twin"]
    explained = 1 - (sae(x) - y).square().sum() / (y - y.mean(0)).square().sum()
    assert explained == pytest.approx(run.summary["saes"][f"{NAME}_twin"]["r2"], abs=0.02)
    assert explained > 1 - (sae.decode(sae.encode(x)) - y).square().sum() / (y - y.mean(0)).square().sum()


def test_an_sae_beside_a_transcoder_ends_with_the_bytes_it_has_alone(run, tmp_path):
    alone = unbraid.train(settings("mlp_out.0", "resid_post.1", "mlp_in.0"), tmp_path / "alone")
    for name in ("resid_post.1_decorrelated", "resid_post.1_twin"):
        weights = [one.path / "saes" / name / "sae_weights.safetensors" for one in (run, alone)]
        assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_stopped_run_resumes_to_the_same_bytes(run, tmp_path):
    def stop(step, record):
        if step == 15:
            raise RuntimeError("the power went")

    with pytest.raises(RuntimeError):
        unbraid.train(settings(ROUTE, "resid_post.1", skip=True), tmp_path / "cut", callbacks=[stop])
    unbraid.resume(tmp_path / "cut")
    for folder in sorted((run.path / "saes").iterdir()):
        for file in ("sae_weights.safetensors", "cfg.json"):
            assert (tmp_path / "cut" / "saes" / folder.name / file).read_bytes() == (folder / file).read_bytes()
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == (run.path / "metrics.jsonl").read_bytes()


def test_a_run_from_a_cache_is_that_of_the_model(run, tmp_path):
    config = settings(ROUTE, "resid_post.1", skip=True)
    unbraid.run.fill_cache(config, tmp_path / "cache")
    cached = unbraid.train(config.model_copy(update={"cache": str(tmp_path / "cache")}), tmp_path / "cached")
    name = f"saes/{NAME}_twin/sae_weights.safetensors"
    assert (cached.path / name).read_bytes() == (run.path / name).read_bytes()


def test_what_comes_before_what_is_read_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(ModelError, match=r"reads mlp_out\.1 and predicts mlp_in\.0, which random:llama reaches first"):
        unbraid.train(settings("mlp_out.1 -> mlp_in.0"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_mlp_itself_spliced_in_its_own_place_loses_nothing():
    """The reconstruction that is exact scores 1, the one that is zero scores 0."""
    model = load_language_model(ModelConfig(name="random:llama", sites=["mlp_in.0"]))
    mlp = copy.deepcopy(model.model.model.layers[0].mlp)  # pyright: ignore
    tokens = torch.randint(5, 90, (4, 16), generator=torch.Generator().manual_seed(0))

    class Exact:
        encode, decode = staticmethod(mlp), staticmethod(lambda f: f)

    class Zero:
        encode, decode = staticmethod(mlp), staticmethod(torch.zeros_like)

    route = Route.parse(ROUTE)
    found = preservation(model, {route: {"exact": Exact(), "zero": Zero()}}, [(tokens, torch.ones(4, 16) > 0)])
    scores = {name: one["model_behavior_preservation"]["kl_div_score"] for name, one in found.items()}
    assert scores["exact"] == pytest.approx(1, abs=1e-6) and scores["zero"] == pytest.approx(0, abs=1e-6)


def test_features_in_hand_work_with_a_run_of_transcoders(run):
    fm = unbraid.features(run.path)
    name = f"{NAME}_twin"
    reading = fm.read("kate bola mima")
    found = next(row for row in reading.of(name).top(3))
    sae, lm = run.saes[name], fm.hf_model
    read, wrote = [], []

    def see(_, inputs, output):
        read.append(inputs[0])
        wrote.append(output)

    hook = lm.model.layers[0].mlp.register_forward_hook(see)
    fm.run("kate bola mima", [])
    hook.remove()
    missed = (wrote[0] - sae(read[0])).norm(dim=-1) / wrote[0].norm(dim=-1)
    torch.testing.assert_close(reading.error[name][0, 1:], missed[0, 1:], rtol=1e-4, atol=1e-4)
    moved = fm.run("kate bola mima", [unbraid.Ablate(found["feature"])])
    assert float(moved.kl.max()) > 0
    spliced = fm.run("kate bola mima", [unbraid.Splice(name)])
    assert float(spliced.kl.max()) > 0


def test_suites_for_saes_refuse_transcoders_and_the_dashboard_shows_them(run, tmp_path):
    with pytest.raises(EvaluationError, match=r"is a transcoder: it predicts mlp_out\.0 from mlp_in\.0"):
        run_suites(run.path, EvaluationConfig())
    write_dashboard(run.path, out=tmp_path / "site")
    texts = [path.read_text(errors="replace") for path in (tmp_path / "site").rglob("*") if path.is_file()]
    assert any(f"{NAME}_twin" in text for text in texts)
    with pytest.raises(FeatureError):
        unbraid.features(run.path).feature(f"{NAME}_nothing/3")
