"""What selective decorrelation is compared with, behind the same interface.

none (the control), global (all pairs), static groups (fixed subsets instead of the top pairs), OrtSAE's chunked
decoder penalty, and random pairs (as many as S, the control for "selective").
"""

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from unbraid.config import DecorrelationConfig, PenaltyConfig, active_when
from unbraid.config import Floor as ThresholdFloor
from unbraid.decorrelation import coactive
from unbraid.decorrelation.base import Penalty, register
from unbraid.decorrelation.blocks import entries_of_block
from unbraid.decorrelation.coactive import scaled
from unbraid.decorrelation.decoder_rows import unit_rows
from unbraid.decorrelation.penalty import PairsConfig, SelectiveDecorrelation
from unbraid.decorrelation.selection import (
    Evaluation,
    Measure,
    Scaled,
    Selection,
    add_at,
    live_pairs,
    low_support,
    moments,
)
from unbraid.decorrelation.stats import DecorrelationStats, stats_of
from unbraid.decorrelation.window import Threshold
from unbraid.kernels.codes import Codes
from unbraid.randomness import derive_seed, generator

RARE = 64
"""Firings up to which listing n^2 products beats a dense column of a B x B product."""
COLUMNS = 512
"""Dense columns at a time."""
MEETINGS = 1_000_000
"""Listed products at a time."""


class NoneConfig(DecorrelationConfig):
    """No penalty: the control."""

    method: Literal["none"] = "none"


class GlobalConfig(PenaltyConfig):
    """Every live pair."""

    method: Literal["global"] = "global"
    measure: Literal["cosine", "pearson"] = "cosine"
    """Correlation of two features over a batch."""


class StaticGroupsConfig(PenaltyConfig):
    """Fixed random subsets of the features."""

    method: Literal["static_groups"] = "static_groups"
    groups: int = Field(default=64, ge=1)
    """Number of subsets."""
    measure: Literal["cosine", "pearson"] = "cosine"
    """Correlation of two features over a batch."""
    threshold: Literal["batch", "running", "fixed"] = "batch"
    """tau: mu + sigma of this batch, its running mean, or `tau`."""
    tau: Annotated[float, active_when(threshold="fixed")] = Field(default=0.2, ge=0.0, lt=1.0)
    """The fixed threshold."""
    threshold_decay: Annotated[float, active_when(threshold="running")] = Field(default=0.99, ge=0.0, lt=1.0)
    """Decay of the running mean."""
    floor: Annotated[ThresholdFloor, active_when(threshold=("batch", "running"))] = None
    """tau never falls below this cosine, or this share of chance level."""

    def problem_with_width(self, n_features: int) -> str | None:
        """Groups must not be empty."""
        if self.groups <= n_features:
            return None
        return (
            f"decorrelation.groups = {self.groups} exceeds the SAE's {n_features} features; expected at most one each"
        )


class OrthogonalConfig(PenaltyConfig):
    """Nearest decoder rows within random chunks (OrtSAE)."""

    method: Literal["orthogonal"] = "orthogonal"
    chunk: int = Field(default=8192, ge=2)
    """Features per random chunk."""


class RandomPairsConfig(PairsConfig):
    """As many pairs as the selective method takes, at random."""

    method: Literal["random_pairs"] = "random_pairs"
    space: Literal["codes", "co-active"] = "codes"
    """codes: correlation of codes; co-active: the pairs' decoder rows."""


@register
class NoDecorrelation(Penalty):
    """The control: zero."""

    settings = NoneConfig

    def __init__(self):
        super().__init__(interval=1, seed=0, space="codes")

    @classmethod
    def from_settings(cls, config: NoneConfig, seed: int) -> "NoDecorrelation":
        """See `Penalty.from_settings`."""
        return cls()

    def find(
        self, codes: Codes | Tensor | None, decoder: Tensor | None, acts: bool
    ) -> tuple[Evaluation | None, DecorrelationStats]:
        """See `Penalty.find`."""
        return None, DecorrelationStats("none", refreshed=False, penalised=False)

    def takes_dense(self, f_BN: Tensor) -> bool:
        """They are not looked at."""
        return True

    @property
    def takes_padding(self) -> bool:
        """They are not looked at."""
        return True


