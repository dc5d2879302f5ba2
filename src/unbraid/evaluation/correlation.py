"""How entangled are the features: the paper's correlation statistics on held-out tokens.

`correlation_summary` is the short form written at the end of a run; `measure_correlation` the full one, with tails and
intervals, of which two can be compared. The numbers are exact over all pairs of live features (see `pairs.py`), in the
terms of Eq. 2-4: mean mu, spread sigma, tau = mu + sigma, and the mean of the selected top pairs. Intervals draw groups
of contexts again, because neighbouring tokens are not independent, and are centred on the estimate: a bootstrap sample
repeats tokens, which by itself raises the correlation of rare features.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from unbraid.evaluation.intervals import mean_interval
from unbraid.evaluation.pairs import Measure, PairStatistics, View, pair_statistics, stack_codes
from unbraid.evaluation.resampling import resampled
from unbraid.evaluation.suite import Suite, register

if TYPE_CHECKING:
    from unbraid.evaluation.suites import Evaluation


@dataclass(frozen=True)
class CorrelationSummary:
    """Correlation over all pairs of live features of one SAE on one set of tokens.

    `top` is the mean over the `n_selected` = max(1, round(fraction * live pairs)) most correlated pairs; `pairs` [P, 2]
    (i < j) and `correlations` [P], descending, list those of them that are above zero.
    """

    mean: float
    std: float
    tau: float
    top: float
    n_live: int
    n_pairs: int
    n_selected: int
    pairs: Tensor
    correlations: Tensor


def correlation_summary(
    codes: Iterable[Any], n_features: int, fraction: float = 1e-3, measure: Measure = "cosine", min_support: int = 1
) -> CorrelationSummary:
    """Exact mean, spread, threshold and top mean of the correlation of all live pairs.

    Args:
        codes: chunks of codes, dense `[B, N]` or sparse (`Codes`), on any device.
        n_features: N.
        fraction: share of the live pairs that counts as the top.
        measure: cosine, the paper's Eq. 2, or pearson.
        min_support: features that fire on fewer tokens are left out.
    """
    (statistics,) = pair_statistics(stack_codes(codes, n_features), [View(measure, min_support)], keep=fraction)
    return summarise(statistics, fraction)


def summarise(statistics: PairStatistics, fraction: float) -> CorrelationSummary:
    """The summary of exact statistics that kept at least `fraction` of the pairs."""
    selected = max(1, round(fraction * statistics.n_pairs)) if statistics.n_pairs else 0
    return CorrelationSummary(
        mean=statistics.mean,
        std=statistics.std,
        tau=statistics.mean + statistics.std,
        top=statistics.top_mean(selected),
        n_live=statistics.n_live,
        n_pairs=statistics.n_pairs,
        n_selected=selected,
        pairs=torch.from_numpy(statistics.pairs[:selected].copy()),
        correlations=torch.from_numpy(statistics.values[:selected].copy()),
    )


FRACTION = 1e-3
QUANTILES = {"q99": 0.99, "q999": 0.999, "q9999": 0.9999}
WELL_SUPPORTED = 10
WINDOW_TOKENS = 2048
KEPT_TAIL = 0.01
GROUPS = 32
FLOOR = 0.5  # of the tail that is asked for, so that no sample's tail lies below it
INTERVALS = ("mean", "std", "top")
VIEWS = {"cosine": View("cosine", 1), "pearson": View("pearson", 1), "cosine_supported": View("cosine", WELL_SUPPORTED)}
"""The last leaves out features that fire so rarely that their correlations are small-sample noise."""


@dataclass(frozen=True)
class CorrelationMeasured:
    """All correlation statistics of one SAE on held-out tokens.

    Attributes:
        report: for each view (cosine, pearson, cosine_supported) mean, std, tau, top, q99, q999, q9999, entangled
            (pairs above 0.5), n_live, n_pairs, and NAME_interval of mean, std, top and the quantiles; `windows`: mean,
            std and top averaged over windows, with intervals over windows.
        samples: for each view, what each bootstrap sample gives for mean, std, top and the quantiles.
    """

    report: dict[str, dict[str, Any]]
    samples: dict[str, dict[str, np.ndarray]]

    def reduction(self, twin: "CorrelationMeasured") -> dict[str, dict[str, Any]]:
        """By view: 1 - own / twin of mean, std and top, with intervals from the samples both have in common.

        Args:
            twin: the SAE trained without the penalty, measured on the same tokens with the same seed.
        """
        return {
            name: _reduction(self.report[name], twin.report[name], self.samples[name], twin.samples[name])
            for name in VIEWS
        }


def measure_correlation(
    codes: Iterable[Any],
    n_features: int,
    *,
    fraction: float = FRACTION,
    block_tokens: int = 128,
    window_tokens: int = WINDOW_TOKENS,
    replicates: int = 30,
    seed: int = 0,
) -> CorrelationMeasured:
    """All correlation statistics of one SAE.

    Args:
        codes: chunks of codes, dense or sparse, in the order of the text.
        n_features: N.
        fraction: share of live pairs that counts as the top.
        block_tokens: tokens the bootstrap never separates: a context.
        window_tokens: the statistics are also taken per window of this many tokens, as training sees them.
        replicates: bootstrap samples behind each interval; 0 leaves the intervals out.
        seed: of the bootstrap.
    """
    stacked = stack_codes(codes, n_features)
    views = _distinct_views(stacked)
    report = dict(zip(views, _statistics(stacked, list(views.values()), fraction), strict=True))
    samples = _samples(stacked, report, views, block_tokens, fraction, replicates, seed)
    for name, sample in samples.items():
        for key, values in sample.items():
            report[name][f"{key}_interval"] = _around(report[name][key], values)
    for name in VIEWS:
        report.setdefault(name, report["cosine"])
        samples.setdefault(name, samples["cosine"])
    report["windows"] = _over_windows(stacked, window_tokens, fraction, seed)
    return CorrelationMeasured(report, samples)


def _distinct_views(codes: Any) -> dict[str, View]:
    """Without the last one where every feature that fires does so often enough, so that it is the first again."""
    support = np.bincount(codes.indices)
    if ((support > 0) & (support < WELL_SUPPORTED)).any():
        return VIEWS
    return {name: view for name, view in VIEWS.items() if name != "cosine_supported"}


def _samples(
    codes: Any,
    estimates: dict[str, dict[str, Any]],
    views: dict[str, View],
    block_tokens: int,
    fraction: float,
    replicates: int,
    seed: int,
) -> dict[str, dict[str, np.ndarray]]:
    blocks = -(-codes.shape[0] // block_tokens)
    n_groups = min(GROUPS, blocks)
    if min(replicates, n_groups) < 2:
        return {name: {} for name in views}
    group_of_row = (np.arange(codes.shape[0]) // block_tokens) * n_groups // blocks
    draws = np.random.default_rng(seed).multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=replicates)
    floors = [FLOOR * min(estimates[name]["q99"], estimates[name]["top"]) for name in views]
    samples = resampled(codes, group_of_row, draws, list(views.values()), floors, fraction, QUANTILES)
    return dict(zip(views, samples, strict=True))


def _statistics(codes: Any, views: Sequence[View], fraction: float) -> list[dict[str, Any]]:
    found = []
    for pairs in pair_statistics(codes, views, max(fraction, KEPT_TAIL)):
        summary = summarise(pairs, fraction)
        found.append(
            {
                "mean": summary.mean,
                "std": summary.std,
                "tau": summary.tau,
                "top": summary.top,
                **{name: pairs.quantile(q) for name, q in QUANTILES.items()},
                "entangled": pairs.above,
                "n_live": summary.n_live,
                "n_pairs": summary.n_pairs,
            }
        )
    return found


def _around(estimate: float, samples: np.ndarray) -> tuple[float, float]:
    """Normal interval with the bootstrap's standard error."""
    error = 1.96 * float(samples.std(ddof=1))
    return estimate - error, estimate + error


