"""`sae.start_from`: the first weights give what the named dictionary gives, in every architecture, then learn on."""

import pytest
import torch
from sae_settings import sae_settings
from stopped_runs import Stop, stop_at

import unbraid
from unbraid import recipes
from unbraid.cli import main
from unbraid.config import DecorrelationConfig, OptimiserConfig, RunConfig, VariantConfig, overridden, validated
from unbraid.errors import ConfigError
from unbraid.files import checksum
from unbraid.formats import save
from unbraid.randomness import generator
from unbraid.sae import ARCHITECTURES
from unbraid.sae.build import build
from unbraid.training.normalisation import Normalisation
from unbraid.training.sae_trainer import Target, trainer_from_settings
from unbraid.training.start import start_from

D, M, N, K = 12, 7, 32, 4


def rows(width: int, number: int = 400) -> torch.Tensor:
    return 3 * torch.randn(number, width, generator=generator(0, "rows", width)) + torch.arange(width)


def settings_of(name: str, **sae) -> VariantConfig:
    settings = sae_settings(**{"architecture": name, "n_features": N, "k": K} | sae)
    none = DecorrelationConfig(method="none")
    return VariantConfig(seed=0, sae=settings, optimiser=OptimiserConfig(warmup_steps=0), decorrelation=none)


def begun(name: str, start, d_out: int | None = None, **sae):
    """A trainer that starts from a folder, in units of its own."""
    x_RD = rows(D)
    target = None if d_out is None else Target((1,), Normalisation.of(rows(d_out)))
    own = settings_of(name, start_from=str(start), **sae)
    trainer = trainer_from_settings(
        name, (0,), own, 0, Normalisation.of(x_RD), torch.device("cpu"), steps=10, target=target
    )
    start_from(trainer)
    return trainer


@pytest.mark.parametrize("d_out", [None, M], ids=["sae", "transcoder"])
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_before_its_first_step_it_is_the_dictionary_it_starts_from(name, d_out, tmp_path):
    sae = build(settings_of(name, **({"skip": True} if d_out else {})).sae, D, generator(1, "first"), d_out=d_out)
    with torch.no_grad():
        for one, tensor in sae.state_dict().items():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator(2, one)))
        sae.constrain()
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
        if name == "relu":  # rows without unit norm, as other libraries have them
            sae.W_dec.mul_(0.9 + 0.2 * torch.rand(N, 1, generator=generator(3, "norms")))
    trainer = begun(name, save(sae, tmp_path / "sae"), d_out, **({"skip": True} if d_out else {}))
    trainer.fold()
    x_RD = rows(D, 50)
    torch.testing.assert_close(trainer.sae(x_RD), sae(x_RD), rtol=1e-4, atol=1e-4)
    f_RN, found = sae.encode(x_RD) * sae.W_dec.norm(dim=1), trainer.sae.encode(x_RD)
    assert (f_RN > 0).any()
    torch.testing.assert_close(found, f_RN, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["topk", "batch_topk", "matryoshka", "relu", "jumprelu"])
def test_another_architecture_takes_the_weights_they_share(name, tmp_path):
    sae = build(settings_of("topk").sae, D, generator(1, "first"))
    trainer = begun(name, save(sae, tmp_path / "sae"))
    trainer.fold()
    torch.testing.assert_close(trainer.sae.encoder_ND, sae.encoder_ND, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(trainer.sae.b_dec, sae.b_dec, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("frozen", "kept"),
    {"both": {"W_dec", "encoder_ND"}, "decoder": {"W_dec"}, "encoder": {"encoder_ND"}, "near": set()}.items(),
)
def test_fine_tuning_moves_only_what_it_may(frozen, kept, tmp_path):
    sae = build(settings_of("jumprelu").sae, D, generator(1, "first"))
    start = save(sae, tmp_path / "sae")
    x_RD = rows(D, 4_000)
    none = DecorrelationConfig(method="none")
    config = VariantConfig(
        seed=0,
        sae=sae_settings(architecture="jumprelu", n_features=N, start_from=str(start), frozen=frozen),
        optimiser=OptimiserConfig(lr=0.1, warmup_steps=0),
        decorrelation=none,
    )
    tuned = unbraid.fit(config, x_RD, batch_tokens=100)["sae"]
    for name in ("W_dec", "encoder_ND"):
        moved = float((getattr(tuned, name) - getattr(sae, name)).detach().abs().max())
        assert (moved < 1e-5) == (name in kept), (name, moved)
    cosine_N = (tuned.W_dec * sae.W_dec).sum(1)
    assert frozen != "near" or 0.79 < float(cosine_N.detach().min()) < 0.95
    assert not torch.allclose(tuned.threshold, sae.threshold / Normalisation.of(x_RD).scale, rtol=1e-3)


def config(**changes) -> RunConfig:
    data = recipes.tiny().model_dump(mode="json")
    data["training"] |= {"tokens": 4_096, "batch_tokens": 128, "checkpoint_every": 4, "held_out_tokens": 512}
    data["variants"] = {"": {}}
    return overridden(validated(RunConfig, data, "test"), changes)[0]


def weights(path) -> str:
    return checksum(path / "saes" / "resid_post.1" / "sae_weights.safetensors")


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A finished run."""
    return unbraid.train(config(), tmp_path_factory.mktemp("first") / "run").path


def test_a_run_goes_on_from_one_that_ended_and_resumes_without_it(first, tmp_path, capsys):
    start = tmp_path / "start"
    save(unbraid.load(first / "saes" / "resid_post.1"), start)
    settings = config(**{"sae.start_from": str(start), "optimiser.warmup_steps": 0})
    whole = unbraid.train(settings, tmp_path / "whole")
    own, before = (run["saes"]["resid_post.1"] for run in (whole.summary, unbraid.Run(first).summary))
    assert own["r2"] > before["r2"]
    first_line = (whole.path / "metrics.jsonl").read_text().splitlines()[0]
    assert '"l0": ' in first_line
    with pytest.raises(Stop):
        unbraid.train(settings, tmp_path / "cut", callbacks=[stop_at(9)])
    start.rename(tmp_path / "gone")
    unbraid.resume(tmp_path / "cut")
    assert weights(tmp_path / "cut") == weights(whole.path)


def test_what_does_not_fit_is_refused_before_a_run_folder_appears(first, tmp_path, capsys):
    start = str(first / "saes" / "resid_post.1")
    for changes, words in (
        ({"sae.start_from": str(tmp_path / "nothing")}, "sae.start_from"),
        ({"sae.start_from": start, "sae.n_features": 64}, "set sae.n_features to 128"),
        ({"sae.start_from": start, "sae.architecture": "gated"}, "not gated"),
        ({"sae.start_from": "smollm2-demo"}, "reads 576 numbers"),
    ):
        words_typed = [word for name, value in changes.items() for word in (f"--{name}", str(value))]
        with pytest.raises(SystemExit):
            main(["train", "tiny", *words_typed, "--run", str(tmp_path / "run")])
        said = capsys.readouterr().err
        assert words in said and "Traceback" not in said
        assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"decoder_init_norm is read only while sae\.start_from is none"):
        config(**{"sae.start_from": start, "sae.decoder_init_norm": 0.3})
