"""One SAE split by features over gloo processes: time and bytes of a step, beside what the cost model predicts.

    python benchmarks/scaling.py                       the table of docs/distributed.md (4 processes, under a minute)
    python benchmarks/scaling.py --wide                1M features over 4 processes, with decorrelation: peak memory
    python benchmarks/scaling.py --plan                GPUs: 1 to 64 of them, up to 16M features, 10 billion tokens

The machine's rates are measured by one process and by two that exchange; the steps of 1, 2 and 4 are then predicted and
measured. Processes beyond the number of cores share them, and the prediction says so.
"""

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

from unbraid.config import RunConfig
from unbraid.decorrelation import coactive
from unbraid.distributed.cost import Job, Machine, bytes_of_rank, seconds_of_step, smallest_ranks, split_step_payload
from unbraid.distributed.mesh import Mesh
from unbraid.distributed.ranks import ALONE, Ranks
from unbraid.randomness import generator
from unbraid.sae import Codes
from unbraid.training.normalisation import Normalisation
from unbraid.training.sae_trainer import new_trainer, train_step

CPU = torch.device("cpu")
HERE = Job(rows=512, width=256, n_features=32_768, k=32)
WIDE = Job(rows=256, width=64, n_features=1_000_000, k=32)
PLANNED = Job(rows=8_192, width=2_304, n_features=16_384, k=64, model_parameters=1_900_000_000)
GPU = Machine(flops=4e14, memory_bandwidth=2.5e12, link_bandwidth=5e10, latency=3e-5, pairs_per_second=2e9)
"""An H100 or H200 in bf16 with half its peak, and 400 Gbit/s a GPU between nodes; pairs a second are a guess."""


