"""Worlds with names, and how a world is built from its settings: the SynthSAEBench recipe (arXiv 2602.14687).

Features are numbered breadth first: roots, then all their children, then theirs; what is left over stands alone. The
number of a feature is also its rank, so parents are common and leaves rare. A child must fire only with its parent and
still reach its own Zipf probability, so its conditional probability is raised for the parent and for the siblings
that take its place.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from unbraid.config import WorldConfig
from unbraid.errors import ConfigError
from unbraid.randomness import generator
from unbraid.synthetic.world import World

WORLDS = {
    "unit": WorldConfig(
        n_features=64, d_model=24, roots=4, branching=3, depth=2, correlation_rank=2, min_probability=0.01
    ),
    "small": WorldConfig(n_features=384, d_model=96, roots=16, branching=4, depth=2, correlation_rank=8),
    "medium": WorldConfig(n_features=2048, d_model=256, roots=32, branching=4, depth=2, correlation_rank=16),
    "full": WorldConfig(),
}
LARGEST_SHARED_VARIANCE = 0.99


def build_world(world: WorldConfig | str, device: torch.device | str = "cpu") -> World:
    """The world with these settings or this name; the same settings give the same world on every device.

    Raises:
        ConfigError: there is no world of that name.
    """
    if isinstance(world, str):
        if world not in WORLDS:
            raise ConfigError(f"there is no world named {world!r}; expected one of {', '.join(WORLDS)}")
        world = WORLDS[world]
    config, n_features = world, world.n_features
    probability = zipf(n_features, config.max_probability, config.min_probability, config.zipf_exponent)
    children = breadth_first_children(config)
    chance = {name: generator(config.seed, "world", name) for name in ("dictionary", "bias", "loadings", "magnitude")}
    start = torch.randn(n_features, config.d_model, generator=chance["dictionary"])
    dictionary = spread_directions(start.to(device), config.orthogonalise_steps, config.orthogonalise_lr)
    bias = F.normalize(torch.randn(config.d_model, generator=chance["bias"]), dim=0) * config.bias_norm
    loadings = torch.randn(n_features, config.correlation_rank, generator=chance["loadings"]) * config.correlation_scale
    shared = loadings.square().sum(1, keepdim=True)
    loadings *= (LARGEST_SHARED_VARIANCE / shared).sqrt().clamp(max=1.0)
    sd = config.magnitude_sd_mean + config.magnitude_sd_sd * torch.randn(n_features, generator=chance["magnitude"])
    return World(
        dictionary=dictionary.cpu(),
        bias=bias,
        probability=probability,
        conditional=compensated(probability, children, config.exclusive_siblings),
        children=children,
        loadings=loadings,
        magnitude=torch.linspace(config.magnitude_first, config.magnitude_last, n_features),
        magnitude_sd=sd.abs(),
        exclusive=config.exclusive_siblings,
    ).to(device)


def zipf(n_features: int, highest: float, lowest: float, exponent: float) -> Float[Tensor, " G"]:
    """Probabilities falling with rank**-exponent, stretched to run from `highest` to `lowest`."""
    law = torch.arange(1, n_features + 1, dtype=torch.float64) ** -exponent
    return (lowest + (highest - lowest) * (law - law[-1]) / (law[0] - law[-1])).float()


def breadth_first_children(config: WorldConfig) -> Int[Tensor, "G C"]:
    """Children of every feature; -1 for features that have none."""
    children = torch.full((config.n_features, config.branching), -1, dtype=torch.int64)
    first, size = 0, config.roots
    for _ in range(config.depth):
        ids = torch.arange(size * config.branching) + first + size
        children[first : first + size] = ids.view(size, config.branching)
        first, size = first + size, size * config.branching
    return children


def compensated(probability: Float[Tensor, " G"], children: Int[Tensor, "G C"], exclusive: bool) -> Float[Tensor, " G"]:
    """Probability of firing where the parent fires: p/p_parent (1 + sum_siblings p_sibling/p_parent), at most 1."""
    conditional = probability.clone()
    parents, slots = (children >= 0).nonzero(as_tuple=True)
    given = probability[children.clamp(min=0)] / probability[:, None] * (children >= 0)
    siblings = (given.sum(1, keepdim=True) - given) if exclusive else torch.zeros_like(given)
    conditional[children[parents, slots]] = (given * (1 + siblings))[parents, slots]
    return conditional.clamp(max=1.0)


@torch.no_grad()
def spread_directions(rows: Float[Tensor, "G D"], steps: int, lr: float) -> Float[Tensor, "G D"]:
    """Unit rows pushed apart by Adam on sum_{i!=j} (d_i . d_j)^2 + G sum_i (||d_i||^2 - 1)^2.

    The gradient needs only the D x D Gram matrix, sum_j (d_i . d_j) d_j = d_i (D^T D), so the full world takes seconds
    where pairs of rows would take minutes. With no more features than dimensions the minimum is known, an orthonormal
    set, and taken directly.
    """
    n_features, width = rows.shape
    rows = F.normalize(rows, dim=1)
    if n_features <= width:
        return torch.linalg.qr(rows.T.double())[0].T.to(rows).contiguous()
    rows.requires_grad_()
    optimiser = torch.optim.Adam([rows], lr=lr)
    for _ in range(steps):
        squares = rows.square().sum(1, keepdim=True)
        rows.grad = 4 * (rows @ (rows.T @ rows) - squares * rows + n_features * (squares - 1) * rows)
        optimiser.step()
    return F.normalize(rows.detach(), dim=1)
