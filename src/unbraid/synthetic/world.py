"""A synthetic world: directions that are known, and a way to draw activations made of them.

What fires is a Gaussian copula of low rank (features share a few hidden factors) under a hierarchy: a child fires only
with its parent, scaled by the parent's strength, and at most one sibling at a time. Given the factors all features are
independent, so a child is only ever drawn where its parent fired; that is the same distribution as drawing everything
and zeroing what is not allowed, at a fraction of the random numbers (3x fewer in the full world, 4x in the small one).
Every draw comes from the generator passed in, on the device of the world.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from unbraid.kernels.codes import Codes

BLOCK_ROWS = 16_384
CHUNK_ROWS, CHUNK_ENTRIES = 1024, 1 << 19  # at least, at most: large enough to amortise calls, small enough for cache


@dataclass(frozen=True, eq=False)
class World:
    """True features and their statistics.

    Attributes:
        dictionary: `[G, D]` unit rows, the true directions.
        bias: `[D]`, added to every activation.
        probability: `[G]` intended firing probability of each feature, over all tokens.
        conditional: `[G]` firing probability given that the parent fires, before siblings exclude each other.
        children: `[G, C]` feature ids of each feature's children, -1 where there is none.
        loadings: `[G, R]` weights of the shared factors.
        magnitude: `[G]` mean strength when firing.
        magnitude_sd: `[G]` its standard deviation.
        exclusive: whether at most one child of a parent fires at a time.
    """

    dictionary: Float[Tensor, "G D"]
    bias: Float[Tensor, " D"]
    probability: Float[Tensor, " G"]
    conditional: Float[Tensor, " G"]
    children: Int[Tensor, "G C"]
    loadings: Float[Tensor, "G R"]
    magnitude: Float[Tensor, " G"]
    magnitude_sd: Float[Tensor, " G"]
    exclusive: bool
    _threshold: Tensor = field(init=False, repr=False)
    _own_sd: Tensor = field(init=False, repr=False)
    _top: Tensor = field(init=False, repr=False)
    _is_parent: Tensor = field(init=False, repr=False)

    def __post_init__(self):
        # Fire where loadings . factors + own_sd * noise > threshold, both parts together a standard normal.
        threshold = torch.special.ndtri(1 - self.conditional.double())
        own_sd = (1 - self.loadings.double().square().sum(1)).sqrt()
        derived = {
            "_threshold": threshold.to(self.loadings),
            "_own_sd": own_sd.to(self.loadings),
            "_top": (self.parents < 0).nonzero().squeeze(1),
            "_is_parent": (self.children >= 0).any(1),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    @property
    def n_features(self) -> int:
        """G."""
        return self.dictionary.shape[0]

    @property
    def d_model(self) -> int:
        """D."""
        return self.dictionary.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the world lives and samples are drawn."""
        return self.dictionary.device

    @property
    def parents(self) -> Int[Tensor, " G"]:
        """Each feature's parent, -1 at the top."""
        parents = torch.full((self.n_features,), -1, dtype=torch.int64, device=self.children.device)
        at, which = (self.children >= 0).nonzero(as_tuple=True)
        parents[self.children[at, which]] = at
        return parents

    @property
    def is_parent(self) -> Bool[Tensor, " G"]:
        """Which features have children."""
        return self._is_parent

    def to(self, device: torch.device | str) -> "World":
        """The same world on another device."""
        own = {given.name: getattr(self, given.name) for given in fields(self) if given.init}
        return replace(self, **{name: value.to(device) for name, value in own.items() if isinstance(value, Tensor)})

    def batches(self, size: int, generator: torch.Generator) -> "WorldStream":
        """Activations without end, `size` rows at a time."""
        return WorldStream(self, size, generator)

    def sample(self, n: int, generator: torch.Generator) -> tuple[Float[Tensor, "n D"], Codes]:
        """`n` activations and the true codes they are made of; the same generator state gives the same samples."""
        codes = self.sample_codes(n, generator)
        return self.activations(codes), codes

    def activations(self, codes: Codes) -> Float[Tensor, "n D"]:
        """`codes @ dictionary + bias`."""
        total = F.embedding_bag(
            codes.indices,
            self.dictionary,
            codes.offsets,
            mode="sum",
            per_sample_weights=codes.values,
            include_last_offset=True,
        )
        return total + self.bias

    @torch.no_grad()
    def sample_codes(self, n: int, generator: torch.Generator) -> Codes:
        """True codes of `n` tokens."""
        step = max(CHUNK_ROWS, CHUNK_ENTRIES // self._top.numel())
        keys, values = [], []
        for start in range(0, n, step):
            rows, features, strengths = self._draw(min(step, n - start), generator)
            key, order = ((rows + start) * self.n_features + features).sort()
            keys.append(key)
            values.append(strengths.index_select(0, order))
        key = torch.cat(keys) if keys else torch.zeros(0, dtype=torch.int64, device=self.device)
        strengths = torch.cat(values) if values else self.magnitude[:0]
        rows = key // self.n_features
        counts = torch.bincount(rows, minlength=n)
        return Codes.unchecked(
            F.pad(counts.cumsum(0), (1, 0)), key - rows * self.n_features, strengths, self.n_features
        )

    def _draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(row, feature, strength) of everything that fires on `n` tokens, level by level."""
        factors = self._normal((n, self.loadings.shape[1]), generator)
        drive = self._normal((n, self._top.numel()), generator)
        drive *= self._own_sd[self._top]
        drive = torch.addmm(drive, factors, self.loadings[self._top].T)
        rows, columns = (drive > self._threshold[self._top]).nonzero(as_tuple=True)
        features = self._top.index_select(0, columns)
        strengths = self._strengths(features, generator)
        fired = [self._alive(rows, features, strengths)]
        while fired[-1][0].numel():
            fired.append(self._draw_children(fired[-1], factors, generator))
        rows, features, strengths = (torch.cat(parts) for parts in zip(*fired, strict=True))
        return rows, features, strengths

    def _draw_children(
        self, parents: tuple[Tensor, Tensor, Tensor], factors: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        bearing = self._is_parent.index_select(0, parents[1]).nonzero().squeeze(1)
        rows, features, strengths = (part.index_select(0, bearing) for part in parents)
        children = self.children.index_select(0, features)
        exists, children = children >= 0, children.clamp(min=0)
        shared = (F.embedding(children, self.loadings) @ F.embedding(rows, factors).unsqueeze(2)).squeeze(2)
        drive = shared + self._own_sd[children] * self._normal(children.shape, generator)
        at, which = ((drive > self._threshold[children]) & exists).nonzero(as_tuple=True)
        own = torch.zeros(children.shape, device=self.device, dtype=self.dictionary.dtype)
        own[at, which] = self._strengths(children[at, which], generator)
        if self.exclusive:
            lots = torch.rand(own.shape, generator=generator, device=self.device).masked_fill_(own <= 0, -1.0)
            own *= F.one_hot(lots.argmax(1), own.shape[1])
        at, which = (own > 0).nonzero(as_tuple=True)
        scale = strengths[at] / self.magnitude[features[at]]
        return rows[at], children[at, which], own[at, which] * scale

    def _strengths(self, features: Tensor, generator: torch.Generator) -> Tensor:
        noise = self._normal(features.shape, generator)
        mean, sd = self.magnitude.index_select(0, features), self.magnitude_sd.index_select(0, features)
        return (mean + sd * noise).relu_()

    def _normal(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator, device=self.device, dtype=self.dictionary.dtype)

    @staticmethod
    def _alive(rows: Tensor, features: Tensor, strengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kept = (strengths > 0).nonzero().squeeze(1)
        return rows.index_select(0, kept), features.index_select(0, kept), strengths.index_select(0, kept)


class WorldStream:
    """Batches of activations without end, drawn in larger blocks because small draws are slow; goes on exactly.

    Its state is the generator's before the current block and how much of the block is used, so that a stream that is
    loaded draws the block again.

    Args:
        world: where activations come from.
        size: rows per batch.
        generator: the only source of chance, on the device of the world.
    """

    def __init__(self, world: World, size: int, generator: torch.Generator):
        self.world, self.size, self.generator = world, size, generator
        self.block_rows = size * max(1, BLOCK_ROWS // size)
        self._before, self._used = generator.get_state(), 0
        self._block: Tensor | None = None

    def __iter__(self) -> "WorldStream":
        return self

    def __next__(self) -> Float[Tensor, "size D"]:
        if self._block is None:
            self.generator.set_state(self._before)
            self._block = self._draw()
        if self._used == self.block_rows:
            self._before, self._used = self.generator.get_state(), 0
            self._block = self._draw()
        first, self._used = self._used, self._used + self.size
        return self._block[first : self._used]

    def _draw(self) -> Tensor:
        return self.world.activations(self.world.sample_codes(self.block_rows, self.generator))

    def state_dict(self) -> dict[str, Tensor]:
        """Where the stream is."""
        return {"generator": self._before, "used": torch.tensor(self._used)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from `state_dict()` of a stream of the same world and batch size."""
        self._before, self._used, self._block = state["generator"], int(state["used"]), None
