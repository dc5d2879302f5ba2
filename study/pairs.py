"""The pairs themselves, on the codes of the real model's SAEs: how much of S is noise, and what the penalty does to it.

    python study/pairs.py noise       # S of one batch and of a window, against independent tokens: results/noise.jsonl
    python study/pairs.py shapes      # correlation distributions and one heat map: results/pairs.json

Training batches are drawn from a shuffle buffer, so rows are shuffled here before they are cut into batches.
"""

import argparse
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from real import HEADLINE, METHODS, RUNS, rows_of
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F
from trials import RESULTS, append, read

import unbraid
from unbraid.config import load_config
from unbraid.evaluation.pairs import PairStatistics, View, pair_statistics, stack_codes
from unbraid.files import write_json

RUN = f"batch_topk-k32-layer{HEADLINE}"
BATCH, FRACTION = 2048, 1e-3
REFERENCE_ROWS = 65_536
SIZES = [256, 512, 2048, 8192, 32_768]
"""Tokens S is chosen on."""
LEVELS = [round(0.02 * step, 2) for step in range(51)]
SHOWN = 24
"""Features in the heat map."""


def load(run: Path, method: str) -> Any:
    """One SAE of `run`."""
    return unbraid.load(next((run / "saes").glob(f"*_{method}"))).requires_grad_(False)


def codes_of(run: Path, method: str, x_RD: Tensor) -> Any:
    """Codes of one SAE of `run`, sparse `[R, N]`."""
    sae = load(run, method)
    return stack_codes((sae.encode(x_BD) for x_BD in x_RD.split(BATCH)), sae.n_features)


def noise() -> None:
    """Of the S of a window of M batches: how rare its features are, and what is left of it on other tokens."""
    path = RESULTS / "noise.jsonl"
    done = {line["run"] for line in read(path.stem)}
    for run in sorted(RUNS.glob(f"{RUN}-s*")):
        if run.name in done:
            continue
        x_RD = rows_of(load_config(run / "config.json"), REFERENCE_ROWS + 2 * max(SIZES))
        codes = codes_of(run, "none", x_RD)
        reference = codes[:REFERENCE_ROWS]
        wanted = set(map(tuple, top(reference).pairs))
        busy = np.diff(reference.indptr)
        unit_ND = F.normalize(load(run, "none").W_dec, dim=1)
        for size, support in product(SIZES, (1, 4)):
            start = REFERENCE_ROWS
            first, second = codes[start : start + size], codes[start + size : start + 2 * size]
            chosen, other = (top(part, support) for part in (first, second))
            fired = np.bincount(first.indices, minlength=codes.shape[1])
            metrics = {
                "pairs": len(chosen.pairs),
                "low_support": float((fired[chosen.pairs].min(1) <= 4).mean()),
                "shared": share(chosen.pairs, set(map(tuple, other.pairs))),
                "true_top": share(chosen.pairs, wanted),
                "as_selected": float(chosen.values.mean()),
                "elsewhere": float(correlations(reference, chosen.pairs).mean()),
                "features": len(np.unique(chosen.pairs)),
                "decoder_cosine": float((unit_ND[chosen.pairs[:, 0]] * unit_ND[chosen.pairs[:, 1]]).sum(1).mean()),
                "active_where_they_meet": meeting(reference, chosen.pairs, busy),
            }
            append(path, {"run": run.name, "tokens": size, "min_support": support, "metrics": metrics})


def top(codes: Any, min_support: int = 1, keep: float = FRACTION) -> PairStatistics:
    """The most correlated pairs of features that fire at least so often."""
    return pair_statistics(codes, [View("cosine", min_support)], keep)[0]


def share(pairs: np.ndarray, among: set[tuple[int, int]]) -> float:
    """Share of `pairs` that are in `among`."""
    return sum(tuple(pair) in among for pair in pairs) / len(pairs)


def meeting(codes: Any, pairs: np.ndarray, busy: np.ndarray) -> float:
    """Mean number of active features on the tokens where a pair of S meets, over pairs."""
    columns = (codes != 0).tocsc()
    together = columns[:, pairs[:, 0]].multiply(columns[:, pairs[:, 1]])
    counts = np.maximum(np.asarray(together.sum(axis=0)).ravel(), 1)
    return float((np.asarray(together.T @ busy).ravel() / counts).mean())


def correlations(codes: Any, pairs: np.ndarray) -> np.ndarray:
    """C of given pairs on given codes; 0 where a feature never fires."""
    columns = codes.tocsc()
    norms = np.sqrt(np.asarray((columns**2).sum(axis=0)).ravel())
    dots = np.asarray(columns[:, pairs[:, 0]].multiply(columns[:, pairs[:, 1]]).sum(axis=0)).ravel()
    scale = norms[pairs[:, 0]] * norms[pairs[:, 1]]
    return np.divide(dots, scale, out=np.zeros_like(dots), where=scale > 0)


def shapes() -> None:
    """Distributions of all live pairs' correlations, and the most entangled features before and after."""
    run = RUNS / f"{RUN}-s0"
    x_RD = rows_of(load_config(run / "config.json"), REFERENCE_ROWS)
    found: dict[str, Any] = {"levels": LEVELS, "share_above": {}, "run": run.name, "tokens": REFERENCE_ROWS}
    codes = {method: codes_of(run, method, x_RD) for method in METHODS}
    for method, own in codes.items():
        statistics = top(own, keep=1.0)
        above = [float((statistics.values > level).sum() / statistics.n_pairs) for level in LEVELS]
        found["share_above"][method] = [float(f"{number:.4g}") for number in above]
    entangled = spread(top(codes["none"], min_support=100, keep=10 * FRACTION).pairs)
    found["heat"] = {}
    for method, own in codes.items():
        chosen = entangled if method == "none" else counterparts(run, method, entangled)
        part = own[:, chosen].toarray()
        norms = np.maximum(np.linalg.norm(part, axis=0), 1e-12)
        found["heat"][method] = np.round((part / norms).T @ (part / norms), 3).tolist()
    write_json(RESULTS / "pairs.json", found)


def spread(pairs: np.ndarray) -> np.ndarray:
    """Features of pairs all along a ranking, partners side by side: the first of it are all one clique."""
    chosen: list[int] = []
    for pair in pairs[:: 2 * len(pairs) // SHOWN // 8].tolist():
        if len(chosen) < SHOWN and not set(pair) & set(chosen):
            chosen += pair
    return np.array(chosen)


def counterparts(run: Path, method: str, features: np.ndarray) -> np.ndarray:
    """For features of the SAE without a penalty, those of another whose decoder rows match them best, one to one."""
    none, other = (F.normalize(load(run, name).W_dec, dim=1) for name in ("none", method))
    return linear_sum_assignment((none[features] @ other.T).numpy(), maximize=True)[1]


def main() -> None:
    """One of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["noise", "shapes"])
    noise() if parser.parse_args().what == "noise" else shapes()


if __name__ == "__main__":
    main()
