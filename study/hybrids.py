"""Hybrids in decoder space that the library does not offer, tried on the small world before anything was built.

    python study/hybrids.py [--seeds 20 21]          # results/hybrids.jsonl

Which overlapping pairs are pushed (all, only those that hardly fire together, only those that do), which row of a pair
moves, and when the penalty acts. `rarer` came out best and became `decorrelation.push`; what lost stays here. Seeds 20
and 21 are used in no other table, so what was chosen here is judged on samples it was not chosen on.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from trials import NONE, Trial, run
from worlds import FORMS

from unbraid.sae import Codes

SEEDS = [20, 21]
FRACTION, WEIGHT = 0.01, 0.1
TOGETHER = 0.1
"""Code correlation above which two features count as firing together."""
FADING = 0.9
SETTINGS: dict[str, dict[str, Any]] = {
    "no co-firing": {"firing_together": False},
    "co-firing": {"firing_together": True},
    "commoner": {"moves": "commoner"},
    "rarer, no floor": {"moves": "rarer"},
    "rarer": {"moves": "rarer", "floor": 0.2},
    "from half-way": {"acts": lambda done: float(done > 0.5)},
    "rising": {"acts": lambda done: min(1.0, 2 * done)},
    "until four fifths": {"acts": lambda done: float(done < 0.8)},
}


class Hybrid(nn.Module):
    """The hinge above mu + sigma over the most overlapping decoder rows, in a few variations; dense and slow.

    Args:
        steps: length of the training.
        firing_together: only pairs whose codes correlate by more (or, if false, less) than `TOGETHER`; none: all pairs.
        moves: both rows, or the one of the less or the more frequent feature.
        floor: tau never falls below it.
        acts: share of the training done -> weight of the penalty.
    """

    def __init__(
        self,
        steps: int,
        firing_together: bool | None = None,
        moves: str = "both",
        floor: float = 0.0,
        acts: Callable[[float], float] = lambda done: 1.0,
    ):
        super().__init__()
        self.steps, self.firing_together, self.moves, self.floor, self.acts = steps, firing_together, moves, floor, acts
        self.calls = 0
        self.gram_NN: Tensor | float = 0.0
        self.fired_N: Tensor | float = 0.0

    def forward(self, f: Tensor | None = None, *, codes: Codes | None = None, decoder: Tensor) -> tuple[Tensor, None]:
        """What has the penalty's gradient (tau and the set of pairs are constants); there are no stats."""
        self.calls += 1
        unit_ND = F.normalize(decoder, dim=1)
        n_features = len(unit_ND)
        first, second = torch.triu_indices(n_features, n_features, 1)
        with torch.no_grad():
            f_BN = codes.to_dense() if codes is not None else f
            assert f_BN is not None
            self.gram_NN = FADING * self.gram_NN + f_BN.T @ f_BN
            self.fired_N = FADING * self.fired_N + (f_BN > 0).sum(0)
            cosines = (unit_ND @ unit_ND.T)[first, second]
            tau = max(float(cosines.mean() + cosines.std(correction=0)), self.floor)
            norms = self.gram_NN.diagonal().clamp(min=1e-12).sqrt()
            together = (self.gram_NN / norms / norms.unsqueeze(1))[first, second] > TOGETHER
            if self.firing_together is not None:
                cosines = torch.where(together == self.firing_together, cosines, -1.0)
            wanted = max(1, round(FRACTION * len(cosines)))
            chosen = cosines.topk(wanted).indices
            chosen = chosen[cosines[chosen] > tau]
            first, second = first[chosen], second[chosen]
            common = self.fired_N[first] > self.fired_N[second]
            moving = torch.where(common == (self.moves == "commoner"), first, second)
            still = first + second - moving
        if self.moves == "both":
            overlap = (unit_ND[moving] * unit_ND[still]).sum()
        else:
            overlap = 2 * (unit_ND[moving] * unit_ND[still].detach()).sum()
        return self.acts(self.calls / self.steps) * overlap / wanted, None


def trials(seed: int) -> list[Trial]:
    """The hybrids and what they are compared with."""
    known = [(name, NONE if name == "none" else FORMS[name]) for name in ("none", "decoder", "ortsae")]
    new = [(name, {"lambda2": WEIGHT, "space": "decoder"}) for name in SETTINGS]
    return [Trial(kind, name, form, seed) for kind in ("batch_topk", "matryoshka") for name, form in known + new]


def penalty_of(trial: Trial) -> Hybrid | None:
    """The penalty of a hybrid; the library's for the others."""
    return Hybrid(trial.steps, **SETTINGS[trial.method]) if trial.method in SETTINGS else None


def main() -> None:
    """Bring the table up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    for seed in parser.parse_args().seeds:
        run(trials(seed), "hybrids", penalty_of)


if __name__ == "__main__":
    main()
