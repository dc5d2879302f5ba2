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
    blocks: Blocks | None = None
    """Where S was found, if not on an exact path."""

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
        self.remembers = remembers or self.firing is not None or threshold == "running"
        self.reads_codes = self.reads_codes or self.firing is not None

    def exact_selection(self, decoder: Tensor) -> Selection:
        """The true top pairs of decoder rows, on demand: O(N^2 D)."""
        unit_ND = unit_rows(require_decoder(decoder, None)).unit_ND
        return select_exactly(unit_ND, self.config.fraction, self.config.max_pairs_per_feature)

    def find(
        self, batch: Batch | None, decoder: Tensor | None, acts: bool
    ) -> tuple[Evaluation | None, DecorrelationStats]:
        """See `Penalty.find`."""
        path, rows = self._path(batch), self._rows(decoder, acts)
        chosen = self._choose(batch, decoder, rows, path, acts)
        if chosen is None:
            filling = self.selection is not None and path != "blocks"
            return None, DecorrelationStats("filling" if filling else path, refreshed=False, penalised=False)
        found = None
        if not acts:
            pass
        elif rows is not None:
            found = self._push_rows(rows, chosen)
        elif chosen.blocks is not None:
            found = chosen.blocks.evaluate(chosen.selection, chosen.tau)
        else:
            assert batch is not None
            found = EXACT_PATHS[path].evaluate(batch.entries, *chosen.penalised, self.config.measure)
        if found is not None and self.shard is not None and batch is not None:
            found = completed(found, self.shard.ranks, batch.entries.values.dtype)
        return found, self._stats(path, batch, chosen, found)

    def remember(self, batch: Batch | None, decoder: Tensor | None, acts: bool) -> None:
        """See `Penalty.remember`."""
        self._choose(batch, decoder, self._rows(decoder, acts), self._path(batch), acts)

    def _rows(self, decoder: Tensor | None, acts: bool) -> UnitRows | None:
        """Decoder rows where they are compared on this call; a call between two penalties costs nothing."""
        if self.space == "codes" or decoder is None or not (acts or self.space == "co-active"):
            return None
        return unit_rows(decoder)

    def _path(self, batch: Batch | None) -> str:
        if self.space == "decoder":
            return "tiled" if self.lists is None else "neighbours"
        assert batch is not None
        return self.path_for(batch)

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

    def _choose(
        self, batch: Batch | None, decoder: Tensor | None, rows: UnitRows | None, path: str, acts: bool
    ) -> Chosen | None:
        """S for this call, if there is one; everything that is remembered changes here."""
        if self.firing is not None and self.training:
            assert batch is not None
            self.firing.add(batch.support)
        if self.space == "decoder":
            assert decoder is not None and self.selection is not None
            self.selection.require_width(len(decoder))
            return self._choose_decoder_rows(rows, path)
        assert batch is not None
        if path == "blocks":
            return self._choose_in_blocks(batch, rows) if acts else None
        entries = batch.entries
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

    def _choose_in_blocks(self, batch: Batch, rows: UnitRows | None) -> Chosen:
        """Codes too dense to remember or to list: S of this batch, block by block."""
        # Drawn from the codes themselves: a resumed run draws the same partition, and nothing has to be remembered.
        seed = derive_seed(self.seed, "blocks", float(batch.source.sum(dtype=torch.float64)).hex())
        blocks = Blocks(batch, self.config.block, self.config.min_support, self.config.measure, seed)
        selection = blocks.select(self.config.fraction, self.config.max_pairs_per_feature)
        return dataclasses.replace(self._with_tau(selection, rows, batch.n_rows), blocks=blocks)

    def _choose_decoder_rows(self, rows: UnitRows | None, path: str) -> Chosen | None:
        assert self.selection is not None
        if self.training:
            self.selection.age()
        refreshed = False
        if rows is not None and self.training:
            refreshed = not self.selection.known or self.selection.calls_since >= self.refresh
            if self.lists is not None:
                self.lists.scan(rows.unit_ND)
                refreshed = refreshed and self.lists.complete
        if rows is not None and refreshed:
            wanted = self.config.fraction, self.config.max_pairs_per_feature
            found = self.lists.select(rows, *wanted) if self.lists else select_exactly(rows.unit_ND, *wanted)
            self._remember(self._with_tau(found, rows, 0), path, len(rows.unit_ND))
        return self._in_force(refreshed)

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
            co_activations=None if batch is None or self.space == "decoder" else batch.co_activations,
            overlap=chosen.overlap,
            refreshed=chosen.refreshed,
        )