@register
class GlobalDecorrelation(Penalty):
    """The mean of C^2 over all live pairs, value and gradient linear in N through the B x B Gram of the tokens."""

    settings = GlobalConfig

    def __init__(self, measure: Measure, interval: int, seed: int):
        super().__init__(interval, seed, space="codes")
        self.measure: Measure = measure

    @classmethod
    def from_settings(cls, config: GlobalConfig, seed: int) -> "GlobalDecorrelation":
        """See `Penalty.from_settings`."""
        return cls(config.measure, config.interval, seed)

    def find(
        self, codes: Codes | Tensor | None, decoder: Tensor | None, acts: bool
    ) -> tuple[Evaluation | None, DecorrelationStats]:
        """See `Penalty.find`."""
        assert isinstance(codes, Codes)
        found, mean, std, n_live = mean_square(codes, self.measure)
        return found, DecorrelationStats(
            "global",
            found.penalty,
            mean=mean,
            std=std,
            n_live=n_live,
            nominal=live_pairs(n_live),
            co_activations=codes.co_activations(),
        )


@register
class StaticGroups(Penalty):
    """The hinge of Eq. 3 over all live pairs inside fixed random subsets of features, tau = mu + sigma over the same.

    Args:
        groups: number of subsets; their sizes differ by one at most.
    """

    settings = StaticGroupsConfig

    def __init__(self, groups: int, measure: Measure, threshold: Threshold, interval: int, seed: int):
        super().__init__(interval, seed, space="codes")
        self.groups, self.threshold = groups, threshold
        self.remembers = threshold.kind == "running"
        self.measure: Measure = measure

    @classmethod
    def from_settings(cls, config: StaticGroupsConfig, seed: int) -> "StaticGroups":
        """See `Penalty.from_settings`."""
        threshold = Threshold(config.threshold, config.tau, config.threshold_decay, config.floor)
        return cls(config.groups, config.measure, threshold, config.interval, seed)

    def group_of(self, n_features: int) -> Tensor:
        """[N] group of every feature, the same on every call; sizes differ by one at most."""
        order = torch.randperm(n_features, generator=generator(self.seed, "static groups"))
        return torch.empty_like(order).index_copy_(0, order, torch.arange(n_features) % self.groups)

    def find(
        self, codes: Codes | Tensor | None, decoder: Tensor | None, acts: bool
    ) -> tuple[Evaluation | None, DecorrelationStats]:
        """See `Penalty.find`."""
        assert isinstance(codes, Codes)
        if not acts:
            return None, DecorrelationStats("skipped", refreshed=False, penalised=False)
        selection = self._select(codes)
        found = coactive.evaluate(codes, selection, self.measure)
        return found, stats_of("static groups", selection, found, codes.co_activations())

    def remember(self, codes: Codes | Tensor | None, decoder: Tensor | None, acts: bool) -> None:
        """See `Penalty.remember`."""
        if acts and isinstance(codes, Codes):
            self._select(codes)

    def _select(self, codes: Codes) -> Selection:
        groups = self.group_of(codes.n_features).to(codes.indices.device)
        selection = coactive.select_inside_groups(codes, groups, self.groups, self.measure)
        tau = self.threshold(selection.mean, selection.std, selection.n_live, codes.n_rows)
        return dataclasses.replace(selection, tau=tau)


@register
class RandomPairs(SelectiveDecorrelation):
    """As many pairs as S, drawn at random from the live pairs at every selection; tau as for S."""

    settings = RandomPairsConfig

    def top_pairs(self, codes: Codes) -> Selection:
        """Random pairs in the place of the top ones."""
        selection = super().top_pairs(codes)
        live = (codes.support >= self.config.min_support).nonzero().squeeze(1)
        draw = derive_seed(self.seed, "random pairs", float(codes.values.sum(dtype=torch.float64)).hex())
        numbers = distinct_numbers(live_pairs(live.numel()), selection.nominal, draw).to(live.device)
        first, second = pairs_of_numbers(numbers)
        first, second = live[first], live[second]
        drawn = dataclasses.replace(
            selection,
            first=first,
            second=second,
            correlations=torch.zeros_like(first, dtype=selection.correlations.dtype),
            limit="fraction",
            low_support=low_support(codes.support, first, second),
        )
        return drawn if self.shard is None else drawn.of(self.shard)


