"""What selective decorrelation is compared with, behind the same interface.

none (the control), global (all pairs), static groups (fixed subsets instead of the top pairs), OrtSAE's chunked
decoder penalty, and random pairs (as many as S, the control for "selective").
"""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from unbraid.decorrelation import coactive, token_gram
from unbraid.decorrelation.base import Penalty
from unbraid.decorrelation.decoder_rows import UnitRows, unit_rows
from unbraid.decorrelation.entries import Batch, Entries
from unbraid.decorrelation.hinge import Evaluation, add_at
from unbraid.decorrelation.measure import Measure
from unbraid.decorrelation.penalty import SelectiveDecorrelation
from unbraid.decorrelation.selection import Selection, live_pairs, low_support
from unbraid.decorrelation.stats import DecorrelationStats, stats_of
from unbraid.decorrelation.threshold import Threshold
from unbraid.randomness import derive_seed, generator


class NoDecorrelation(Penalty):
    """The control: zero."""

    def __init__(self):
        super().__init__(interval=1, seed=0, space="codes")

    def find(
        self, batch: Batch | None, decoder: Tensor | None, acts: bool
    ) -> tuple[Evaluation | None, DecorrelationStats]:
        """See `Penalty.find`."""
        return None, DecorrelationStats("none", refreshed=False, penalised=False)


class GlobalDecorrelation(Penalty):
    """The mean of C^2 over all live pairs, value and gradient linear in N through the B x B Gram of the tokens."""

    def __init__(self, measure: Measure, interval: int, seed: int):
        super().__init__(interval, seed, space="codes")
        self.measure: Measure = measure

    def find(
        self, batch: Batch | None, decoder: Tensor | None, acts: bool
    ) -> tuple[Evaluation | None, DecorrelationStats]:
        """See `Penalty.find`."""
        assert batch is not None
        if not acts:
            return None, DecorrelationStats("global", refreshed=False, penalised=False)
        found, mean, std, n_live = token_gram.mean_square(batch.entries, self.measure)
        stats = DecorrelationStats(
            "global", found.penalty, mean=mean, std=std, n_live=n_live, nominal=live_pairs(n_live)
        )
        return found, dataclasses.replace(stats, co_activations=batch.co_activations)


class StaticGroups(Penalty):
    """The hinge of Eq. 3 over all live pairs inside fixed random subsets of features, tau = mu + sigma over the same.

    Args:
        groups: number of subsets; their sizes differ by one at most.
    """

    def __init__(self, groups: int, measure: Measure, threshold: Threshold, interval: int, seed: int):
        super().__init__(interval, seed, space="codes")
        self.groups, self.threshold = groups, threshold
        self.remembers = threshold.kind == "running"
        self.measure: Measure = measure

    def group_of(self, n_features: int) -> Tensor:
        """[N] group of every feature, the same on every call; sizes differ by one at most."""
        order = torch.randperm(n_features, generator=generator(self.seed, "static groups"))
        return torch.empty_like(order).index_copy_(0, order, torch.arange(n_features) % self.groups)

    def find(
        self, batch: Batch | None, decoder: Tensor | None, acts: bool
    ) -> tuple[Evaluation | None, DecorrelationStats]:
        """See `Penalty.find`."""
        assert batch is not None
        if not acts:
            return None, DecorrelationStats("static groups", refreshed=False, penalised=False)
        entries = batch.entries
        selection, tau = self._choose(entries)
        found = coactive.evaluate(entries, selection.first, selection.second, selection.nominal, tau, self.measure)
        stats = stats_of("static groups", selection, tau, found)
        return found, dataclasses.replace(stats, co_activations=batch.co_activations)

    def remember(self, batch: Batch | None, decoder: Tensor | None, acts: bool) -> None:
        """See `Penalty.remember`."""
        if acts and batch is not None:
            self._choose(batch.entries)

    def _choose(self, entries: Entries) -> tuple[Selection, float]:
        groups = self.group_of(entries.n_features).to(entries.indices.device)
        selection = coactive.select_inside_groups(entries, groups, self.groups, self.measure)
        return selection, self.threshold(selection.mean, selection.std, selection.n_live, entries.n_rows)


class RandomPairs(SelectiveDecorrelation):
    """As many pairs as S, drawn at random from the live pairs at every selection; tau as for S."""

    def select(self, entries: Entries, path: str) -> Selection:
        """Random pairs in the place of the top ones."""
        selection = super().select(entries, path)
        live = (entries.supported(self.config.min_support).support > 0).nonzero().squeeze(1)
        draw = derive_seed(self.seed, "random pairs", float(entries.values.sum(dtype=torch.float64)).hex())
        numbers = distinct_numbers(live_pairs(live.numel()), selection.nominal, draw).to(live.device)
        first, second = pairs_of_numbers(numbers)
        first, second = live[first], live[second]
        drawn = dataclasses.replace(
            selection,
            first=first,
            second=second,
            correlations=torch.zeros_like(first, dtype=selection.correlations.dtype),
            limit="fraction",
            low_support=low_support(entries.support, first, second),
        )
        return drawn if self.shard is None else drawn.of(self.shard)


class OrthogonalDecoder(Penalty):
    """OrtSAE (arXiv 2509.22033): mean over random chunks of mean over features of (max cosine within the chunk)^2."""

    def __init__(self, chunk: int, interval: int, seed: int):
        super().__init__(interval, seed, space="decoder", counts_calls=True)
        self.chunk = chunk

    def find(
        self, batch: Batch | None, decoder: Tensor | None, acts: bool
    ) -> tuple[Evaluation | None, DecorrelationStats]:
        """See `Penalty.find`."""
        assert decoder is not None
        if not acts:
            return None, DecorrelationStats("orthogonal", refreshed=False, penalised=False)
        order = torch.randperm(decoder.shape[0], generator=generator(self.seed, "orthogonal", int(self.step)))
        found = nearest_in_chunk(unit_rows(decoder), order.to(decoder.device), self.chunk)
        return found, DecorrelationStats("orthogonal", found.penalty)


def nearest_in_chunk(rows: UnitRows, order: Tensor, size: int) -> Evaluation:
    """mean_chunks mean_i (max_{j in chunk, j != i} cos(d_i, d_j))^2 over ceil(N / size) chunks of `order`."""
    unit_ND, n_rows = rows.unit_ND, rows.unit_ND.shape[0]
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
