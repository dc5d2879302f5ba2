"""What a feature page shows, computed from the codes of a held-out pass and from the SAE's weights.

Everything is worked out feature by feature from one column of the sparse codes, so ten thousand features cost seconds
and no [rows, N] matrix is ever dense.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unbraid.reporting.dashboard.passes import Csc, HeldOutPass

BINS = 24
TOP_CONTEXTS, QUARTER_CONTEXTS = 8, 3
BEFORE, AFTER = 14, 8
PARTNERS = 8
TILE_ENTRIES = 1 << 24


@dataclass(frozen=True)
class Excerpt:
    """A stretch of one context around the place where a feature fires most.

    Attributes:
        context: index of the context.
        start, stop: positions shown.
        activations: feature -> its code at each position shown (zero where it is silent or the row was left out).
        fired: feature -> positions in the whole context where it fires, and its codes there.
    """

    context: int
    start: int
    stop: int
    activations: list[np.ndarray]
    fired: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)


@dataclass(frozen=True)
class Firing:
    """How one feature fires: `rows` ascending, and the code there."""

    rows: np.ndarray
    values: np.ndarray


def firing(codes: Csc, feature: int) -> Firing:
    """Where and how strongly `feature` fires."""
    part = slice(codes.indptr[feature], codes.indptr[feature + 1])
    return Firing(codes.indices[part], codes.data[part])


def histogram(values: np.ndarray) -> list[int]:
    """Counts of a feature's positive codes in `BINS` equal bins from 0 to its largest."""
    if len(values) == 0:
        return []
    return np.histogram(values, bins=BINS, range=(0.0, float(values.max())))[0].tolist()


@dataclass(frozen=True)
class Quarter:
    """A quarter of the contexts a feature fires in beyond the strongest ones, by its largest code in each.

    Attributes:
        contexts: how many there are.
        lowest, highest: largest codes of the weakest and the strongest of them.
        rows: some to show, strongest first.
    """

    contexts: int
    lowest: float
    highest: float
    rows: list[int]


def strongest_contexts(
    held_out: HeldOutPass, rows: np.ndarray, strength: np.ndarray
) -> tuple[list[int], list[Quarter]]:
    """Rows to show, one per context: the strongest ones, then some from each quarter of the others."""
    order = np.argsort(-strength, kind="stable")
    _, first = np.unique(held_out.context_R[rows[order]], return_index=True)
    best = order[np.sort(first)]
    quarters = []
    for part in np.array_split(best[TOP_CONTEXTS:], 4):
        if len(part):
            shown = part[np.unique(np.linspace(0, len(part) - 1, QUARTER_CONTEXTS).round().astype(int))]
            low, high = float(strength[part[-1]]), float(strength[part[0]])
            quarters.append(Quarter(len(part), low, high, rows[shown].tolist()))
    return rows[best[:TOP_CONTEXTS]].tolist(), quarters


def excerpt(held_out: HeldOutPass, row: int, firings: list[Firing]) -> Excerpt:
    """The tokens around `row`, with the codes of one or more features on them."""
    context, position = int(held_out.context_R[row]), int(held_out.position_R[row])
    start = max(0, position - BEFORE)
    stop = min(held_out.tokens_CT.shape[1], position + AFTER + 1)
    lowest, highest = np.searchsorted(held_out.context_R, [context, context + 1])
    activations: list[np.ndarray] = []
    fired: list[tuple[np.ndarray, np.ndarray]] = []
    for feature in firings:
        values = np.zeros(stop - start)
        low, high = np.searchsorted(feature.rows, [lowest, highest])
        positions = held_out.position_R[feature.rows[low:high]]
        inside = (positions >= start) & (positions < stop)
        values[positions[inside] - start] = feature.values[low:high][inside]
        activations.append(values)
        fired.append((positions, feature.values[low:high]))
    return Excerpt(context, start, stop, activations, fired)


def correlations_with(unit: Csc, features: np.ndarray) -> np.ndarray:
    """Correlation (Eq. 2) of some features with all, `[n, N]`, from codes whose columns have unit norm."""
    return (unit[:, features].T @ unit).toarray()


def unit_columns(codes: Csc) -> Csc:
    """The codes with every live feature's column scaled to unit norm."""
    norms = np.sqrt(np.asarray((codes**2).sum(axis=0)).ravel())
    scaled = codes.copy()
    scaled.data = codes.data / np.repeat(np.where(norms > 0, norms, 1.0), np.diff(codes.indptr))
    return scaled


