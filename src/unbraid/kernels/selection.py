"""Choosing the active entries of a large matrix of pre-activations, exactly, without sorting or copying it.

Top-k per row is a compiled loop on a CPU. Entries above a threshold are found eight at a time, reading the comparison's
bytes as 64-bit words. Top-k over a batch first drops what lies below a guessed threshold, and checks that the guess
kept enough. On an accelerator a plain top-k over the batch takes its place, whose result has a known size.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unbraid.kernels import host
from unbraid.kernels.codes import Codes
from unbraid.kernels.on_cpu import in_parallel, loops_take

WORD = 8
ROWS_PER_PART = 64


def top_k(pre_BN: Float[Tensor, "B N"], k: int) -> tuple[Float[Tensor, "B k"], Int[Tensor, "B k"]]:
    """Values and features of the k largest entries of each row, features ascending."""
    if loops_take(pre_BN):
        values_BK = pre_BN.new_empty(len(pre_BN), k)
        features_BK = torch.empty(values_BK.shape, dtype=torch.int64)
        edges = [*range(0, len(pre_BN), ROWS_PER_PART), len(pre_BN)]
        from unbraid.kernels import loops

        in_parallel(loops.top_k, edges, pre_BN, k, values_BK, features_BK)
        return values_BK, features_BK
    values_BK, features_BK = pre_BN.topk(k, dim=1, sorted=False)
    features_BK, order_BK = features_BK.sort(dim=1)
    return values_BK.gather(1, order_BK), features_BK


def positions_above(pre_BN: Float[Tensor, "B N"], threshold: float | Float[Tensor, " N"]) -> Int[Tensor, " nnz"]:
    """Flat positions (row * N + feature), ascending, of the entries above the threshold (one, or one per feature)."""
    flat = (pre_BN > threshold).view(-1)
    if flat.numel() % WORD or host.reading_waits(flat):
        return flat.nonzero().squeeze(1)
    words = flat.view(torch.int64)
    hits = words.nonzero().squeeze(1)
    if hits.numel() * WORD > flat.numel():
        return flat.nonzero().squeeze(1)
    word, byte = words[hits].view(torch.bool).view(-1, WORD).nonzero(as_tuple=True)
    return hits[word] * WORD + byte


def entries_above(pre_BN: Float[Tensor, "B N"], threshold: float | Float[Tensor, " N"]) -> Codes:
    """The entries above the threshold."""
    return _entries_at(pre_BN, positions_above(pre_BN, threshold))


def batch_top_k(pre_BN: Float[Tensor, "B N"], count: int, guess: float) -> Codes:
    """The `count` largest positive entries of the whole batch; ties go to the earlier one.

    Args:
        pre_BN: pre-activations.
        count: entries wanted; fewer come back when fewer are positive.
        guess: a threshold expected to let a few more than `count` entries through; only speed depends on it.
    """
    positions = positions_above(pre_BN, guess) if guess > 0 else None
    if positions is None or positions.numel() < count:
        positions = positions_above(pre_BN, _sampled_threshold(pre_BN, count))
    if positions.numel() < count:
        positions = positions_above(pre_BN, 0.0)
    flat = pre_BN.view(-1)
    if positions.numel() > count:
        values = flat[positions]
        cut = values.topk(count, sorted=False).values.amin()
        above, ties = values > cut, (values == cut).nonzero().squeeze(1)
        above[ties[: count - int(above.sum())]] = True
        positions = positions[above]
    return _entries_at(pre_BN, positions)


def batch_top_k_padded(pre_BN: Float[Tensor, "B N"], count: int) -> Codes:
    """The `count` largest entries of the whole batch, positive or not: always as many, so that nothing is waited for.

    Which of several equal entries at the cut is kept is up to `topk`.
    """
    positions = pre_BN.reshape(-1).topk(count, sorted=False).indices.sort().values
    return _entries_at(pre_BN, positions)


def _sampled_threshold(pre_BN: Tensor, count: int) -> float:
    """A threshold that about 1.5 * count entries exceed, from every 32nd row; 0 where fewer are positive."""
    sample = pre_BN[::32]
    wanted = min(sample.numel(), max(1, round(1.5 * count * len(sample) / len(pre_BN))))
    return max(0.0, float(sample.flatten().topk(wanted, sorted=False).values.amin()))


def density_above(pre_BN: Float[Tensor, "B N"], threshold: float | Float[Tensor, " N"]) -> float:
    """Share of entries above the threshold, from every 16th row."""
    sample = pre_BN[::16]
    return int((sample > threshold).count_nonzero()) / sample.numel()


def _entries_at(pre_BN: Tensor, positions: Tensor) -> Codes:
    n_rows, n_features = pre_BN.shape
    rows = positions // n_features
    return Codes.from_rows(rows, positions - rows * n_features, pre_BN.view(-1)[positions], n_rows, n_features)
