"""End-to-end fine-tuning: gradients, what may move, what it is worth, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

import unbraid
from unbraid import recipes
from unbraid.activations.live import LiveActivations
from unbraid.cli import main
from unbraid.config import RunConfig, validated
from unbraid.errors import UnbraidError
from unbraid.evaluation.subjects import EvaluatedSAE
from unbraid.finetuning import LEARNED, _Work, finetune
from unbraid.sites import Site

CPU = torch.device("cpu")
QUIET = Console(quiet=True)
MLP = "mlp_in.1 -> mlp_out.1"


def config(sites: list[str], architecture: str = "topk") -> RunConfig:
    data = recipes.tiny().model_dump(mode="json")
    data["model"]["sites"] = sites
    data["sae"] = {"architecture": architecture, "n_features": 96}
    data["sae"] |= {"k": 4} if architecture in ("topk", "batch_topk", "matryoshka") else {"lambda1": 0.02}
    if "k" in data["sae"]:
        del data["optimiser"]["sparsity_warmup_steps"]
    data["decorrelation"] = {"method": "none"}
    del data["optimiser"]["decorrelation_warmup_steps"]
    data["training"] |= {"tokens": 10_240, "batch_tokens": 256, "held_out_tokens": 512}
    data["variants"] = {"": {}}
    return validated(RunConfig, data, "test")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A short run of an SAE and a transcoder."""
    settings = config(["resid_post.0", MLP, "resid_post.0 + resid_post.1"])
    return unbraid.train(settings, tmp_path_factory.mktemp("run") / "run").path


@pytest.mark.parametrize(
    ("architecture", "loss"),
    [
        ("topk", "kl"),
        ("jumprelu", "ce"),
        *(pytest.param(name, "kl", marks=pytest.mark.slow) for name in ("batch_topk", "gated", "relu", "matryoshka")),
    ],
)
def test_the_gradient_is_that_of_the_loss_at_the_end_of_the_model(architecture, loss):
    """Against the formula written out, and along one direction against a difference of its values."""
    settings = config(["resid_post.0"], architecture)
    source = LiveActivations(settings, CPU)
    sae = unbraid.fit(settings.variant(""), torch.randn(4096, 64), batch_tokens=256)["sae"]
    work = _Work(EvaluatedSAE("it", (0,), sae), settings, source, loss, mse=0.0)
    work.sae = work.sae.double()
    work.learn(None)
    tokens, keep = next(work.batches(2))
    source.model.model.double()

    class Still(torch.optim.SGD):
        def step(self, closure=None):
            """Leave the weights, and the gradients, as they are."""

    work.step(Still(work.parameters, lr=1.0), 1.0, (tokens, keep), 1)
    intact = source.model.logits(tokens).log_softmax(-1)

    def value() -> torch.Tensor:
        def replace(x):
            return torch.where(keep.unsqueeze(2), work.sae(x), x)

        with source.model.visiting({"resid_post.0": replace}):
            log_q = source.model.differentiable_logits(tokens).log_softmax(-1)
        if loss == "kl":
            return (intact.exp() * (intact - log_q)).sum(-1)[keep].mean()
        return -log_q[:, :-1].gather(2, tokens[:, 1:, None]).squeeze(2)[keep[:, :-1]].mean()

    expected = torch.autograd.grad(value(), work.parameters, allow_unused=True)
    for parameter, gradient in zip(work.parameters, expected, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))
    # Norms and rotations of the model are in float32, which leaves this much to a step that stays on one side.
    direction, moved = torch.randn_like(work.sae.b_dec), []
    for sign in (1, -1):
        with torch.no_grad():
            work.sae.b_dec.add_(sign * 1e-5 * direction)
            moved.append(float(value()))
            work.sae.b_dec.sub_(sign * 1e-5 * direction)
    slope = float((work.sae.b_dec.grad * direction).sum())
    assert (moved[0] - moved[1]) / 2e-5 == pytest.approx(slope, rel=0.1, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("resid_post.0", "kl"),
        ("mlp_in.1--to--mlp_out.1", "ce"),
        pytest.param("resid_post.0", "ce", marks=pytest.mark.slow),
        pytest.param("mlp_in.1--to--mlp_out.1", "kl", marks=pytest.mark.slow),
    ],
)
def test_the_model_loses_less_afterwards_at_the_same_l0(run, tmp_path, name, loss):
    tuned = finetune(run / "saes" / name, tmp_path / "out", tokens=4_096, lr=3e-3, loss=loss, console=QUIET)
    if loss == "kl":
        assert tuned.after.kl_div_score > tuned.before.kl_div_score + 0.01
    else:
        assert tuned.after.ce_loss < tuned.before.ce_loss - 0.001
    assert tuned.after.l0 == pytest.approx(tuned.before.l0, abs=0.2)
    first = unbraid.load(run / "saes" / name)
    again = unbraid.load(tmp_path / "out")
    x = torch.randn(20, first.d_in)
    torch.testing.assert_close(again(x), tuned.sae(x))
    torch.testing.assert_close(again.W_dec.norm(dim=1), first.W_dec.norm(dim=1))
    said = json.loads((tmp_path / "out" / "cfg.json").read_text())["metadata"]
    assert said["finetuned"]["loss"] == loss and said["hook_name"] == first.metadata["hook_name"]


