"""Decoder rows pushed apart at each site they write into, not as a whole: `decorrelation.by_site`.

Two rows of a crosscoder that overlap at one site and oppose each other at another have a cosine of nothing as wholes.
Here each site has pairs and a threshold of its own. What is compared is a site's share in the cosine of the whole rows,
w_i[l] . w_j[l] / (||w_i|| ||w_j||); the shares of all sites add up to it. A cosine of the rows at a site alone would be
steep without bound where a feature hardly writes there.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from unbraid.decorrelation.base import Penalty
from unbraid.decorrelation.penalty import SelectiveConfig, SelectiveDecorrelation
from unbraid.decorrelation.selection import Evaluation
from unbraid.decorrelation.stats import DecorrelationStats
from unbraid.distributed.shard import Shard
from unbraid.kernels.codes import Codes

MEANS = ("penalty", "tau", "mean", "std", "cut")


class BySite(Penalty):
    """The mean over sites of selective decorrelation among decoder rows.

    Its stats hold the pairs of all sites; tau, mean, std and cut are means over sites.

    Args:
        config: with space "decoder".
        widths: columns of the decoder that belong to each site, in order.
        seed: of everything random.

    Example:
        >>> penalty = BySite(SelectiveConfig(space="decoder", path="tiled", fraction=1.0), (2, 2), seed=0)
        >>> opposed = torch.tensor([[1.0, 0.0, 1.0, 0.0], [1.0, 0.0, -1.0, 0.0], [0.0, 1.0, 0.0, 1.0]])
        >>> value, stats = penalty(decoder=opposed)
        >>> stats.pairs.tolist(), [round(found, 3) for found in stats.correlations.tolist()]
        ([[0, 1]], [0.5])
    """

    def __init__(self, config: SelectiveConfig, widths: Sequence[int], seed: int):
        super().__init__(config.interval, seed, "decoder", counts_calls=True)
        self.sites = nn.ModuleList(SelectiveDecorrelation.from_settings(config, seed) for _ in widths)
        for one, (start, end) in zip(self._each(), pairwise((0, *accumulate(widths))), strict=True):
            one.columns = slice(start, end)
            self.reads_codes = one.reads_codes
        self.remembers = True

    @classmethod
    def from_settings(cls, config: Any, seed: int, widths: Sequence[int] = ()) -> "BySite":
        """See `Penalty.from_settings`."""
        return cls(config, widths, seed)

    def split(self, shard: Shard) -> None:
        """See `Penalty.split`."""
        super().split(shard)
        for one in self._each():
            one.split(shard)

    def takes_dense(self, f_BN: Tensor) -> bool:
        """Firings are only counted."""
        return True

    def find(
        self, codes: Codes | Tensor | None, decoder: Tensor | None, acts: bool
    ) -> tuple[Evaluation | None, DecorrelationStats]:
        """See `Penalty.find`."""
        each = [one.find(codes, decoder, acts) for one in self._each()]
        stats = _together([stats for _, stats in each])
        found = [evaluation for evaluation, _ in each if evaluation is not None]
        if not found:
            return None, stats
        gradient = torch.stack([one.gradient for one in found]).mean(0)
        return Evaluation(stats.penalty, gradient, stats.found), stats

    def remember(self, codes: Codes | Tensor | None, decoder: Tensor | None, acts: bool) -> None:
        """See `Penalty.remember`."""
        for one in self._each():
            one.remember(codes, decoder, acts)

    def _each(self) -> list[SelectiveDecorrelation]:
        return [one for one in self.sites if isinstance(one, SelectiveDecorrelation)]


def _together(stats: Sequence[DecorrelationStats]) -> DecorrelationStats:
    """Those of all sites as one: their pairs, and means of their numbers."""
    first, second, found = (torch.cat([getattr(one, name) for one in stats]) for name in ("first", "second", "found"))
    means = {name: sum(getattr(one, name) for one in stats) / len(stats) for name in MEANS}
    overlaps = [one.overlap for one in stats if one.overlap is not None]
    above = [(one.found > one.tau).double() for one in stats]
    return replace(
        stats[0],
        **means,
        first=first,
        second=second,
        found=found,
        nominal=sum(one.nominal for one in stats),
        overlap=sum(overlaps) / len(overlaps) if overlaps else None,
        above_tau=float(torch.cat(above).mean()) if found.numel() else None,
    )
