"""`SelectiveDecorrelation`: find the most entangled pairs of features, push only those apart.

It chooses the cheapest path that is right for the codes it gets (exact from co-activations while W fits a budget,
random blocks above it) and remembers what it needs between calls as tensors. It never sees a trainer.
"""

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from unbraid.config import DecorrelationConfig, Floor, validated
from unbraid.decorrelation import coactive, naive, tiled
from unbraid.decorrelation.across import completed
from unbraid.decorrelation.base import DEFAULTS, Penalty
from unbraid.decorrelation.blocks import Blocks
from unbraid.decorrelation.decoder_rows import (
    UnitRows,
    evaluate_rows,
    require_decoder,
    row_moments,
    select_exactly,
    unit_rows,
)
from unbraid.decorrelation.entries import Batch, Entries
from unbraid.decorrelation.hinge import Evaluation
from unbraid.decorrelation.measure import Measure
from unbraid.decorrelation.neighbours import NeighbourLists
from unbraid.decorrelation.selection import Selection
from unbraid.decorrelation.stats import DecorrelationStats, stats_of
from unbraid.decorrelation.threshold import Threshold, ThresholdKind
from unbraid.decorrelation.window import CodesWindow, FiringCounts, RememberedSelection
from unbraid.randomness import derive_seed

EXACT_PATHS = {"coactive": coactive, "tiled": tiled, "naive": naive}


@dataclasses.dataclass(frozen=True)
class Chosen:
    """S and tau for one call, and where they come from."""

    selection: Selection
    tau: float
    refreshed: bool
    overlap: float | None = None

    @property
    def penalised(self) -> tuple[Tensor, Tensor, int, float]:
        """What a path needs to evaluate R: the pairs, |S| and tau."""
        return self.selection.first, self.selection.second, self.selection.nominal, self.tau


