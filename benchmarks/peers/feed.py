"""What every contender of `benchmarks/step.py` shares: the same batches, the same clock, the same score.

A library's own training loop asks `Feed` for its next batch; whatever happens between two requests is one step of that
library: forward, backward, optimiser, bookkeeping. Between rounds the request simply does not return, so contenders can
take turns in processes of their own without any of them being interrupted inside a step. Only torch is needed here.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

ACTIVE = 24
HELD_OUT_ROWS = 2048


def activations(d_in: int, n_features: int, rows: int, seed: int) -> Tensor:
    """[rows, d_in] with E||x||^2 = 1: sums of ACTIVE of n_features / 2 directions, some popular, a mean and noise."""
    world = torch.Generator().manual_seed(1)
    truth = torch.nn.functional.normalize(torch.randn(n_features // 2, d_in, generator=world), dim=1)
    mean = torch.randn(d_in, generator=world) / d_in**0.5
    popularity = torch.arange(1, n_features // 2 + 1).float() ** -0.5
    draw = torch.Generator().manual_seed(seed)
    which = torch.multinomial(popularity, rows * ACTIVE, replacement=True, generator=draw).view(rows, ACTIVE)
    size = torch.rand(rows, ACTIVE, generator=draw) + 0.5
    x = torch.nn.functional.embedding_bag(which, truth, per_sample_weights=size, mode="sum")
    x += mean + 0.01 * torch.randn(rows, d_in, generator=draw)
    return x / x.square().sum(1).mean().sqrt()


class Feed:
    """Iterator over batches that times what happens between two requests, and takes orders on stdin.

    Orders, one JSON object a line: {"steps": n} trains n steps and answers {"wall_ms", "cpu_ms", "peak_mib"};
    {"score": true} answers the held-out score; end of input ends the process. Answers go to a pipe of their own,
    because libraries print.
    """

    def __init__(self, settings: dict, score: Callable[[Tensor], tuple[Tensor, Tensor]]):
        self.settings, self.score = settings, score
        rows = settings["batch"] * settings["distinct_batches"]
        self.batches = activations(settings["d_in"], settings["n_features"], rows, seed=2).split(settings["batch"])
        self.asked, self.quota = 0, 0
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.started: tuple[float, float] | None = None
        self.answers = os.fdopen(settings["answers"], "w")

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        if self.started is not None:
            self.wall.append(1e3 * (time.perf_counter() - self.started[0]))
            self.cpu.append(1e3 * (time.process_time() - self.started[1]))
        while self.quota == 0:
            self._take_order()
        self.quota -= 1
        batch = self.batches[self.asked % len(self.batches)].clone()
        self.asked += 1
        self.started = (time.perf_counter(), time.process_time())
        return batch

    def _take_order(self) -> None:
        if self.wall:
            self._answer({"wall_ms": self.wall, "cpu_ms": self.cpu, "peak_mib": resident_mib("VmHWM")})
            self.wall, self.cpu = [], []
        line = sys.stdin.readline()
        if not line:
            os._exit(0)
        order = json.loads(line)
        if "steps" in order:
            self.quota = order["steps"]
        if "score" in order:
            self._answer(self._held_out())

    @torch.no_grad()
    def _held_out(self) -> dict[str, float]:
        x = activations(self.settings["d_in"], self.settings["n_features"], HELD_OUT_ROWS, seed=3)
        x_hat, f = self.score(x)
        reconstruction, l1 = (x - x_hat).square().sum(1).mean().item(), f.sum(1).mean().item()
        l1_weight = self.settings["lambda1"] if self.settings["architecture"] in ("relu", "gated") else 0.0
        return {
            "objective": reconstruction + l1_weight * l1,
            "reconstruction": reconstruction,
            "l1": l1,
            "l0": (f != 0).float().sum(1).mean().item(),
            "steps": self.asked,
        }

    def _answer(self, data: dict) -> None:
        self.answers.write(json.dumps(data) + "\n")
        self.answers.flush()


def resident_mib(field: str) -> float:
    """VmRSS (now) or VmHWM (most so far) of this process, in MiB."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field))


def settings_from_arguments() -> dict:
    """The JSON object on the command line; threads and seed are put into effect."""
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(settings["seed"])
    return settings


@torch.no_grad()
def bias_for_l0(pre: Tensor, l0: float) -> float:
    """The constant to add to pre-activations so that `l0` of them a row are positive."""
    return -float(pre.flatten().kthvalue(max(1, round(pre.numel() * (1 - l0 / pre.shape[1])))).values)