@pytest.mark.slow
def test_before_and_after_are_what_eval_measures(run, tmp_path):
    tuned = finetune(run / "saes" / "resid_post.0", tmp_path / "out", tokens=128, held_out_contexts=20, console=QUIET)
    main(["eval", str(run / "saes" / "resid_post.0"), "--suites", "core", "--tokens", "640", "--splice-contexts", "20"])
    report = json.loads((run / "saes" / "resid_post.0" / "evaluation.json").read_text())
    core = report["saes"]["resid_post.0"]["core"]
    assert tuned.before.ce_loss_score == pytest.approx(
        core["model_performance_preservation"]["ce_loss_score"], abs=1e-4
    )
    assert tuned.before.l0 == pytest.approx(core["sparsity"]["l0"], abs=1e-3)
    assert tuned.before.r2 == pytest.approx(core["reconstruction_quality"]["r2"], abs=1e-4)
    low, high = tuned.ce_change_interval
    assert low <= tuned.ce_change <= high
    assert tuned.ce_change == pytest.approx(tuned.after.ce_loss - tuned.before.ce_loss, abs=1e-9)
    apart = tuned.after.ce_loss_score, tuned.before.ce_loss_score
    assert high - low < 0.1 and apart[0] != apart[1], "of differences, far less than of either"


@pytest.mark.parametrize("learned", ["decoder", "biases"])
def test_only_what_is_learned_moves(run, tmp_path, learned):
    first = unbraid.load(run / "saes" / "resid_post.0")
    tuned = finetune(
        run / "saes" / "resid_post.0", tmp_path / "out", tokens=512, lr=1e-2, learned=learned, console=QUIET
    ).sae
    for name, parameter in first.named_parameters():
        may = LEARNED[learned] is None or name in LEARNED[learned]
        same = torch.allclose(parameter, dict(tuned.named_parameters())[name], rtol=1e-6, atol=1e-7)
        assert same != may, name


def test_the_command_answers_and_says_what_it_will_not_do(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sae = str(run / "saes" / "resid_post.0")
    main(["finetune", sae, "--out", "tuned", "--tokens", "256", "--held-out-contexts", "4"])
    said = capsys.readouterr().out
    assert "CE score" in said and "tuned" in said and "paired by context" in said
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    for words, why in (
        ([sae, "--out", "tuned"], "add --overwrite"),
        ([sae, "--out", "mine", "--overwrite"], "thesis.tex"),
        ([str(run), "--out", "other"], "expected one dictionary"),
        ([str(run / "saes" / "resid_post.0--and--resid_post.1"), "--out", "other"], "stands on several sites"),
        ([sae, "--out", "other", "--tokens", "0"], "expected at least 1"),
        ([sae, "--out", "other", "--lr", "nan"], "expected mse"),
        ([sae, "--out", "other", "--site", "resid_post.1"], "belongs to a run"),
        (["nowhere", "--out", "other"], "there is no 'nowhere'"),
    ):
        with pytest.raises(SystemExit):
            main(["finetune", *words])
        found = capsys.readouterr().err
        assert why in " ".join(found.split()), (why, found)
        assert "Traceback" not in found and not (tmp_path / "other").exists()
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "mine"


def test_what_reads_after_it_writes_is_refused(tmp_path):
    settings = config(["resid_post.1"])
    source = LiveActivations(settings, CPU)
    sae = unbraid.fit(
        settings.variant(""), {"x -> y": (torch.randn(1024, 64), torch.randn(1024, 64))}, batch_tokens=256
    )
    subject = EvaluatedSAE("it", (0,), sae["sae"], outputs=(Site("resid_post", 0),))
    work = _Work(subject, settings, source, "kl", 1.0)
    work.learn(None)
    tokens, keep = next(work.batches(2))
    with pytest.raises(UnbraidError, match="expected one that reads first"):
        work.step(torch.optim.SGD(work.parameters), 0.1, (tokens, keep), 1)
