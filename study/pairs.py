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
import torch
from real import CACHE, RUNS, read
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from trials import RESULTS, append

import unbraid
from unbraid.activations.cache import CachedActivations
from unbraid.activations.rows import RowFilter
from unbraid.config import load_config
from unbraid.evaluation.pairs import pair_statistics, stack_codes
from unbraid.files import write_json
from unbraid.randomness import generator

BATCH, FRACTION = 2048, 1e-3
REFERENCE_ROWS = 131_072
WINDOWS = [1, 4, 16]
LEVELS = [round(0.02 * step, 2) for step in range(51)]
SHOWN = 24
"""Features in the heat map."""


def rows_of(run: Path, count: int) -> Tensor:
    """Activations `run` trained on, `[count, D]`, shuffled."""
    config = load_config(run / "config.json")
    source = CachedActivations(config, CACHE)
    kept = RowFilter(config.buffer, config.sites, source.special_ids)
    parts: list[Tensor] = []
    for chunk in source.chunks(None):
        parts.append(kept(chunk)[0])
        if sum(map(len, parts)) >= count:
            break
    x_RD = torch.cat(parts)[:count]
    return x_RD[torch.randperm(len(x_RD), generator=generator(0, "study pairs"))]


def codes_of(run: Path, method: str, x_RD: Tensor) -> Any:
    """Codes of one SAE of `run`, sparse `[R, N]`."""
    sae = unbraid.load(next((run / "saes").glob(f"*_{method}")))
    return stack_codes((sae.encode(x_BD) for x_BD in x_RD.split(BATCH)), sae.n_features)


def noise() -> None:
    """Of the S of a window of M batches: how rare its features are, and what is left of it on other tokens."""
    path = RESULTS / "noise.jsonl"
    done = {line["run"] for line in read(path)}
    for run in sorted(RUNS.glob("batch_topk-k32-s*")):
        if run.name in done:
            continue
        x_RD = rows_of(run, REFERENCE_ROWS + 2 * max(WINDOWS) * BATCH)
        codes = codes_of(run, "none", x_RD)
        reference = codes[:REFERENCE_ROWS]
        wanted = set(map(tuple, pair_statistics(reference, keep=FRACTION).pairs))
        for window, support in product(WINDOWS, (1, 4)):
            start, size = REFERENCE_ROWS, window * BATCH
            first, second = codes[start : start + size], codes[start + size : start + 2 * size]
            chosen, other = (pair_statistics(part, keep=FRACTION, min_support=support) for part in (first, second))
            fired = np.bincount(first.indices, minlength=codes.shape[1])
            elsewhere = correlations(reference, chosen.pairs)
            metrics = {
                "pairs": len(chosen.pairs),
                "low_support": float((fired[chosen.pairs].min(1) <= 4).mean()),
                "shared": share(chosen.pairs, set(map(tuple, other.pairs))),
                "true_top": share(chosen.pairs, wanted),
                "as_selected": float(chosen.values.mean()),
                "elsewhere": float(elsewhere.mean()),
            }
            append(path, {"run": run.name, "window": window, "min_support": support, "metrics": metrics})


def share(pairs: np.ndarray, among: set[tuple[int, int]]) -> float:
    """Share of `pairs` that are in `among`."""
    return sum(tuple(pair) in among for pair in pairs) / len(pairs)


def correlations(codes: Any, pairs: np.ndarray) -> np.ndarray:
    """C of given pairs on given codes; 0 where a feature never fires."""
    columns = codes.tocsc()
    norms = np.sqrt(np.asarray((columns**2).sum(axis=0)).ravel())
    dots = np.asarray(columns[:, pairs[:, 0]].multiply(columns[:, pairs[:, 1]]).sum(axis=0)).ravel()
    scale = norms[pairs[:, 0]] * norms[pairs[:, 1]]
    return np.divide(dots, scale, out=np.zeros_like(dots), where=scale > 0)


def shapes() -> None:
    """Distributions of all live pairs' correlations, and the most entangled features before and after."""
    run = RUNS / "batch_topk-k32-s0"
    x_RD = rows_of(run, REFERENCE_ROWS)
    found: dict[str, Any] = {"levels": LEVELS, "share_above": {}, "run": run.name, "tokens": REFERENCE_ROWS}
    codes = {method: codes_of(run, method, x_RD) for method in ("none", "codes", "decoder-floor", "ortsae")}
    for method, own in codes.items():
        statistics = pair_statistics(own, keep=1.0)
        above = [float((statistics.values > level).sum() / statistics.n_pairs) for level in LEVELS]
        found["share_above"][method] = [float(f"{number:.4g}") for number in above]
    entangled = busiest(pair_statistics(codes["none"], keep=FRACTION, min_support=100).pairs)
    found["heat"] = {}
    for method, own in codes.items():
        chosen = entangled if method == "none" else counterparts(run, method, entangled)
        part = own[:, chosen].toarray()
        norms = np.maximum(np.linalg.norm(part, axis=0), 1e-12)
        found["heat"][method] = np.round((part / norms).T @ (part / norms), 3).tolist()
    write_json(RESULTS / "pairs.json", found)


def busiest(pairs: np.ndarray) -> np.ndarray:
    """Features of the first pairs, entangled ones side by side."""
    chosen: list[int] = []
    for feature in pairs.flatten().tolist():
        if feature not in chosen:
            chosen.append(feature)
        if len(chosen) == SHOWN:
            break
    return np.array(chosen)


def counterparts(run: Path, method: str, features: np.ndarray) -> np.ndarray:
    """For features of the SAE without a penalty, those of another whose decoder rows match them best, one to one."""
    none, other = (unbraid.load(next((run / "saes").glob(f"*_{name}"))).W_dec for name in ("none", method))
    cosines = torch.nn.functional.normalize(none[features], dim=1) @ torch.nn.functional.normalize(other, dim=1).T
    return linear_sum_assignment(cosines.detach().numpy(), maximize=True)[1]


def main() -> None:
    """One of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["noise", "shapes"])
    noise() if parser.parse_args().what == "noise" else shapes()


if __name__ == "__main__":
    main()