def partners(codes: Csc) -> tuple[np.ndarray, np.ndarray]:
    """Each feature's most correlated others: ids `[N, P]` and correlations `[N, P]`, descending, 0 for none."""
    unit = unit_columns(codes)
    n = codes.shape[1]
    count = min(PARTNERS, n - 1)
    ids, values = np.zeros((n, count), dtype=np.int64), np.zeros((n, count))
    dense = unit.toarray() if codes.nnz > 0.05 * codes.shape[0] * n else None
    step = max(1, TILE_ENTRIES // max(n, codes.shape[0] if dense is not None else n))
    for start in range(0, n, step):
        tile = np.arange(start, min(n, start + step))
        correlation = dense[:, tile].T @ dense if dense is not None else correlations_with(unit, tile)
        correlation[np.arange(len(tile)), tile] = -1.0
        ids[tile], values[tile] = _largest(correlation, count)
    return ids, np.maximum(values, 0.0)


@torch.no_grad()
def neighbours(W_dec: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Each feature's nearest decoder rows: ids `[N, P]` and cosines `[N, P]`, descending."""
    unit_ND = nn.functional.normalize(W_dec.float(), dim=1)
    n = len(unit_ND)
    count = min(PARTNERS, n - 1)
    ids, values = np.zeros((n, count), dtype=np.int64), np.zeros((n, count))
    for start in range(0, n, max(1, TILE_ENTRIES // n)):
        tile = unit_ND[start : start + max(1, TILE_ENTRIES // n)]
        cosine = (tile @ unit_ND.T).cpu().numpy()
        cosine[np.arange(len(tile)), start + np.arange(len(tile))] = -2.0
        ids[start : start + len(tile)], values[start : start + len(tile)] = _largest(cosine, count)
    return ids, values


def _largest(matrix: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    found = torch.from_numpy(matrix).topk(count, dim=1)
    return found.indices.numpy(), found.values.numpy()


@torch.no_grad()
def logit_effects(W_dec: Tensor, model: Any) -> Iterator[Tensor] | None:
    """What each decoder row adds to the logits when read through the final norm and the unembedding.

    Returns:
        `[some rows, V]` at a time, in the order of the rows, without the mean over the vocabulary, which no prediction
        depends on; None for a model without an unembedding of the residual stream's width.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None or head.weight.shape[1] != W_dec.shape[1]:
        return None
    weight = head.weight.detach()
    gain_D = _norm_gain(model, W_dec.shape[1]).detach().to(weight.device)
    direction_ND = W_dec.detach().to(weight.device, torch.float32) * gain_D
    tiles = direction_ND.split(max(1, TILE_ENTRIES // len(weight)))
    logits = (tile @ weight.float().T for tile in tiles)
    return (tile - tile.mean(dim=1, keepdim=True) for tile in logits)


def logit_lens(W_dec: Tensor, model: Any, count: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """The tokens each decoder row raises and lowers most; see `logit_effects`.

    Returns:
        ids and values of the raised, then of the lowered tokens, `[N, count]` each; None where there are no effects.
    """
    effects = logit_effects(W_dec, model)
    if effects is None:
        return None
    raised_ids, raised, lowered_ids, lowered = [], [], [], []
    for logits in effects:
        top, bottom = logits.topk(count, dim=1), logits.topk(count, dim=1, largest=False)
        raised_ids.append(top.indices)
        raised.append(top.values)
        lowered_ids.append(bottom.indices)
        lowered.append(bottom.values)
    return tuple(torch.cat(parts).cpu() for parts in (raised_ids, raised, lowered_ids, lowered))  # pyright: ignore


def _attribute(owner: Any, path: str) -> Any:
    for part in path.split("."):
        owner = getattr(owner, part, None)
    return owner


def _norm_gain(model: Any, d_model: int) -> Tensor:
    """Per-coordinate gain of the model's final norm, ones if it cannot be found.

    Measured, not read: norms keep their gain as weight or weight - 1. On alternating signs both RMS and layer norm
    divide by one, and half the difference of opposite inputs has no bias.
    """
    for path in ("model.norm", "transformer.ln_f", "gpt_neox.final_layer_norm", "model.final_layernorm"):
        norm = _attribute(model, path)
        if norm is not None:
            weight = next(norm.parameters(), None)
            if weight is not None and weight.numel() == d_model and d_model % 2 == 0:
                signs_D = torch.ones(d_model, device=weight.device, dtype=weight.dtype)
                signs_D[1::2] = -1
                odd_D: Tensor = norm(signs_D[None])[0] - norm(-signs_D[None])[0]
                return (signs_D * odd_D / 2).float()
    return torch.ones(d_model)