@register
class OrthogonalDecoder(Penalty):
    """OrtSAE (arXiv 2509.22033): mean over random chunks of mean over features of (max cosine within the chunk)^2."""

    settings = OrthogonalConfig

    def __init__(self, chunk: int, interval: int, seed: int):
        super().__init__(interval, seed, space="decoder", counts_calls=True)
        self.chunk = chunk

    @classmethod
    def from_settings(cls, config: OrthogonalConfig, seed: int) -> "OrthogonalDecoder":
        """See `Penalty.from_settings`."""
        return cls(config.chunk, config.interval, seed)

    def find(
        self, codes: Codes | Tensor | None, decoder: Tensor | None, acts: bool
    ) -> tuple[Evaluation | None, DecorrelationStats]:
        """See `Penalty.find`."""
        assert decoder is not None
        order = torch.randperm(decoder.shape[0], generator=generator(self.seed, "orthogonal", int(self.step)))
        found = nearest_in_chunk(unit_rows(decoder), order.to(decoder.device), self.chunk)
        return found, DecorrelationStats("orthogonal", found.penalty)


def nearest_in_chunk(rows: Scaled, order: Tensor, size: int) -> Evaluation:
    """mean_chunks mean_i (max_{j in chunk, j != i} cos(d_i, d_j))^2 over ceil(N / size) chunks of `order`."""
    unit_ND, n_rows = rows.values, rows.values.shape[0]
    gradient = torch.zeros_like(unit_ND)
    nearest = unit_ND.new_zeros(n_rows)
    value, chunks = 0.0, [chunk for chunk in order.tensor_split(max(1, -(-n_rows // size))) if chunk.numel() > 1]
    for chunk in chunks:
        chunk_CD = unit_ND[chunk]
        best, partner = largest_off_diagonal(chunk_CD)
        nearest[chunk] = best
        value += float((best.double() ** 2).mean()) / len(chunks)
        slope = 2 * best / (chunk.numel() * len(chunks))
        pull_CD = slope.unsqueeze(1) * (chunk_CD[partner] - best.unsqueeze(1) * chunk_CD)
        push_CD = slope.unsqueeze(1) * (chunk_CD - best.unsqueeze(1) * chunk_CD[partner])
        gradient[chunk] = add_at(pull_CD, partner, push_CD)
    return Evaluation(value, gradient * rows.inverse_norm.to(unit_ND.dtype).unsqueeze(1), nearest.double())


def largest_off_diagonal(unit_CD: Float[Tensor, "C D"], tile: int = 1024) -> tuple[Tensor, Tensor]:
    """For each row the largest cosine with another, and which (the first of equals)."""
    best, partner = [], []
    for start in range(0, unit_CD.shape[0], tile):
        cosines = unit_CD[start : start + tile] @ unit_CD.T
        own = torch.arange(cosines.shape[0], device=unit_CD.device)
        cosines[own, own + start] = -2.0
        largest = cosines.max(1)
        best.append(largest.values)
        partner.append(largest.indices)
    return torch.cat(best), torch.cat(partner)


def distinct_numbers(below: int, count: int, seed: int) -> Tensor:
    """`count` distinct numbers in 0..below - 1, uniformly: all, or by drawing until there are enough."""
    draws = torch.Generator().manual_seed(seed)
    if 2 * count >= below:
        return torch.randperm(below, generator=draws)[:count]
    found = torch.empty(0, dtype=torch.int64)
    while found.numel() < count:
        more = torch.randint(below, (count + 64,), generator=draws)
        joined = torch.cat([found, more])
        _, place = torch.unique(joined, return_inverse=True)
        first_seen = torch.full((int(place.max()) + 1,), joined.numel()).scatter_reduce_(
            0, place, torch.arange(joined.numel()), "amin"
        )
        found = joined[torch.sort(first_seen)[0]][:count]
    return found


def pairs_of_numbers(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Pair number n = j (j - 1) / 2 + i  ->  i < j."""
    second = ((1 + (1 + 8 * numbers.double()).sqrt()) / 2).floor().long()
    second = torch.where(second * (second - 1) // 2 > numbers, second - 1, second)
    second = torch.where(second * (second + 1) // 2 <= numbers, second + 1, second)
    return numbers - second * (second - 1) // 2, second


def mean_square(codes: Codes, measure: Measure) -> tuple[Evaluation, float, float, int]:
    """The mean of C^2 over live pairs, its gradient at active entries, mu, sigma, and the number of live features."""
    z = scaled(codes, measure)
    values = z.values  # Stays float64 for Pearson, where the Gram matrix is centred after the product.
    if z.shift is None:
        values = values.to(torch.promote_types(codes.values.dtype, torch.float32))
    n_live = int((codes.support > 0).sum())
    n_pairs = live_pairs(n_live)
    gram_BB = token_gram(codes, values)
    row_sums = add_at(z.values.new_zeros(codes.n_rows), codes.rows(), z.values)
    norms = add_at(torch.zeros_like(z.inverse_norm), codes.indices, z.values**2)
    if z.shift is not None:
        gram_BB = gram_BB - gram_BB.mean(0) - gram_BB.mean(1, keepdim=True) + gram_BB.mean()
        row_sums = row_sums - z.shift.sum() / max(codes.n_rows, 1) ** 0.5
        norms = norms - z.shift**2
    squares = float(torch.linalg.vector_norm(gram_BB, dtype=torch.float64)) ** 2
    mean, std = moments(float((row_sums**2).sum() - norms.sum()) / 2, (squares - float((norms**2).sum())) / 2, n_pairs)
    slope = times_codes(gram_BB, codes, values).double() * (2 / max(n_pairs, 1))
    own = add_at(torch.zeros_like(z.inverse_norm), codes.indices, slope * z.values)[codes.indices]
    centred = z.values
    if z.shift is not None:
        centred = z.values - (z.shift / max(codes.n_rows, 1) ** 0.5)[codes.indices]
    movable = torch.where(codes.support > 1, z.inverse_norm, 0.0)[codes.indices]
    value = mean * mean + std * std
    return Evaluation(value, (slope - own * centred) * movable, torch.empty(0, dtype=torch.float64)), mean, std, n_live


def token_gram(codes: Codes, values: Tensor) -> Tensor:
    """Z Z^T [B, B]."""
    n_rows = codes.n_rows
    gram = values.new_zeros(n_rows * n_rows)
    for one, other in meetings_of_rare_features(codes):
        gram = add_at(gram, codes.rows()[one] * n_rows + codes.rows()[other], values[one] * values[other])
    gram_BB = gram.reshape(n_rows, n_rows)
    for ids, rows, columns, width in dense_features(codes):
        z_Bc = values.new_zeros(n_rows, width)
        z_Bc[rows, columns] = values[ids]
        gram_BB.addmm_(z_Bc, z_Bc.T)
    return gram_BB


def times_codes(gram_BB: Tensor, codes: Codes, values: Tensor) -> Tensor:
    """(Z Z^T) Z at the active entries."""
    out = torch.zeros_like(values)
    for one, other in meetings_of_rare_features(codes):
        out = add_at(out, one, gram_BB[codes.rows()[one], codes.rows()[other]] * values[other])
    for ids, rows, columns, width in dense_features(codes):
        z_Bc = values.new_zeros(codes.n_rows, width)
        z_Bc[rows, columns] = values[ids]
        out[ids] = (gram_BB @ z_Bc)[rows, columns]
    return out


def dense_features(codes: Codes) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
    """Frequent features, a few at a time: their entries, rows and columns, and how many features."""
    for block in (codes.support > RARE).nonzero().squeeze(1).split(COLUMNS):
        yield *entries_of_block(codes, block), block.numel()


def meetings_of_rare_features(codes: Codes) -> Iterator[tuple[Tensor, Tensor]]:
    """All ordered pairs of entries (an entry with itself, too) of the same rare feature."""
    support = codes.support
    rare = ((support > 0) & (support <= RARE)).nonzero().squeeze(1)
    for block in rare.split(MEETINGS // RARE**2):
        ids, _, columns = entries_of_block(codes, block)
        lengths = support[block]
        repeats = lengths[columns]
        one = torch.repeat_interleave(torch.arange(ids.numel(), device=ids.device), repeats)
        run_starts = repeats.cumsum(0) - repeats
        feature_starts = lengths.cumsum(0) - lengths
        other = torch.arange(one.numel(), device=ids.device) - run_starts[one] + feature_starts[columns][one]
        yield ids[one], ids[other]
