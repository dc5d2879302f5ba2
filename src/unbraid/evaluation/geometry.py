"""What the directions of an SAE look like among themselves, and against those of another.

Near-parallel decoder rows are features learned twice or features that leak into each other. A meta-SAE on the decoder
rows (arXiv 2502.04878; SAEBench `meta_structure`) says how far they are compositions of fewer directions: the
composition rate of OrtSAE (arXiv 2509.22033), lower is more atomic. Two SAEs of different seeds that agree found
something about the data and not about their start.
"""

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from unbraid.config import OptimiserConfig, SAEConfig
from unbraid.evaluation.explained import ExplainedVariance
from unbraid.evaluation.subjects import EvaluatedSAE
from unbraid.evaluation.suite import Suite, register
from unbraid.randomness import generator
from unbraid.sae.build import build
from unbraid.training.optimiser import SAEOptimiser

if TYPE_CHECKING:
    from unbraid.evaluation.suites import Evaluation

TILE_ENTRIES = 1 << 24
META_WIDTH_RATIO, META_K, META_STEPS, META_ROWS, META_LR = 0.25, 4, 1500, 1024, 5e-4
WIDEST_AGREEMENT = 8192


@torch.no_grad()
def max_cosines(rows_ND: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
    """Each row's largest (signed) cosine with any other row, computed in tiles."""
    unit_ND = F.normalize(rows_ND, dim=1)
    largest_N = unit_ND.new_empty(len(unit_ND))
    step = max(1, TILE_ENTRIES // max(1, len(unit_ND)))
    for first in range(0, len(unit_ND), step):
        tile = unit_ND[first : first + step] @ unit_ND.T
        own = torch.arange(len(tile), device=tile.device)
        tile[own, first + own] = -torch.inf
        largest_N[first : first + step] = tile.max(dim=1).values
    return largest_N


@torch.no_grad()
def seed_agreement(rows_ND: Float[Tensor, "N D"], other_MD: Float[Tensor, "M D"]) -> float:
    """Mean cosine of the best one-to-one match between the decoder rows of two SAEs (Hungarian)."""
    cosines = (F.normalize(rows_ND.float(), dim=1) @ F.normalize(other_MD.float(), dim=1).T).cpu().double()
    rows, columns = linear_sum_assignment(cosines.numpy(), maximize=True)
    return cosines[torch.from_numpy(rows), torch.from_numpy(columns)].mean().item()


def composition_rate(rows_ND: Float[Tensor, "N D"], steps: int = META_STEPS, seed: int = 0) -> float:
    """Share of the variance of unit decoder rows that a BatchTopK meta-SAE a quarter as wide explains with 4 features.

    Args:
        rows_ND: decoder rows.
        steps: training steps, each on 1024 rows drawn with replacement.
        seed: of the meta-SAE and of the draws.
    """
    rows_ND = F.normalize(rows_ND.float(), dim=1)
    width = max(math.ceil(len(rows_ND) * META_WIDTH_RATIO), META_K, 2)
    config = SAEConfig(architecture="batch_topk", n_features=width, k=META_K)
    meta = build(config, rows_ND.shape[1], generator(seed, "meta-SAE")).to(rows_ND.device)
    with torch.no_grad():
        meta.b_dec.copy_(rows_ND.mean(0))
    optimiser = SAEOptimiser(meta, OptimiserConfig(lr=META_LR))
    chance = generator(seed, "meta-SAE rows")
    for _ in range(steps):
        drawn = torch.randint(len(rows_ND), (META_ROWS,), generator=chance)
        forward = meta.training_forward(rows_ND[drawn.to(rows_ND.device)])
        optimiser.zero_grad()
        (forward.reconstruction + forward.auxiliary).backward()
        optimiser.step(META_LR)
    explained = ExplainedVariance()
    with torch.no_grad():
        for part in rows_ND.split(META_ROWS):
            explained.add(part, meta(part))
    return explained.r2


@register
class GeometrySuite(Suite):
    """Decoder rows among themselves, and beside those of other SAEs of the same site."""

    name = "geometry"
    caption = "mean largest cosine between decoder rows; share of them explained by a quarter as many directions"
    columns: ClassVar = {"max cosine": ("mean_max_decoder_cosine",), "composition": ("composition_rate",)}

    def measure(self, evaluation: "Evaluation") -> None:
        """See `Suite.measure`."""
        config, subjects = evaluation.config, [one for one in evaluation.subjects if one.has_own_features]
        task = evaluation.bar.add_task("geometry", total=len(subjects), unit="SAEs")
        for subject in subjects:
            W_dec = subject.sae.W_dec.detach().float()
            subject.report["geometry"] = {
                "mean_max_decoder_cosine": max_cosines(W_dec).double().mean().item(),
                "composition_rate": composition_rate(W_dec, config.meta_steps, config.seed),
                "composition_steps": config.meta_steps,
                "agreement": {
                    other.name: seed_agreement(W_dec, other.sae.W_dec.detach())
                    for other in subjects
                    if other is not subject and _comparable(subject, other)
                },
            }
            evaluation.bar.advance(task)


def _comparable(subject: EvaluatedSAE, other: EvaluatedSAE) -> bool:
    widths = subject.sae.W_dec.shape[0], other.sae.W_dec.shape[0]
    here = (subject.sites, subject.outputs) == (other.sites, other.outputs)
    return here and other.control is None and max(widths) <= WIDEST_AGREEMENT
