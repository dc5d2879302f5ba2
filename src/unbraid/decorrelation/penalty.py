"""`SelectiveDecorrelation`: find the most entangled pairs of features, push only those apart.

It chooses the cheapest path that is right for the codes it gets (exact from co-activations while W fits a budget,
random blocks above it) and remembers what it needs between calls as tensors. It never sees a trainer.
"""

import dataclasses
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from unbraid.config import DecorrelationConfig, Floor, PenaltyConfig, active_when, validated
from unbraid.config.checks import wrong
from unbraid.config.sae import SEVERAL_PREDICTED
from unbraid.decorrelation import coactive
from unbraid.decorrelation.base import Penalty, register
from unbraid.decorrelation.blocks import Blocks
from unbraid.decorrelation.decoder_rows import (
    WHOLE,
    NeighbourLists,
    evaluate_rows,
    require_decoder,
    row_moments,
    select_exactly,
    unit_rows,
)
from unbraid.decorrelation.selection import Evaluation, Measure, Scaled, Selection
from unbraid.decorrelation.stats import DecorrelationStats, stats_of
from unbraid.decorrelation.window import CodesWindow, FiringCounts, RememberedSelection, Threshold, ThresholdKind
from unbraid.kernels.codes import Codes, pairs_within
from unbraid.randomness import derive_seed

READS_CODES = ("codes", "co-active")
REMEMBERS = ("auto", "coactive", "tiled")
"""Blocks choose anew on every batch."""