class SelectiveDecorrelation(Penalty):
    """R(tau) = 1/|S| sum over S of relu(C - tau), S the `fraction` most correlated live pairs (Eq. 2-4).

    Settings, their defaults and their meaning are those of `DecorrelationConfig`. With window = refresh = 1 every call
    stands for itself and there is no state; otherwise `state_dict` holds the window and the selection in force, and
    the penalty is zero until the window is full for the first time.

    Example:
        >>> decorrelate = SelectiveDecorrelation(fraction=0.5)
        >>> penalty, stats = decorrelate(torch.tensor([[1.0, 2.0, 0.0], [3.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
        >>> stats.pairs.tolist(), stats.n_live
        ([[0, 1]], 3)
    """

    def __init__(
        self,
        fraction: float = DEFAULTS.fraction,
        window: int = DEFAULTS.window,
        min_support: int = DEFAULTS.min_support,
        measure: Measure = DEFAULTS.measure,
        space: Literal["codes", "decoder", "co-active"] = DEFAULTS.space,
        *,
        push: Literal["both", "rarer"] = DEFAULTS.push,
        refresh: int | None = DEFAULTS.refresh,
        interval: int = DEFAULTS.interval,
        threshold: ThresholdKind = DEFAULTS.threshold,
        tau: float = DEFAULTS.tau,
        threshold_decay: float = DEFAULTS.threshold_decay,
        floor: Floor = DEFAULTS.floor,
        max_pairs_per_feature: int | None = DEFAULTS.max_pairs_per_feature,
        path: Literal["auto", "coactive", "blocks", "tiled", "naive"] = DEFAULTS.path,
        pair_budget: int = DEFAULTS.pair_budget,
        block: int = DEFAULTS.block,
        scan_rows: int = DEFAULTS.scan_rows,
        neighbours: int = DEFAULTS.neighbours,
        seed: int = 0,
    ):
        settings = {name: value for name, value in locals().items() if name not in ("self", "seed", "__class__")}
        config = validated(DecorrelationConfig, settings, "SelectiveDecorrelation")
        refresh = config.refresh or config.window
        remembers = config.window > 1 or refresh > 1 or space == "decoder"
        super().__init__(interval, seed, space, counts_calls=remembers)
        self.config, self.refresh = config, refresh
        self.threshold = Threshold(threshold, tau, threshold_decay, floor)
        self.window = CodesWindow(window) if remembers and space != "decoder" else None
        self.lists = NeighbourLists(neighbours, scan_rows) if space == "decoder" and path != "tiled" else None
        self.selection = RememberedSelection() if remembers else None
        self.firing = FiringCounts() if config.push == "rarer" else None
        self.reads_codes = self.reads_codes or self.firing is not None

    def exact_selection(self, decoder: Tensor) -> Selection:
        """The true top pairs of decoder rows, on demand: O(N^2 D)."""
        unit_ND = unit_rows(require_decoder(decoder, None)).unit_ND
        return select_exactly(unit_ND, self.config.fraction, self.config.max_pairs_per_feature)

    def find(
        self, batch: Batch | None, decoder: Tensor | None, acts: bool
    ) -> tuple[Evaluation | None, DecorrelationStats]:
        """See `Penalty.find`."""
        if self.firing is not None and self.training:
            assert batch is not None
            self.firing.add(batch.support)
        if self.space == "decoder":
            assert decoder is not None
            return self._find_among_decoder_rows(decoder, acts)
        assert batch is not None
        rows = None if decoder is None or self.space == "codes" else unit_rows(decoder)
        path = self.path_for(batch)
        if path == "blocks":
            return self._find_in_blocks(batch, rows, acts)
        chosen = self._choose(batch.entries, rows, path, acts)
        if chosen is None:
            return None, DecorrelationStats("filling" if self.selection else path, penalised=False)
        if not acts:
            return None, self._stats(path, batch, chosen, None)
        if rows is not None:
            found = self._push_rows(rows, chosen)
        else:
            found = EXACT_PATHS[path].evaluate(batch.entries, *chosen.penalised, self.config.measure)
        if self.shard is not None:
            found = completed(found, self.shard.ranks, batch.entries.values.dtype)
        return found, self._stats(path, batch, chosen, found)

    def path_for(self, batch: Batch) -> str:
        """The path these codes take."""
        if self.config.path != "auto":
            return self.config.path
        return "coactive" if batch.co_activations <= self.config.pair_budget else "blocks"

    def select(self, entries: Entries, path: str) -> Selection:
        """S of some codes, by an exact path."""
        supported = entries.detach().supported(self.config.min_support)
        wanted = self.config.fraction, self.config.measure, self.config.max_pairs_per_feature
        if self.shard is not None:
            return coactive.select(supported, *wanted, self.shard)
        return EXACT_PATHS[path].select(supported, *wanted)

    def _choose(self, entries: Entries, rows: UnitRows | None, path: str, acts: bool) -> Chosen | None:
        """S for this call: of this batch, or the one in force after looking whether a new one is due."""
        if self.selection is None or self.window is None:
            return self._with_tau(self.select(entries, path), rows, entries.n_rows) if acts else None
        self.selection.require_width(entries.n_features)
        refreshed = False
        if self.training:
            self.selection.age()
            calls, known = self.selection.calls_since, self.selection.known
            if not known or calls + self.window.size > self.refresh:
                self.window.push(entries)
            if acts and self.window.full and (not known or calls >= self.refresh):
                codes = self.window.entries(entries.n_features)
                self._remember(self._with_tau(self.select(codes, path), rows, codes.n_rows), path, entries.n_features)
                self.window.clear()
                refreshed = True
        return self._in_force(refreshed)

    def _in_force(self, refreshed: bool) -> Chosen | None:
        if self.selection is None or not self.selection.known:
            return None
        selection, tau, _, overlap = self.selection.recall()
        return Chosen(selection, tau, refreshed, overlap)

    def _remember(self, chosen: Chosen, path: str, n_features: int) -> None:
        assert self.selection is not None
        self.selection.replace(chosen.selection, chosen.tau, path, n_features)

    def _with_tau(self, selection: Selection, rows: UnitRows | None, n_dimensions: int) -> Chosen:
        """tau in the units of what is penalised: of the codes' correlations, or of the decoder's cosines."""
        n_features = selection.n_live
        if rows is not None:
            n_features, n_dimensions = rows.unit_ND.shape
            if self.space == "co-active":
                mean, std = row_moments(rows.unit_ND)
                selection = dataclasses.replace(selection, mean=mean, std=std)
        tau = self.threshold(selection.mean, selection.std, n_features, n_dimensions)
        return Chosen(selection, tau, refreshed=True)

    def _find_in_blocks(
        self, batch: Batch, rows: UnitRows | None, acts: bool
    ) -> tuple[Evaluation | None, DecorrelationStats]:
        """Codes too dense to remember or to list: select and penalise this batch, block by block."""
        if not acts:
            return None, DecorrelationStats("blocks", co_activations=batch.co_activations, penalised=False)
        # Drawn from the codes themselves: a resumed run draws the same partition, and nothing has to be remembered.
        seed = derive_seed(self.seed, "blocks", float(batch.source.sum(dtype=torch.float64)).hex())
        blocks = Blocks(batch, self.config.block, self.config.min_support, self.config.measure, seed)
        selection = blocks.select(self.config.fraction, self.config.max_pairs_per_feature)
        chosen = self._with_tau(selection, rows, batch.n_rows)
        found = self._push_rows(rows, chosen) if rows is not None else blocks.evaluate(chosen.selection, chosen.tau)
        return found, self._stats("blocks", batch, chosen, found)

    def _find_among_decoder_rows(self, decoder: Tensor, acts: bool) -> tuple[Evaluation | None, DecorrelationStats]:
        assert self.selection is not None
        self.selection.require_width(len(decoder))
        path = "tiled" if self.lists is None else "neighbours"
        if self.training:
            self.selection.age()
        rows, refreshed = unit_rows(decoder) if acts else None, False
        if rows is not None and self.training:  # Between two penalties nothing is looked at: those calls cost nothing.
            refreshed = not self.selection.known or self.selection.calls_since >= self.refresh
            if self.lists is not None:
                self.lists.scan(rows.unit_ND)
                refreshed = refreshed and self.lists.complete
        if rows is not None and refreshed:
            wanted = self.config.fraction, self.config.max_pairs_per_feature
            found = self.lists.select(rows, *wanted) if self.lists else select_exactly(rows.unit_ND, *wanted)
            self._remember(self._with_tau(found, rows, 0), path, len(decoder))
        chosen = self._in_force(refreshed)
        if chosen is None:
            return None, DecorrelationStats("filling", penalised=False)
        if rows is None:
            return None, self._stats(path, None, chosen, None)
        evaluation = self._push_rows(rows, chosen)
        return evaluation, self._stats(path, None, chosen, evaluation)

    def _push_rows(self, rows: UnitRows, chosen: Chosen) -> Evaluation:
        """R over pairs of decoder rows, and who moves how far."""
        pairs = chosen.selection.first, chosen.selection.second
        share = None if self.firing is None else self.firing.first_is_rarer(*pairs)
        return evaluate_rows(rows, *chosen.penalised, share)

    def _stats(self, path: str, batch: Batch | None, chosen: Chosen, found: Evaluation | None) -> DecorrelationStats:
        selection = chosen.selection
        return stats_of(
            path,
            selection,
            chosen.tau,
            found,
            co_activations=0 if batch is None else batch.co_activations,
            overlap=chosen.overlap,
            refreshed=chosen.refreshed,
        )
