"""What ranks do in the tests of split SAEs; importable by the processes they run in."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fake_source import FakeSource
from sae_settings import sae_settings

from unbraid import recipes
from unbraid.activations.live import LiveActivations
from unbraid.config import DecorrelationConfig, OptimiserConfig, RunConfig, VariantConfig
from unbraid.decorrelation.base import Penalty
from unbraid.distributed.mesh import Mesh, lay_out
from unbraid.distributed.ranks import Ranks
from unbraid.distributed.shard import Shard, among_top, among_top_k
from unbraid.randomness import generator
from unbraid.sae import Codes, base
from unbraid.training.loop import train_saes
from unbraid.training.normalisation import Normalisation
from unbraid.training.run_folder import RunFolder
from unbraid.training.sae_trainer import new_trainer, train_step, trainer_from_settings
from unbraid.training.stopping import TrainingInterrupted

D, ROWS = 12, 48
LOGGED = ("loss", "sparsity", "grad_norm", "dead_fraction")


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
    """Weights of the whole SAE after `steps` steps on a forced path, and each step's loss, norm and sparsity."""
    variant = VariantConfig(
        seed=0,
        sae=sae_settings(**settings),
        decorrelation=DecorrelationConfig(method="none"),
        optimiser=OptimiserConfig(warmup_steps=0),
    )
    kind, told = getattr(torch, dtype), {}
    shard = Shard(variant.sae.n_features, ranks)
    with _default(kind), _forced(path):
        trainer = trainer_from_settings("split", (0,), variant, 0, Normalisation.none(D), torch.device("cpu"), shard)
        with torch.no_grad():
            trainer.sae.b_dec += 0.01
        for step in range(steps):
            record = train_step(trainer, batch_of(step, kind), step, 3e-3, log=True)
            assert record is not None and record["path"] == path
            told[f"step {step}"] = np.array([record[name] for name in LOGGED])
    sae = trainer.sae
    weights = {name: whole(ranks, name, tensor, sae.shared) for name, tensor in sae.state_dict().items()}
    return weights | told


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    """Weights, moments and losses are made in this precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _forced(path: str) -> Iterator[None]:
    """Every step takes this path, whatever its density."""
    before = dict(base.SPARSE_BELOW)
    base.SPARSE_BELOW["cpu"] = {"sparse": 2.0, "dense": -1.0}[path]
    try:
        yield
    finally:
        base.SPARSE_BELOW.update(before)


def train_penalised(ranks: Ranks, penalties: list[dict[str, Any]], steps: int) -> list[dict[str, np.ndarray]]:
    """Weights of the whole SAE after `steps` steps with each penalty, in float64, with each step's R and |S|."""
    found = []
    for penalty in penalties:
        variant = VariantConfig(
            seed=0,
            sae=sae_settings(architecture="batch_topk", n_features=30, k=5),
            decorrelation=DecorrelationConfig(**penalty),
            optimiser=OptimiserConfig(warmup_steps=0),
        )
        told: dict[str, np.ndarray] = {}
        normalise = Normalisation.side_by_side([Normalisation.none(5), Normalisation.none(D - 5)])
        with _default(torch.float64):
            seat = (torch.device("cpu"), Shard(30, ranks))
            trainer = trainer_from_settings("split", (0,), variant, 0, normalise, *seat)
            for step in range(steps):
                log = step % 3 == 0
                record = train_step(trainer, batch_of(step, torch.float64), step, 3e-3, log=log)
                if record is not None:
                    numbers = record["penalty"], record.get("pairs")
                    told[f"step {step}"] = np.array([np.nan if number is None else number for number in numbers])
        sae = trainer.sae
        weights = {name: whole(ranks, name, tensor, sae.shared) for name, tensor in sae.state_dict().items()}
        found.append(weights | told)
    return found


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


SPLIT = {"steps": 50, "D": 16, "N": 60}


def run_config(settings: dict[str, Any], variants: dict[str, dict] | None = None, **training: Any) -> RunConfig:
    """A run on the fake source: 50 steps of two SAEs with decorrelation on."""
    data: dict[str, Any] = {
        "model": {"sites": ["resid_post.0"], "batch_contexts": 4},
        "buffer": {"contexts": 32},
        "sae": sae_settings(
            **({"n_features": SPLIT["N"], "dead_after_tokens": 800, "lambda1": 0.02, "k": 4} | settings)
        ),
        "decorrelation": {"lambda2": 0.3, "fraction": 0.01},
        "optimiser": {"lr": 3e-3, "warmup_steps": 4},
        "training": {"tokens": SPLIT["steps"] * 32, "batch_tokens": 32, "log_every": 5, "checkpoint_every": 10},
        "variants": variants or {"each": {}, "window": {"decorrelation.window": 4, "decorrelation.measure": "pearson"}},
    }
    data["training"] |= training
    return RunConfig.model_validate(data)


