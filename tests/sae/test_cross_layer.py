"""Whole cross-layer transcoders: the published formula layer by layer, zeros that stay, and what cannot be one."""

import pytest
import torch
from sae_settings import sae_settings
from torch import Tensor
from torch.nn import functional as F

import unbraid
from unbraid.config import OptimiserConfig, RunConfig, SAEConfig, VariantConfig, validated
from unbraid.config.decorrelation import DecorrelationConfig
from unbraid.distributed.ranks import Ranks
from unbraid.distributed.shard import Shard
from unbraid.errors import ConfigError
from unbraid.formats import save
from unbraid.randomness import generator
from unbraid.sae import ARCHITECTURES, SAE
from unbraid.sae.build import build
from unbraid.sae.cross_layer import CrossLayer
from unbraid.sites import Route, has_layers
from unbraid.training.normalisation import Normalisation
from unbraid.training.sae_trainer import SAETrainer, Target, ends, train_step, trainer_from_settings

IN, OUT, N, K = (6, 10, 4), (5, 3, 8), 40, 5
BLOCKS = [(0, 13), (13, 26), (26, 40)]
"""Of 40 features in three layers."""
OPTIONS = {"matryoshka": {"matryoshka_order": "frequency", "reorder_from": 1, "reorder_every": 2}}
SPLIT = [name for name, kind in ARCHITECTURES.items() if kind.can_be_split]


def settings(name: str, **changes) -> SAEConfig:
    given = {"architecture": name, "n_features": N, "k": K, "cross_layer": True} | OPTIONS.get(name, {}) | changes
    return sae_settings(**given)


def new(name: str, shard: Shard | None = None, **changes):
    chance = generator(0, "init")
    return build(settings(name, **changes), sum(IN), chance, shard, d_out=sum(OUT), widths=(IN, OUT))


def rows(number: int = 64) -> list[list[Tensor]]:
    """What is read and what is predicted, of three layers each."""
    drawn = [torch.randn(number, width, generator=generator(1, "rows", width)).double() for width in (*IN, *OUT)]
    return [drawn[:3], drawn[3:]]


