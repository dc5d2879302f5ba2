"""What every contender of `benchmarks/step.py` shares: the same batches, the same clock, the same score.

A library's own training loop asks `Feed` for its next batch; whatever happens between two requests is one step of that
library: forward, backward, optimiser, bookkeeping. Between rounds the request simply does not return, so contenders can
take turns in processes of their own without any of them being interrupted inside a step. Only torch is needed here.
"""

import json
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from turns import Turns

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
    """Iterator over batches that takes turns: what happens between two requests is a step of the library.

    The order {"score": true} is answered by the held-out score.
    """

    def __init__(self, settings: dict, score: Callable[[Tensor], tuple[Tensor, Tensor]]):
        self.settings, self.score = settings, score
        rows = settings["batch"] * settings["distinct_batches"]
        drawn = activations(settings["d_in"], settings["n_features"], rows, seed=2)
        self.batches = drawn.to(settings["device"]).split(settings["batch"])
        self.asked = 0
        self.turns = Turns(settings["answers"], score=self._held_out)

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        if self.settings["device"] != "cpu":
            torch.cuda.synchronize()
        self.turns.finish()
        batch = self.batches[self.asked % len(self.batches)].clone()
        self.asked += 1
        self.turns.begin()
        return batch

    @torch.no_grad()
    def _held_out(self) -> dict[str, float]:
        x = activations(self.settings["d_in"], self.settings["n_features"], HELD_OUT_ROWS, seed=3)
        x = x.to(self.settings["device"])
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