def _reduction(own: dict[str, Any], twin: dict[str, Any], own_samples: Any, twin_samples: Any) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name in INTERVALS:
        if twin[name] != 0:
            result[name] = 1 - own[name] / twin[name]
            if own_samples:
                result[f"{name}_interval"] = _around(result[name], 1 - own_samples[name] / twin_samples[name])
    return result


def _over_windows(codes: Any, window_tokens: int, fraction: float, seed: int) -> dict[str, Any]:
    starts = range(0, codes.shape[0] - window_tokens + 1, window_tokens)
    view = [VIEWS["cosine"]]
    tables = [_statistics(codes[start : start + window_tokens], view, fraction)[0] for start in starts]
    result: dict[str, Any] = {"window_tokens": window_tokens, "n_windows": len(tables)}
    for name in INTERVALS if tables else ():
        values = np.array([table[name] for table in tables])
        result[name] = float(values.mean())
        result[f"{name}_interval"] = mean_interval(values, seed)
    return result


@register
class CorrelationSuite(Suite):
    """The paper's correlation reduction, on held-out codes."""

    name = "correlation"
    caption = "of the codes of all live pairs; the top and how far it lies below the twin's; pairs above 0.5"
    columns: ClassVar = {
        "mean": ("cosine", "mean"),
        "top": ("cosine", "top"),
        "reduction": ("reduction", "cosine", "top"),
        "entangled": ("cosine", "entangled"),
    }
    reads = "codes"

    def measure(self, evaluation: "Evaluation") -> None:
        """See `Suite.measure`."""
        config, with_codes = evaluation.config, [subject for subject in evaluation.subjects if subject.codes]
        task = evaluation.bar.add_task("correlation", total=len(with_codes), unit="SAEs")
        measured: dict[str | None, CorrelationMeasured] = {}
        for subject in with_codes:
            measured[subject.name] = measure_correlation(
                subject.codes,
                subject.codes[0].n_features,
                fraction=config.fraction,
                block_tokens=evaluation.model.source.context_length,
                replicates=config.replicates if subject.control is None else 0,
                seed=config.seed,
            )
            evaluation.bar.advance(task)
        for subject in with_codes:
            subject.report["correlation"] = measured[subject.name].report
            if subject.twin in measured:
                subject.report["correlation"]["reduction"] = measured[subject.name].reduction(measured[subject.twin])
