"""Transcoders: an SAE whose decoder predicts something else, with or without a skip connection."""

import pytest
import torch

import unbraid
from unbraid.config import SAEConfig
from unbraid.errors import ActivationError, ConfigError
from unbraid.formats import load, save
from unbraid.randomness import generator
from unbraid.sae.build import build
from unbraid.training.normalisation import Normalisation

N, D, M, B = 24, 6, 9, 40
KINDS = {
    "relu": {"lambda1": 0.03},
    "jumprelu": {"lambda1": 0.03, "bandwidth": 0.4, "initial_threshold": 0.05},
    "topk": {"k": 5},
    "batch_topk": {"k": 5},
    "matryoshka": {"k": 5},
}


def make(kind: str, skip: bool = False, d_out: int | None = M, **settings):
    config = SAEConfig(architecture=kind, n_features=N, skip=skip, **(KINDS[kind] | settings))
    sae = build(config, D, generator(1, "weights"), d_out=d_out).double()
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name.startswith("b_") or name == "W_skip":
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator(2, name)))
    return sae


def rows(width: int, name: str, count: int = B) -> torch.Tensor:
    return torch.randn(count, width, generator=generator(3, name), dtype=torch.float64)


def codes_by_formula(sae, pre_BN: torch.Tensor) -> torch.Tensor:
    """Which entries are active, from the definitions, with the gradient of what is kept."""
    flat = pre_BN.detach().flatten()
    if sae.architecture == "relu":
        return pre_BN.relu()
    if sae.architecture == "topk":
        chosen = pre_BN.topk(5, dim=1).indices
        return torch.zeros_like(pre_BN).scatter(1, chosen, pre_BN.gather(1, chosen).relu())
    cut = flat.relu().topk(5 * len(pre_BN)).values[-1]
    return pre_BN.relu() * (pre_BN >= cut)