@pytest.mark.parametrize("path", ["sparse", "dense"])
@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
def test_loss_and_gradients_are_those_of_the_published_formula_layer_by_layer(path, skip):
    """f_l = top k over all layers of x_l W_enc_l + b_l, y_k = sum_{l <= k} f_l W_dec[l, k] + b_k (+ x_k W_skip_k)."""
    sae = new("topk", skip=skip).double()
    xs, ys = rows()
    with torch.no_grad():
        for bias in (sae.b_enc, sae.b_dec):
            bias += 0.1 * torch.randn(bias.shape, generator=generator(2, "off", len(bias)))
    out = sae.training_forward(torch.cat(xs, 1), path=path, y_BM=torch.cat(ys, 1))
    (out.reconstruction + out.auxiliary).backward()
    assert sae.cross_layer is not None
    sae.cross_layer.zero_gradients(sae)

    starts_in, starts_out = (0, 6, 16, 20), (0, 5, 8, 16)
    columns = {layer: slice(starts_in[layer], starts_in[layer + 1]) for layer in range(3)}
    outputs = {layer: slice(starts_out[layer], starts_out[layer + 1]) for layer in range(3)}
    features = {layer: slice(*BLOCKS[layer]) for layer in range(3)}

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_()

    encoders = {layer: leaf(sae.encoder_ND[features[layer], columns[layer]]) for layer in range(3)}
    decoders = {(a, b): leaf(sae.W_dec[features[a], outputs[b]]) for a in range(3) for b in range(a, 3)}
    skips = {layer: leaf(sae.W_skip[columns[layer], outputs[layer]]) for layer in range(3)} if skip else {}
    b_enc, b_dec = leaf(sae.b_enc), leaf(sae.b_dec)
    pre = torch.cat([xs[layer] @ encoders[layer].T + b_enc[features[layer]] for layer in range(3)], 1)
    kept = pre.topk(K, dim=1)
    f_BN = torch.zeros_like(pre).scatter(1, kept.indices, kept.values.relu())
    loss = torch.zeros(())
    for k in range(3):
        y = sum(f_BN[:, features[layer]] @ decoders[layer, k] for layer in range(k + 1)) + b_dec[outputs[k]]
        loss = loss + (ys[k] - y - (xs[k] @ skips[k] if skip else 0)).square().sum(1).mean()
    loss.backward()

    assert out.reconstruction.item() == pytest.approx(loss.item(), rel=1e-12)
    for at, encoder in encoders.items():
        torch.testing.assert_close(sae.encoder_ND.grad[features[at], columns[at]], encoder.grad, rtol=1e-10, atol=1e-12)
    for (a, b), decoder in decoders.items():
        torch.testing.assert_close(sae.W_dec.grad[features[a], outputs[b]], decoder.grad, rtol=1e-10, atol=1e-12)
    for at, own in skips.items():
        torch.testing.assert_close(sae.W_skip.grad[columns[at], outputs[at]], own.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(sae.b_enc.grad, b_enc.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(sae.b_dec.grad, b_dec.grad, rtol=1e-10, atol=1e-12)
    assert sum(decoder.numel() for decoder in decoders.values()) == int((sae.W_dec != 0).sum())


def trainer(name: str, penalty: bool = True, **changes) -> SAETrainer:
    """In units with a mean and a scale for each site."""
    xs, ys = rows(400)
    units = [Normalisation.side_by_side([Normalisation.of(3 * x + 1) for x in end]) for end in (xs, ys)]
    decoder = DecorrelationConfig(space="decoder", lambda2=0.3, fraction=0.2)
    variant = VariantConfig(
        seed=0,
        sae=settings(name, **changes),
        optimiser=OptimiserConfig(lr=1e-2, warmup_steps=0),
        decorrelation=decoder if penalty else DecorrelationConfig(method="none"),
    )
    target = Target((3, 4, 5), units[1], has_layers=True)
    return trainer_from_settings(name, (0, 1, 2), variant, 0, units[0], torch.device("cpu"), steps=8, target=target)


def holds(owner: CrossLayer, sae: SAE) -> bool:
    """Whether all weights are where they belong."""
    return owner.holds(sae.encoder_ND, sae.W_dec, sae.W_skip)


@pytest.mark.parametrize("changes", [{}, {"frozen": "near"}], ids=["plain", "near"])
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_nothing_that_training_does_lets_a_feature_read_or_write_elsewhere(name, changes):
    one = trainer(name, skip=True, **changes)
    first = {key: tensor.clone() for key, tensor in one.sae.named_parameters()}
    for step in range(8):
        xs, ys = ([3 * part.float() + 1 for part in end] for end in rows(128))
        x_BD, y_BM = one.rows([*xs, *ys])
        train_step(one, x_BD, step, 1e-2, log=step == 3, y_BM=y_BM)
    sae, owner = one.sae, one.sae.cross_layer
    assert owner is not None and holds(owner, sae)
    assert all(not torch.equal(first[key], sae.get_parameter(key)) for key in ("encoder_ND", "W_dec", "W_skip"))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(N))
    one.fold()
    assert holds(owner, sae), "units of raw activations"
    if name in ("relu", "jumprelu", "gated", "batch_topk", "matryoshka"):  # A TopK chooses among all layers.
        x_1D = torch.cat([3 * x + 1 for x in rows(1)[0]], 1).float()
        later = x_1D.clone()
        later[:, 6:] += 5
        torch.testing.assert_close(sae(later)[:, :5], sae(x_1D)[:, :5], rtol=0, atol=1e-6)
        assert (sae(later)[:, 5:] - sae(x_1D)[:, 5:]).abs().amax() > 1e-3


@pytest.mark.parametrize("name", SPLIT)
def test_slices_of_a_split_one_hold_the_weights_of_the_whole(name):
    class Rank(Ranks):
        """One of two, alone."""

        def __init__(self, rank: int):
            self.rank, self.size = rank, 2

    whole, parts = new(name), [new(name, Shard(N, Rank(rank))) for rank in range(2)]
    for key in ("encoder_ND", "W_dec"):
        assert torch.equal(whole.get_parameter(key), torch.cat([part.get_parameter(key) for part in parts]))
    assert all(part.cross_layer is not None and holds(part.cross_layer, part) for part in parts)
    assert [int((part.W_dec[:, :5] != 0).any(1).sum()) for part in parts] == [13, 0]


def test_one_is_learned_in_which_each_layer_adds_to_later_ones():
    """Of three layers that share causes: later outputs need what earlier features write into them."""
    cause = F.relu(torch.randn(20_000, 12, generator=generator(3, "causes")))
    seen, given = (
        [
            cause[:, 4 * (layer if own else 0) : 4 * (layer + 1)]
            @ torch.randn(4 * (1 if own else layer + 1), 8, generator=generator(4, "mix", layer, own))
            for layer in range(3)
        ]
        for own in (True, False)
    )
    config = VariantConfig(
        seed=0,
        sae=SAEConfig(architecture="batch_topk", n_features=48, k=8, cross_layer=True),
        optimiser=OptimiserConfig(lr=3e-3, warmup_steps=0),
        decorrelation=DecorrelationConfig(method="none"),
    )
    sae = unbraid.fit(config, {"a + b + c -> d + e + f": (*seen, *given)}, batch_tokens=50)["sae"]
    for y, y_hat in zip(given, sae.by_site(sae(torch.cat(seen, 1))), strict=True):
        assert 1 - (y - y_hat).square().sum() / (y - y.mean(0)).square().sum() > 0.9
    early = sae.W_dec[:16].view(16, 3, 8).norm(dim=2)
    assert float(early[:, 1:].amax(1).mean()) > 0.3, "features of the first layer write into later ones"


@pytest.mark.parametrize(
    ("site", "wanted"),
    {
        "mlp_in.0 + mlp_in.1 -> mlp_out.0 + mlp_out.1": True,
        "module:a + module:b -> module:c + module:d": True,
        "mlp_in.1 + mlp_in.0 -> mlp_out.1 + mlp_out.0": False,
        "mlp_in.1 + mlp_in.2 -> mlp_out.0 + mlp_out.1": False,
        "mlp_in.0 -> mlp_out.0 + mlp_out.1": False,
        "mlp_in.0 -> mlp_out.0": False,
        "resid_post.0 + resid_post.1": False,
        "nonsense": False,
    }.items(),
)
def test_layers_are_as_many_at_both_ends_and_in_order(site, wanted):
    assert has_layers(site) == wanted


def test_beside_one_a_site_without_layers_in_order_is_a_plain_dictionary():
    units, topk = [Normalisation.none(4)] * 4, settings("topk")
    none = DecorrelationConfig(method="none")
    variant = VariantConfig(seed=0, sae=topk, optimiser=OptimiserConfig(), decorrelation=none)
    found = []
    for site in ("mlp_in.0 + mlp_in.1 -> mlp_out.0 + mlp_out.1", "mlp_in.1 + mlp_in.0 -> mlp_out.0 + mlp_out.1"):
        route = Route.parse(site)
        places, reads, target = ends(route, route.ends, units)
        one = trainer_from_settings("one", places, variant, 0, reads, torch.device("cpu"), steps=1, target=target)
        found.append(one.sae.cross_layer is not None)
    assert found == [True, False]


def test_what_cannot_be_one_is_refused(tmp_path):
    for sites in (["resid_post.0"], ["mlp_in.1 + mlp_in.0 -> mlp_out.1 + mlp_out.0"]):
        data = {"model": {"sites": sites}, "sae": {"architecture": "topk", "cross_layer": True}}
        with pytest.raises(ConfigError, match="in the order of their layers"):
            validated(RunConfig, data, "test")
    with pytest.raises(ConfigError, match=r"matryoshka_order to frequency"):
        SAEConfig(architecture="matryoshka", cross_layer=True)
    with pytest.raises(
        ConfigError, match=r"sae\.cross_layer is set, and is read for other activations: those of several layers"
    ):
        unbraid.fit(
            SAEConfig(architecture="topk", n_features=N, k=K, cross_layer=True), torch.randn(512, 8), batch_tokens=64
        )
    with pytest.raises(ConfigError, match="expected a feature for each"):
        new("topk", n_features=2, k=1)
    anywhere = build(settings("topk", cross_layer=False), sum(IN), generator(0, "x"), d_out=sum(OUT))
    elsewhere = save(anywhere, tmp_path / "elsewhere")
    xs, ys = rows(400)
    topk = settings("topk", start_from=str(elsewhere))
    with pytest.raises(ConfigError, match="reads or writes sites that features of their layer do not"):
        unbraid.fit(topk, {"a + b + c -> d + e + f": tuple(x.float() for x in (*xs, *ys))}, batch_tokens=50)