def steps_of(ranks: Ranks, job: Job, steps: int) -> dict[str, Any]:
    """Seconds and bytes of training steps of a TopK SAE with per-batch decorrelation, after two to warm up."""
    settings = {
        "sae": {"architecture": "topk", "n_features": job.n_features, "k": job.k},
        "decorrelation": {"lambda2": 0.1, "max_pairs_per_feature": 1},
    }
    config = RunConfig.model_validate(settings)
    trainer = new_trainer(config, 0, "", [Normalisation.none(job.width)], CPU, Mesh(ranks, ranks))
    rows = torch.randn(steps + 2, job.rows, job.width, generator=generator(0, "rows")) / job.width**0.5
    seconds, before = [], ranks.payload.copy()
    for step, x_BD in enumerate(rows):
        if step == 2:
            before = ranks.payload.copy()
        ranks.wait()
        before["sum"] += 8 if ranks.size > 1 else 0
        began = time.perf_counter()
        train_step(trainer, x_BD, step, 1e-4, log=False)
        seconds.append(time.perf_counter() - began)
    payload = {kind: n // steps for kind, n in (ranks.payload - before).items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds[2:], "payload": payload, "peak": peak}


def exchange_rates(ranks: Ranks, n_bytes: int) -> dict[str, float]:
    """Bytes a second of a large sum as a ring would move them, and the seconds of a tiny one."""

    def median(tensor: torch.Tensor, times: int) -> float:
        found = []
        for _ in range(times):
            began = time.perf_counter()
            ranks.sum(tensor)
            found.append(time.perf_counter() - began)
        return statistics.median(found[1:])

    latency = median(torch.zeros(1), 50)
    large = median(torch.zeros(n_bytes // 4), 10)
    moved = 2 * n_bytes * (ranks.size - 1) / ranks.size
    return {"bandwidth": moved / max(large - latency, 1e-9), "latency": latency}


def rates_of_this_machine(job: Job) -> Machine:
    """What one process does alone, and two together."""
    x_BD, W_ND = torch.randn(job.rows, job.width), torch.randn(8192, job.width)
    product = seconds(lambda: x_BD @ W_ND.T)
    block, target = torch.randn(16 << 20), torch.zeros(16 << 20)
    copied = seconds(lambda: target.copy_(block))
    features = torch.stack([torch.randperm(job.n_features)[: job.k] for _ in range(job.rows)])
    codes = Codes.from_topk(features, torch.rand(job.rows, job.k) + 0.1, job.n_features)
    selected = seconds(lambda: coactive.select(codes, fraction=1e-3, measure="cosine"))
    exchanged = on_processes(2, exchange_rates, 4 * job.rows * job.width)[0]
    return Machine(
        flops=2 * job.rows * job.width * 8192 / product,
        memory_bandwidth=2 * block.nbytes / copied,
        link_bandwidth=exchanged["bandwidth"],
        latency=exchanged["latency"],
        pairs_per_second=job.rows * job.k * (job.k - 1) / 2 / selected,
    )


def seconds(work: Callable[[], Any], times: int = 9) -> float:
    """Median of some runs, after one to warm up."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])


def on_processes(size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`work(ranks, *arguments)` on processes of one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_at_work, (size, folder, work, arguments), nprocs=size)  # pyright: ignore
        return [json.loads(Path(f"{folder}/{rank}.json").read_text()) for rank in range(size)]


def _at_work(rank: int, size: int, folder: str, work: Callable[..., Any], arguments: tuple) -> None:
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    result = work(Ranks(dist.group.WORLD) if size > 1 else ALONE, *arguments)
    Path(f"{folder}/{rank}.json").write_text(json.dumps(result))
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()


def measure(job: Job, sizes: list[int], steps: int) -> dict[str, Any]:
    """Predicted and measured seconds and bytes of a step, for each number of processes."""
    torch.set_num_threads(1)
    machine, cores = rates_of_this_machine(job), os.cpu_count() or 1
    print(f"one process: {machine}\n")
    print("ranks  measured ms (min..max)   predicted ms  bytes/step measured  formula   peak MiB, all ranks")
    table = []
    for size in sizes:
        ranks = on_processes(size, steps_of, job, steps)
        times = [max(rank["seconds"][step] for rank in ranks) for step in range(steps)]
        parts = seconds_of_step(job, size, machine)
        crowd = max(1.0, size / cores)
        predicted = sum(part * (crowd if name != "exchange" else 1.0) for name, part in parts.items())
        # The largest slice of the batch differs from step to step; the formula is given an even share.
        formula = split_step_payload(job, size, -(-job.rows * job.k // size)) if size > 1 else {"sum": 0, "gather": 0}
        table.append(
            {
                "ranks": size,
                "seconds": statistics.median(times),
                "spread": [min(times), max(times)],
                "predicted": predicted,
                "parts": parts,
                "payload": ranks[0]["payload"],
                "formula": formula,
                "peak": sum(rank["peak"] for rank in ranks),
            }
        )
        row = table[-1]
        print(
            f"{size:5d}  {1e3 * row['seconds']:8.1f} ({1e3 * min(times):.1f}..{1e3 * max(times):.1f})  "
            f"{1e3 * predicted:12.1f}  {sum(row['payload'].values()):19,d}  {sum(formula.values()):9,d}  "
            f"{row['peak'] / 2**20:9,.0f}",
            flush=True,
        )
    return {"job": vars(job), "machine": vars(machine), "cores": cores, "table": table}


def plan(tokens: float = 1e10, memory: float = 7.2e10) -> list[dict[str, Any]]:
    """Hours for `tokens` on GPUs of `memory` bytes, for widths up to 16M."""
    print(
        f"{tokens:.0e} tokens, batches of {PLANNED.rows}, D = {PLANNED.width}, k = {PLANNED.k}; hours (share exchanged)"
    )
    counts = [1, 2, 4, 8, 16, 32, 64]
    print("features   least  " + "".join(f"{n:>12d}" for n in counts))
    rows = []
    for exponent in (14, 17, 20, 22, 24):
        job = Job(**vars(PLANNED) | {"n_features": 2**exponent})
        least, line = smallest_ranks(job, memory), []
        for count in counts:
            parts = seconds_of_step(job, count, GPU)
            total = sum(parts.values())
            hours = total * tokens / job.rows / 3600
            exchanged = (parts["exchange"] + parts["activations"]) / total
            line.append(f"{hours:6.0f} ({exchanged:3.0%})" if count >= least else "-")
            rows.append({"features": 2**exponent, "gpus": count, "hours": hours, "fits": count >= least} | parts)
        print(f"{2**exponent:10,d} {least:5d}  " + "".join(f"{cell:>12s}" for cell in line))
        print(f"           {bytes_of_rank(job, least) / 2**30:.0f} GiB a GPU on {least}")
    return rows


def main() -> None:
    """Read the options, measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wide", action="store_true", help="1M features over 4 processes")
    parser.add_argument("--plan", action="store_true", help="the cost model alone")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    options = parser.parse_args()
    if options.plan:
        result: Any = plan()
    elif options.wide:
        result = measure(WIDE, [4], options.steps)
    else:
        result = measure(HERE, options.ranks, options.steps)
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
