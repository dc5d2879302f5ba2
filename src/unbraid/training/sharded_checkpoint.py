"""Checkpoints of an SAE that is split by features over ranks: one file per slice.

A run written by 4 ranks can resume with 2, 1 or 6. A reader takes the files that overlap its own slice, joins the rows
of the tensors that are split by features and keeps its own rows. Tensors that every rank holds are in every file. An
SAE that is not split has one file.
"""

import re

import torch
from torch import Tensor

from unbraid.distributed.shard import Shard
from unbraid.training.checkpoint import CheckpointTensors

PIECE = re.compile(r"(?P<stem>.+?)(?:\.(?P<rank>\d+)-of-(?P<size>\d+))?")
PAIRS = re.compile(r"(decorrelate\.(?:sites\.\d+\.)?selection\.)(first|second|correlations)")
"""Pairs of features; a rank holds those whose first feature is its own."""


def piece_stem(stem: str, shard: Shard) -> str:
    """Name of the file this rank writes."""
    return stem if shard.whole else f"{stem}.{shard.ranks.rank}-of-{shard.ranks.size}"


def overlaps(stem: str, name: str, shard: Shard) -> bool:
    """Whether file `name` holds a piece of `stem` with features of `shard`."""
    match = PIECE.fullmatch(name)
    if match is None or match["stem"] != stem:
        return False
    start, end = _features(name, shard.n_features)
    return start < shard.end and shard.start < end


def join(files: CheckpointTensors, stem: str, shard: Shard, shared: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of `shard` from all pieces of `stem` that overlap it.

    Args:
        files: name -> tensors, of whatever was read.
        stem: what the pieces are of.
        shard: the features wanted.
        shared: parameters that are not split.
    """
    pieces = {name: tensors for name, tensors in files.items() if overlaps(stem, name, shard)}
    names = sorted(pieces, key=lambda name: _features(name, shard.n_features))
    joined = dict(pieces[names[0]])
    for name, tensor in joined.items():
        if pairs := PAIRS.fullmatch(name):
            first = torch.cat([pieces[piece][f"{pairs[1]}first"] for piece in names])
            own = (first >= shard.start) & (first < shard.end)
            joined[name] = torch.cat([pieces[piece][name] for piece in names])[own]
        elif _split(name, tensor, shared):
            joined[name] = torch.cat([_rows(pieces[piece][name], piece, shard) for piece in names])
    return joined


def _rows(tensor: Tensor, piece: str, shard: Shard) -> Tensor:
    start, end = _features(piece, shard.n_features)
    return tensor[max(shard.start - start, 0) : max(min(shard.end, end) - start, 0)]


def _split(name: str, tensor: Tensor, shared: tuple[str, ...]) -> bool:
    """Whether a tensor has one row per feature."""
    group, _, rest = name.partition(".")
    if group in ("sae", "optimiser"):
        return tensor.ndim > 0 and rest.partition(".")[0] not in shared
    return name == "trainee.tokens_since_fired"


def _features(name: str, n_features: int) -> tuple[int, int]:
    match = PIECE.fullmatch(name)
    assert match is not None
    rank, size = int(match["rank"] or 0), int(match["size"] or 1)
    return n_features * rank // size, n_features * (rank + 1) // size