class PairsConfig(PenaltyConfig):
    """Methods that choose pairs, and penalise those alone."""

    selects = True

    space: Literal["codes", "decoder", "co-active"] = "codes"
    """codes: the paper's; decoder: overlap of decoder rows; co-active: pairs chosen by codes, penalised by decoder."""
    push: Annotated[Literal["both", "rarer"], active_when(space=("decoder", "co-active"))] = "both"
    """Whether both rows of a pair move, or only the row of the less frequent feature."""
    measure: Annotated[Literal["cosine", "pearson"], active_when(space=READS_CODES)] = "cosine"
    """Correlation of two features over a batch; cosine is the paper's Eq. 2."""
    window: Annotated[int, active_when(space=READS_CODES, path=REMEMBERS)] = Field(default=1, ge=1, le=4096)
    """Select on the codes of the last M batches, every M steps; 1 is the paper's per-batch form."""
    min_support: Annotated[int, active_when(space=READS_CODES)] = Field(default=1, ge=1)
    """Features that fired fewer times in the window are left out of the selection."""
    refresh: Annotated[int | None, active_when(path=REMEMBERS)] = Field(default=None, ge=1)
    """Re-select every so many steps; none does so every `window` steps."""
    threshold: Literal["batch", "running", "fixed"] = "batch"
    """tau: mu + sigma of this selection, its running mean, or `tau`."""
    tau: Annotated[float, active_when(threshold="fixed")] = Field(default=0.2, ge=0.0, lt=1.0)
    """The fixed threshold."""
    threshold_decay: Annotated[float, active_when(threshold="running")] = Field(default=0.99, ge=0.0, lt=1.0)
    """Decay of the running mean."""
    floor: Annotated[Floor, active_when(threshold=("batch", "running"))] = None
    """tau never falls below this cosine, or this share of chance level, sqrt(2 ln N / D) in decoder space: `chance`,
    `0.6 chance`."""
    max_pairs_per_feature: int | None = Field(default=None, ge=1)
    """Caps |S| at this many pairs per live feature, which makes it linear in N."""
    path: Literal["auto", "coactive", "blocks", "tiled"] = "auto"
    """How pairs are found. Of codes: coactive is exact, blocks samples dense codes, auto is coactive within
    pair_budget. space=decoder: auto keeps lists of neighbours, tiled compares all rows at each selection."""
    pair_budget: Annotated[int, active_when(space=READS_CODES, path="auto")] = Field(default=64_000_000, ge=1)
    """Most co-activations W of a batch the exact path enumerates before blocks take over."""
    block: Annotated[int, active_when(space=READS_CODES, path=("auto", "blocks"))] = Field(default=512, ge=2)
    """Features per random block when codes are too dense for the exact path."""

    @model_validator(mode="after")
    def _path_exists_in_its_space(self) -> "PairsConfig":
        paths = ("auto", "tiled") if self.space == "decoder" else ("auto", "coactive", "blocks")
        if self.path not in paths:
            raise wrong(
                f"decorrelation.path = {self.path!r} with space {self.space!r}; expected {' or '.join(paths)} there"
            )
        return self

    @model_validator(mode="after")
    def _selects_no_more_often_than_windows_fill(self) -> "PairsConfig":
        if self.space != "decoder" and self.refresh is not None and self.refresh < self.window:
            raise wrong(
                f"decorrelation.refresh = {self.refresh} with window {self.window}: a selection needs a new window; "
                f"expected none or at least {self.window}; raise refresh or lower window"
            )
        return self

    @property
    def can_be_split(self) -> bool:
        """Whether the features may be divided among ranks."""
        return self.space == "codes" and self.path in ("auto", "coactive")

    def first_penalised_step(self, n_features: int) -> int:
        """See `DecorrelationConfig.first_penalised_step`: windows must be full and a step penalised."""
        return self._next_penalised(self.window if self.space != "decoder" else 1)

    def _next_penalised(self, step: int) -> int:
        return -(-(step - 1) // self.interval) * self.interval + 1


class SelectiveConfig(PairsConfig):
    """The most correlated pairs (Eq. 2-4)."""

    method: Literal["selective"] = "selective"
    scan_rows: Annotated[int, active_when(space="decoder", path="auto")] = Field(default=256, ge=1)
    """Rows compared with all others at each penalised step; S is first chosen when all have been."""
    neighbours: Annotated[int, active_when(space="decoder", path="auto")] = Field(default=16, ge=1)
    """Nearest rows remembered per feature."""
    by_site: Annotated[bool, active_when(model__sites=SEVERAL_PREDICTED, space="decoder")] = False
    """Of dictionaries that predict several sites: pairs are chosen and pushed apart at each site, by that site's share
    in the cosine of their whole rows."""

    @property
    def can_be_split(self) -> bool:
        """Decoder rows are few enough to bring together."""
        return self.space == "decoder" or self.path in ("auto", "coactive")

    def first_penalised_step(self, n_features: int) -> int:
        """See `DecorrelationConfig.first_penalised_step`; in decoder space every row must have been compared once."""
        if self.space != "decoder" or self.path != "auto":
            return super().first_penalised_step(n_features)
        return (-(-n_features // self.scan_rows) - 1) * self.interval + 1


DEFAULTS = SelectiveConfig()


@register
class SelectiveDecorrelation(Penalty):
    """R(tau) = 1/|S| sum over S of relu(C - tau), S the `fraction` most correlated live pairs (Eq. 2-4).

    Settings, their defaults and their meaning are those of `SelectiveConfig`. With window = refresh = 1 every call
    stands for itself and there is no state; otherwise `state_dict` holds the window and the selection in force, and
    the penalty is zero until the window is full for the first time.

    Example:
        >>> decorrelate = SelectiveDecorrelation(fraction=0.5)
        >>> penalty, stats = decorrelate(torch.tensor([[1.0, 2.0, 0.0], [3.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
        >>> stats.pairs.tolist(), stats.n_live
        ([[0, 1]], 3)
    """

    settings: ClassVar[type[DecorrelationConfig]] = SelectiveConfig
    config: PairsConfig
    columns: slice = WHOLE  # of decoder rows, those compared; see `unbraid.decorrelation.by_site`

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
        path: Literal["auto", "coactive", "blocks", "tiled"] = DEFAULTS.path,
        pair_budget: int = DEFAULTS.pair_budget,
        block: int = DEFAULTS.block,
        scan_rows: int = DEFAULTS.scan_rows,
        neighbours: int = DEFAULTS.neighbours,
        seed: int = 0,
    ):
        settings = {name: value for name, value in locals().items() if name not in ("self", "seed", "__class__")}
        given = {name: value for name, value in settings.items() if value != getattr(DEFAULTS, name)}
        config = validated(self.settings, given, type(self).__name__)
        assert isinstance(config, PairsConfig)
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

    @classmethod
    def from_settings(cls, config: DecorrelationConfig, seed: int) -> "SelectiveDecorrelation":
        """See `Penalty.from_settings`."""
        return cls(**config.model_dump(exclude={"method", "lambda2", "by_site"}), seed=seed)

    def exact_selection(self, decoder: Tensor) -> Selection:
        """The true top pairs of decoder rows, on demand: O(N^2 D)."""
        unit_ND = unit_rows(require_decoder(decoder, None, None)).values
        return select_exactly(unit_ND, self.config.fraction, self.config.max_pairs_per_feature)

    def takes_dense(self, f_BN: Tensor) -> bool:
        """Codes too dense for the exact path; in decoder space only firings are counted."""
        return self.space == "decoder" or self._in_blocks(f_BN)

    def find(
        self, codes: Codes | Tensor | None, decoder: Tensor | None, acts: bool
    ) -> tuple[Evaluation | None, DecorrelationStats]:
        """See `Penalty.find`."""
        rows = self._rows(decoder, acts)
        if self.space == "decoder":
            path, w = "tiled" if self.lists is None else "neighbours", None
            selection = self._select_rows(codes, decoder, rows)
        else:
            assert codes is not None
            path, w = "coactive", co_activations(codes)
            if isinstance(codes, Tensor) or self._in_blocks(codes):
                return self._find_in_blocks(codes, rows, w, acts)
            selection = self._select(codes, rows, acts)
        if selection is None:
            return None, DecorrelationStats("filling", co_activations=w, refreshed=False, penalised=False)
        if not acts:
            return None, stats_of(path, selection, None, w)
        if rows is not None:
            found = self._push_rows(rows, selection)
        else:
            assert isinstance(codes, Codes)
            found = coactive.evaluate(codes, selection, self.config.measure)
        if self.shard is not None:
            (penalty,) = self.shard.ranks.total(found.penalty)
            dtype = codes.values.dtype if rows is None and isinstance(codes, Codes) else found.gradient.dtype
            gradient = self.shard.ranks.sum(found.gradient.to(dtype))
            found = Evaluation(penalty, gradient, found.correlations)
        return found, stats_of(path, selection, found, w)

    def remember(self, codes: Codes | Tensor | None, decoder: Tensor | None, acts: bool) -> None:
        """See `Penalty.remember`."""
        rows = self._rows(decoder, acts)
        if self.space == "decoder":
            self._select_rows(codes, decoder, rows)
        elif isinstance(codes, Tensor) or (codes is not None and self._in_blocks(codes)):
            self._count_firing(codes)
            if acts and self.threshold.kind == "running":
                self._select_in_blocks(codes, rows)
        else:
            assert codes is not None
            self._select(codes, rows, acts)

    def top_pairs(self, codes: Codes) -> Selection:
        """S of some codes, without tau."""
        supported = codes.detach()
        if self.config.min_support > 1:
            supported = supported.where((codes.support >= self.config.min_support)[codes.indices])
        wanted = self.config.fraction, self.config.measure, self.config.max_pairs_per_feature
        return coactive.select(supported, *wanted, self.shard)

    def _in_blocks(self, codes: Codes | Tensor) -> bool:
        if self.config.path == "auto":
            return co_activations(codes) > self.config.pair_budget
        return self.config.path == "blocks"

    def _rows(self, decoder: Tensor | None, acts: bool) -> Scaled | None:
        """Decoder rows where they are compared; in decoder space a call between two penalties costs nothing."""
        if self.space == "codes" or decoder is None or not (acts or self.space == "co-active"):
            return None
        return unit_rows(decoder)

    def _count_firing(self, codes: Codes | Tensor | None) -> None:
        if self.firing is not None and self.training:
            assert codes is not None
            self.firing.add(codes.firing() if isinstance(codes, Codes) else (codes > 0).sum(0))

    def _select(self, codes: Codes, rows: Scaled | None, acts: bool) -> Selection | None:
        """S for this call: of this batch, or the one in force after looking whether a new one is due."""
        self._count_firing(codes)
        if self.selection is None or self.window is None:
            return self._with_tau(self.top_pairs(codes), rows, codes.n_rows) if acts else None
        self.selection.require_width(codes.n_features)
        refreshed = False
        if self.training:
            self.selection.age()
            calls, known = self.selection.calls_since, self.selection.known
            if not known or calls + self.window.size > self.refresh:
                self.window.push(codes)
            if acts and self.window.full and (not known or calls >= self.refresh):
                held = self.window.codes(codes.n_features)
                self.selection.replace(self._with_tau(self.top_pairs(held), rows, held.n_rows), codes.n_features)
                self.window.clear()
                refreshed = True
        return self.selection.recall(refreshed)

    def _find_in_blocks(
        self, codes: Codes | Tensor, rows: Scaled | None, w: int, acts: bool
    ) -> tuple[Evaluation | None, DecorrelationStats]:
        """Codes too dense to remember or to list: select and penalise this batch, block by block."""
        self._count_firing(codes)
        if not acts:
            return None, DecorrelationStats("blocks", co_activations=w, refreshed=False, penalised=False)
        blocks, selection = self._select_in_blocks(codes, rows)
        found = blocks.evaluate(selection) if rows is None else self._push_rows(rows, selection)
        return found, stats_of("blocks", selection, found, w)

    def _select_in_blocks(self, codes: Codes | Tensor, rows: Scaled | None) -> tuple[Blocks, Selection]:
        # Drawn from the codes themselves: a resumed run draws the same partition, and nothing has to be remembered.
        source, n_rows = (codes.values, codes.n_rows) if isinstance(codes, Codes) else (codes, len(codes))
        seed = derive_seed(self.seed, "blocks", float(source.sum(dtype=torch.float64)).hex())
        blocks = Blocks(codes, self.config.block, self.config.min_support, self.config.measure, seed)
        selection = blocks.select(self.config.fraction, self.config.max_pairs_per_feature)
        return blocks, self._with_tau(selection, rows, n_rows)

    def _select_rows(
        self, codes: Codes | Tensor | None, decoder: Tensor | None, rows: Scaled | None
    ) -> Selection | None:
        """S among decoder rows, after a look at the next of them where this call penalises."""
        assert self.selection is not None
        self._count_firing(codes)
        if self.shard is not None:
            n_features = self.shard.n_features
        else:
            assert decoder is not None
            n_features = len(decoder)
        self.selection.require_width(n_features)
        if self.training:
            self.selection.age()
        refreshed = False
        if rows is not None and self.training:
            refreshed = not self.selection.known or self.selection.calls_since >= self.refresh
            if self.lists is not None:
                self.lists.scan(rows.values[:, self.columns])
                refreshed = refreshed and self.lists.complete
        if rows is not None and refreshed:
            search = select_exactly if self.lists is None else self.lists.select
            found = search(rows.values[:, self.columns], self.config.fraction, self.config.max_pairs_per_feature)
            found = found if self.shard is None else found.of(self.shard)
            self.selection.replace(self._with_tau(found, rows, 0), n_features)
        return self.selection.recall(refreshed)

    def _with_tau(self, selection: Selection, rows: Scaled | None, n_dimensions: int | float) -> Selection:
        """With tau in the units of what is penalised: of the codes' correlations, or of the decoder's cosines."""
        n_features = selection.n_live
        if rows is not None:
            n_features, width = rows.values.shape
            n_dimensions = width**2 / rows.values[:, self.columns].shape[1]  # of random rows, a part varies as 1 / that
            if self.space == "co-active":
                mean, std = row_moments(rows.values)
                selection = dataclasses.replace(selection, mean=mean, std=std)
        tau = self.threshold(selection.mean, selection.std, n_features, n_dimensions)
        return dataclasses.replace(selection, tau=tau)

    def _push_rows(self, rows: Scaled, selection: Selection) -> Evaluation:
        """R over pairs of decoder rows, and who moves how far."""
        share = None if self.firing is None else self.firing.first_is_rarer(selection.first, selection.second)
        return evaluate_rows(rows, selection, share, self.columns)


def co_activations(codes: Codes | Tensor) -> int:
    """W, the number of (row, pair of features active on it), also of dense codes without listing their entries."""
    return codes.co_activations() if isinstance(codes, Codes) else pairs_within((codes > 0).sum(1))