def loss_by_formula(sae, x_BD: torch.Tensor, y_BM: torch.Tensor) -> torch.Tensor:
    f_BN = codes_by_formula(sae, x_BD @ sae.encoder_ND.T + sae.b_enc)
    skipped = 0 if sae.W_skip is None else x_BD @ sae.W_skip
    widths = sae.prefix_widths() if sae.architecture == "matryoshka" else [N]
    predictions = [f_BN[:, :width] @ sae.W_dec[:width] + sae.b_dec + skipped for width in widths]
    return sum((y_BM - y_hat).square().sum() for y_hat in predictions) / len(x_BD)


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kind", ["relu", "topk", "batch_topk", "matryoshka"])
def test_losses_and_gradients_are_those_of_the_formula(kind, skip, path):
    sae, x_BD, y_BM = make(kind, skip), rows(D, "x"), rows(M, "y")
    out = sae.training_forward(x_BD, path=path, y_BM=y_BM)
    found = torch.autograd.grad(out.reconstruction + out.auxiliary, list(sae.parameters()))
    loss = loss_by_formula(sae, x_BD, y_BM)
    expected = torch.autograd.grad(loss, list(sae.parameters()))
    torch.testing.assert_close(out.reconstruction + out.auxiliary, loss, rtol=1e-10, atol=1e-10)
    for (name, _), ours, theirs in zip(sae.named_parameters(), found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10, msg=name)
    missed = (y_BM - out.x_hat_BD).square().sum() / B
    torch.testing.assert_close(missed, out.reconstruction, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("skip", [False, True])
def test_a_jumprelu_transcoder_gives_the_same_gradients_on_both_paths(skip):
    x_BD, y_BM, found = rows(D, "x"), rows(M, "y"), {}
    for path in ("dense", "sparse"):
        sae = make("jumprelu", skip)
        out = sae.training_forward(x_BD, path=path, y_BM=y_BM)
        found[path] = torch.autograd.grad(out.reconstruction + 0.1 * out.sparsity, list(sae.parameters()))
    for dense, sparse in zip(found["dense"], found["sparse"], strict=True):
        torch.testing.assert_close(dense, sparse, rtol=1e-10, atol=1e-10)
    assert all(gradient.abs().sum() > 0 for gradient in found["dense"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [False, True])
def test_folding_carries_two_means_and_scales_to_raw_activations(kind, skip):
    sae, x, y = make(kind, skip), 5 + 3 * rows(D, "x"), -2 + 0.3 * rows(M, "y")
    sae.training_forward(rows(D, "x"), y_BM=rows(M, "y"))  # for thresholds of batches
    reads, writes = Normalisation.of(x), Normalisation.of(y)
    codes, predicted = sae.encode(reads(x)), sae(reads(x))
    sae.fold(reads.mean_D, reads.scale, writes.mean_D, writes.scale)
    torch.testing.assert_close(sae.encode(x), codes / writes.scale, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sae(x), predicted / writes.scale + writes.mean_D, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(N, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [False, True])
def test_what_is_saved_computes_the_same(kind, skip, tmp_path):
    sae, x = make(kind, skip).float(), rows(D, "x").float()
    sae.training_forward(x, y_BM=rows(M, "y").float())
    save(
        sae, tmp_path / "sae", metadata={"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_mlp_out"}
    )
    loaded = load(tmp_path / "sae")
    assert loaded.is_transcoder and (loaded.d_in, loaded.d_out, loaded.n_features) == (D, M, N)
    torch.testing.assert_close(loaded.encode(x), sae.encode(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loaded(x), sae(x), rtol=1e-6, atol=1e-6)
    assert "blocks.1.mlp.hook_in -> blocks.1.hook_mlp_out" in repr(loaded)


def test_a_transcoder_of_its_own_input_without_biases_learns_what_the_sae_learns():
    """y = x, b_dec held at zero, the same first weights: every weight is the same after forty steps."""
    trained = {}
    for d_out in (None, D):
        sae = build(SAEConfig(architecture="topk", n_features=N, k=4), D, generator(1, "weights"), d_out=d_out).double()
        with torch.no_grad():
            sae.encoder_ND.copy_(sae.W_dec)
        sae.b_dec.requires_grad_(False)
        adam = torch.optim.Adam([p for p in sae.parameters() if p.requires_grad], lr=1e-2)
        for step in range(40):
            x_BD = rows(D, f"x {step}")
            adam.zero_grad()
            sae.training_forward(x_BD, y_BM=None if d_out is None else x_BD).reconstruction.backward()
            adam.step()
        trained[d_out] = sae
    for (name, one), (_, other) in zip(trained[None].named_parameters(), trained[D].named_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, msg=name)


def test_a_linear_task_is_solved_with_a_skip_connection_which_does_most_of_it():
    x = torch.randn(40_960, D, generator=generator(0, "x"))
    A = torch.randn(D, M, generator=generator(0, "A"))
    y = x @ A + 3
    topk = unbraid.SAEConfig(architecture="topk", n_features=N, k=1, skip=True)
    plain = unbraid.SAEConfig(architecture="topk", n_features=N, k=1)
    optimiser = unbraid.config.OptimiserConfig(lr=1e-2, warmup_steps=5)
    none = unbraid.config.DecorrelationConfig(method="none")
    settings = {
        name: unbraid.config.VariantConfig(seed=0, sae=sae, optimiser=optimiser, decorrelation=none)
        for name, sae in (("skip", topk), ("plain", plain))
    }
    found = unbraid.fit(settings, x, target=y, batch_tokens=128)
    left = {name: float((sae(x) - y).square().mean() / y.var(0).mean()) for name, sae in found.items()}
    assert left["skip"] < 1e-3 < 0.1 < left["plain"]
    by_skip = x @ found["skip"].W_skip
    assert float(((by_skip - by_skip.mean(0)) - (y - y.mean(0))).square().mean() / y.var(0).mean()) < 0.2


def test_fit_takes_one_tensor_and_its_target():
    with pytest.raises(ActivationError, match="there is a target; expected one tensor of rows"):
        unbraid.fit(
            SAEConfig(architecture="topk", n_features=N, k=2), {"a": torch.randn(99, D)}, target=torch.randn(99, M)
        )


def test_batches_without_what_they_should_predict_are_refused():
    with pytest.raises(ActivationError, match=r"y of a training batch has shape None; expected \[40, 9\]"):
        make("topk").training_forward(rows(D, "x"))
    with pytest.raises(ActivationError, match="an SAE predicts its input"):
        make("topk", d_out=None).training_forward(rows(D, "x"), y_BM=rows(D, "y"))


@pytest.mark.parametrize(
    ("sites", "sae", "match"),
    [
        (["mlp_in.1 -> mlp_out.1"], {"architecture": "gated"}, "cannot be; expected relu"),
        (["resid_post.1"], {"skip": True}, "sae.skip is read by transcoders"),
        (["mlp_in.1 -> mlp_out.1 -> resid_post.1"], {}, "2 arrows"),
        (["mlp_in.1 ->"], {}, "is not understood"),
        (["mlp_in.1 -> mlp_out.1", "mlp_in.1->mlp_out.1"], {}, "names a site twice"),
    ],
)
def test_what_cannot_be_is_refused_in_words(sites, sae, match):
    given = {"model.sites": sites} | {f"sae.{name}": value for name, value in sae.items()}
    with pytest.raises(ConfigError, match=match):
        unbraid.config.overridden(unbraid.recipes.tiny(), given)