class Silent:
    """Progress nobody looks at."""

    def filling(self, rows: int, capacity: int) -> None:
        """Nothing."""

    def step(self, step: int, record: dict[str, Any] | None) -> None:
        """Nothing."""


def train_run(ranks: Ranks, folder: str, config: RunConfig, steps: int | None = None) -> dict[str, Any]:
    """Train (or go on with) a run on a mesh; weights of the whole SAEs this rank answers for, pairs of every step.

    Args:
        ranks: all ranks.
        folder: the run.
        config: its settings.
        steps: stop after so many.
    """
    mesh = lay_out(ranks, len(config.sites) * len(config.variants), config.training.feature_shards)
    if ranks.first and not (Path(folder) / "config.json").exists():
        RunFolder.create(folder, config)
    ranks.wait()
    pairs: dict[str, list] = {}
    listen = _Listener(pairs)
    with listen:
        try:
            trained = train_saes(
                RunFolder(folder),
                config,
                FakeSource(1200, d_model=SPLIT["D"]),
                torch.device("cpu"),
                listen,
                should_stop=lambda: steps is not None and ranks.first and listen.steps >= steps,
                mesh=mesh,
            )
        except TrainingInterrupted:
            return {"pairs": pairs}
    weights = {
        f"{t.name}.{name}": tensor.detach().numpy()
        for t in trained.trainers
        for name, tensor in t.sae.state_dict().items()
    }
    return {"weights": weights, "pairs": pairs, "payload": dict(mesh.shards.payload)}


def train_runs(ranks: Ranks, folder: str, architectures: tuple[str, ...]) -> list[dict[str, Any]]:
    """`train_run` for each architecture, split over all ranks, and how many lines it logged."""
    found = []
    for architecture in architectures:
        run = f"{folder}/{architecture}"
        trained = train_run(ranks, run, run_config({"architecture": architecture}, feature_shards=ranks.size))
        found.append(trained | {"log lines": len((Path(run) / "metrics.jsonl").read_text().splitlines())})
    return found


def payload_of_a_step(ranks: Ranks, settings: dict[str, Any], rows: int) -> dict[str, Any]:
    """Bytes handed over in one step that is not logged, and the active entries of each rank in it."""
    config = run_config(settings, {"each": {}})
    mesh = Mesh(ranks, ranks)
    trainer = new_trainer(config, 0, "each", [Normalisation.none(SPLIT["D"])], torch.device("cpu"), mesh)
    x_BD = torch.randn(rows, SPLIT["D"], generator=generator(1, "rows"))
    train_step(trainer, x_BD, 0, 1e-3, log=False)
    codes = trainer.sae.training_forward(x_BD).codes
    active = codes.values.numel() if isinstance(codes, Codes) else int((codes > 0).sum())
    before = ranks.payload.copy()
    train_step(trainer, x_BD, 1, 1e-3, log=False)
    return {"payload": dict(ranks.payload - before), "active": active}


def chunks_of_tiny(ranks: Ranks, count: int) -> list[tuple]:
    """The first chunks of the tiny recipe's text, model passes shared; some again from a position in the middle."""
    source = LiveActivations(recipes.tiny(), torch.device("cpu"), ranks)
    chunks = list(islice(source.chunks(None), count))
    chunks += islice(source.chunks(chunks[count // 2].position), 2)
    return [(c.tokens_BT.numpy(), [x.numpy() for x in c.activations], c.position) for c in chunks]


class _Listener(Silent):
    """Counts steps and notes the pairs every penalty selects."""

    def __init__(self, pairs: dict[str, list]):
        self.pairs, self.steps = pairs, 0

    def __enter__(self) -> "_Listener":
        self.forward = Penalty.forward
        Penalty.forward = self.listening(Penalty.forward)
        return self

    def __exit__(self, *_: object) -> None:
        Penalty.forward = self.forward

    def listening(self, forward: Any) -> Any:
        def listened(penalty: Any, *arguments: Any, **named: Any) -> Any:
            value, stats = forward(penalty, *arguments, **named)
            whole = stats if penalty.shard is None else stats.from_all(penalty.shard.ranks)
            name = f"seed {penalty.seed}, {penalty.space}, window {penalty.config.window}"
            self.pairs.setdefault(name, []).append(whole.pairs.tolist())
            return value, stats

        return listened

    def step(self, step: int, record: dict[str, Any] | None) -> None:
        self.steps += 1
