"""What ranks do in the tests of split SAEs; importable by the processes they run in."""

from typing import Any

import numpy as np
import torch

from unbraid.config import OptimiserConfig, SAEConfig
from unbraid.distributed.ranks import Ranks
from unbraid.distributed.shard import Shard, among_top, among_top_k
from unbraid.randomness import generator
from unbraid.sae.build import build
from unbraid.training.optimiser import SAEOptimiser

D, ROWS = 12, 48


def whole(ranks: Ranks, name: str, tensor: torch.Tensor, shared: tuple[str, ...]) -> np.ndarray:
    """A tensor of the unsplit SAE."""
    tensor = tensor.detach()
    if name in shared or tensor.ndim == 0:
        return tensor.numpy()
    parts = ranks.gather_ragged(tensor.flatten())
    return torch.cat(parts).view(-1, *tensor.shape[1:]).numpy()


def batch_of(step: int, dtype: torch.dtype) -> torch.Tensor:
    rows = torch.randn(ROWS, D, generator=generator(5, "batch", step)) / D**0.5
    return rows.to(dtype)


def train_split(ranks: Ranks, settings: dict[str, Any], steps: int, path: str, dtype: str = "float32") -> dict:
    """Weights of the whole SAE after `steps` steps, and the first step's loss, norm and sparsity."""
    config, kind = SAEConfig(**settings), getattr(torch, dtype)
    sae = build(config, D, generator(0, "init"), torch.full((D,), 0.01), Shard(config.n_features, ranks)).to(kind)
    optimiser = SAEOptimiser(sae, OptimiserConfig(lr=3e-3))
    since_fired = torch.zeros(sae.n_features, dtype=torch.long)
    noise, told = generator(0, "noise"), {}
    for step in range(steps):
        dead_N = since_fired >= config.dead_after_tokens
        out = sae.training_forward(batch_of(step, kind), dead_N, noise, path)
        loss = out.reconstruction + config.lambda1 * out.sparsity + out.auxiliary
        optimiser.zero_grad()
        loss.backward()
        told[f"step {step}"] = np.array([loss.item(), out.sparsity.item(), optimiser.step(3e-3)])
        codes = out.codes if isinstance(out.codes, torch.Tensor) else out.codes.to_dense()
        since_fired = torch.where((codes > 0).any(0), 0, since_fired + ROWS)
    weights = {name: whole(ranks, name, tensor, sae.shared) for name, tensor in sae.state_dict().items()}
    return weights | told


def train_several(ranks: Ranks, settings: dict[str, Any], jobs: list[tuple[dict, str]], *rest: Any) -> list[dict]:
    """`train_split` for changes of the settings on forced paths."""
    steps, dtype = rest
    return [train_split(ranks, settings | change, steps, path, dtype) for change, path in jobs]


def tops_of_all(ranks: Ranks, values_BN: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Both kinds of top, row by row and over all values."""
    return top_k_of_all(ranks, values_BN, k), top_of_all(ranks, values_BN.reshape(-1), len(values_BN) * k)


def top_k_of_all(ranks: Ranks, values_BN: np.ndarray, k: int) -> np.ndarray:
    """Which entries are kept a row, [B, N]."""
    shard = Shard(values_BN.shape[1], ranks)
    own_BN = torch.from_numpy(values_BN)[:, shard.start : shard.end]
    # Candidates in order of features, the lower one first among equals.
    order_BK = own_BN.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    kept_BK = among_top_k(own_BN.gather(1, order_BK), k, ranks)
    kept_BN = torch.zeros_like(own_BN, dtype=torch.bool).scatter(1, order_BK, kept_BK)
    return torch.cat(ranks.gather_ragged(kept_BN.T.flatten())).view(-1, len(values_BN)).T.numpy()


def top_of_all(ranks: Ranks, values: np.ndarray, count: int) -> np.ndarray:
    """Which values are kept, each rank holding every size-th."""
    mine = torch.arange(ranks.rank, len(values), ranks.size)
    kept = among_top(torch.from_numpy(values)[mine], mine, count, ranks)
    return torch.cat(ranks.gather_ragged(mine[kept])).sort().values.numpy()
