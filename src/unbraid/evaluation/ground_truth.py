"""How well an SAE found features that are known, on a synthetic world.

MCC, uniqueness and the detection scores are SynthSAEBench's (arXiv 2602.14687, as computed by sae-lens): each latent is
a detector of the true feature its decoder row is most parallel to, up to sign. The rest says in which way it failed:
absorption (a parent's latent silent where a child fires), hedging (correlated features mixed into a latent),
composition (a child's latent that contains its parent).
"""

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from unbraid.errors import EvaluationError
from unbraid.evaluation.explained import ExplainedVariance
from unbraid.evaluation.mixing import Mixing, mixing
from unbraid.evaluation.pairs import stack_codes
from unbraid.evaluation.protocols import Autoencoder, decoder_rows
from unbraid.evaluation.suite import Suite, register
from unbraid.kernels.codes import Codes
from unbraid.randomness import generator
from unbraid.synthetic.world import World

if TYPE_CHECKING:
    from unbraid.evaluation.suites import Evaluation

RECOVERED = 0.9
LEAST_TOKENS = 10
BATCH_ENTRIES = 1 << 25


@dataclass(frozen=True)
class PerLatent:
    """`[N]` each: the feature a latent stands for, how parallel it is to it, and how well it detects it."""

    feature: Tensor
    cosine: Tensor
    precision: Tensor
    recall: Tensor
    f1: Tensor


@dataclass(frozen=True)
class GroundTruth:
    """One SAE judged on one world; see `evaluate_ground_truth`.

    Attributes:
        mcc: mean |cosine| of the best one-to-one match between latents and features.
        f1, precision, recall, accuracy: mean over latents as detectors of their feature; 0 where undefined.
        uniqueness: distinct features among the latents' features, per latent.
        recovered: features with a latent at |cosine| > 0.9, as a share of the most there could be.
        r2, shrinkage: reconstruction, and mean ||x_hat|| / ||x||.
        l0, true_l0: active latents and active features per token.
        dead: latents that never fired; `dead_fraction` their share.
        absorption_gap: recall(parent | no child) - recall(parent | child), mean over `parents_measured` parents that
            have a latent of their own and were seen often enough with and without a child; None when there is none.
        absorption_gap_error: its standard error over parents.
        hedging, composition: see `mixing`.
    """

    mcc: float
    f1: float
    precision: float
    recall: float
    accuracy: float
    uniqueness: float
    recovered: float
    r2: float
    shrinkage: float
    l0: float
    true_l0: float
    dead: int
    dead_fraction: float
    absorption_gap: float | None
    absorption_gap_error: float | None
    parents_measured: int
    hedging: float | None
    composition: float | None
    n_samples: int
    per_latent: PerLatent = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The scalars, for JSON."""
        return {name: value for name, value in asdict(self).items() if name != "per_latent"}


def absolute_cosines(rows_ND: Float[Tensor, "N D"], features_GD: Float[Tensor, "G D"]) -> Float[Tensor, "N G"]:
    """|cosine| of every latent with every feature; zero rows have cosine zero."""
    rows_ND = rows_ND / rows_ND.norm(dim=1, keepdim=True).clamp(min=1e-8)
    features_GD = features_GD / features_GD.norm(dim=1, keepdim=True).clamp(min=1e-8)
    return (rows_ND @ features_GD.T).abs()


def matched_cosines(cosines: Float[Tensor, "N G"]) -> Float[Tensor, " pairs"]:
    """Cosines of the one-to-one match with the largest sum (Hungarian), `min(N, G)` of them."""
    costs = 1 - cosines.cpu().numpy()
    rows, columns = linear_sum_assignment(costs)
    return cosines[torch.from_numpy(rows), torch.from_numpy(columns)]


@torch.no_grad()
def evaluate_ground_truth(
    sae: Autoencoder, world: World, n_samples: int = 100_000, seed: int = 0, batch: int | None = None
) -> GroundTruth:
    """Judge `sae`, acting on raw activations of `world`, by `n_samples` fresh samples.

    Args:
        sae: anything with `encode`, `decode` and `W_dec [N, D]`, on the device of the world.
        world: the truth.
        n_samples: tokens.
        seed: of the samples; the same seed shows every SAE the same tokens.
        batch: tokens per pass; None takes what fits comfortably. Only speed depends on it.

    Raises:
        EvaluationError: the SAE has no decoder matrix.
    """
    W_dec = decoder_rows(sae).to(world.device)
    cosines = absolute_cosines(W_dec, world.dictionary)
    best_cosine, best = cosines.max(dim=1)
    chance = generator(seed, "ground truth", device=world.device)
    detection = _Detection(best, world, _own_latents(cosines, world))
    explained, codes = ExplainedVariance(), []
    shrinkage, l0 = 0.0, 0.0
    batch = batch or max(64, BATCH_ENTRIES // (world.n_features + 4 * len(W_dec)))
    for x_BD, truth in _samples(world, n_samples, batch, chance):
        f_BN = sae.encode(x_BD)
        x_hat_BD = sae.decode(f_BN)
        explained.add(x_BD, x_hat_BD)
        norms = x_BD.double().norm(dim=1)
        shrinkage += (x_hat_BD.double().norm(dim=1) / norms.clamp(min=1e-6)).sum().item()
        l0 += (f_BN != 0).sum().item()
        detection.add(f_BN != 0, truth.to_dense() > 0)
        codes.append(truth)
    scores = detection.scores()
    truth_codes = stack_codes(codes, world.n_features)
    mixed: Mixing = mixing(W_dec, best, best_cosine, world, truth_codes)
    gap, error, measured = detection.absorption_gap()
    found = (cosines.max(dim=0).values > RECOVERED).sum().item()
    return GroundTruth(
        mcc=matched_cosines(cosines).double().mean().item(),
        f1=scores["f1"].mean().item(),
        precision=scores["precision"].mean().item(),
        recall=scores["recall"].mean().item(),
        accuracy=scores["accuracy"].mean().item(),
        uniqueness=best.unique().numel() / len(best),
        recovered=found / min(cosines.shape),
        r2=explained.r2,
        shrinkage=shrinkage / n_samples,
        l0=l0 / n_samples,
        true_l0=truth_codes.nnz / n_samples,
        dead=int((detection.fired == 0).sum()),
        dead_fraction=(detection.fired == 0).double().mean().item(),
        absorption_gap=gap,
        absorption_gap_error=error,
        parents_measured=measured,
        hedging=mixed.hedging,
        composition=mixed.composition,
        n_samples=n_samples,
        per_latent=PerLatent(best, best_cosine, scores["precision"], scores["recall"], scores["f1"]),
    )


def _samples(world: World, n_samples: int, batch: int, chance: torch.Generator):
    block = 16_384  # drawn in blocks of one size, so that the tokens do not depend on the batch
    for start in range(0, n_samples, block):
        x, codes = world.sample(min(block, n_samples - start), chance)
        for first in range(0, len(x), batch):
            yield x[first : first + batch], _rows_between(codes, first, min(first + batch, len(x)))


def _rows_between(codes: Codes, first: int, last: int) -> Codes:
    start, stop = int(codes.offsets[first]), int(codes.offsets[last])
    offsets = codes.offsets[first : last + 1] - start
    return Codes.unchecked(offsets, codes.indices[start:stop], codes.values[start:stop], codes.n_features)


def _own_latents(cosines: Float[Tensor, "N G"], world: World) -> Int[Tensor, "M 2"]:
    """(parent, latent) for every parent whose most parallel latent is, in turn, most parallel to it."""
    parents = world.is_parent.nonzero().squeeze(1)
    latents = cosines[:, parents].argmax(dim=0)
    mutual = cosines[latents].argmax(dim=1) == parents
    return torch.stack([parents[mutual], latents[mutual]], dim=1)


class _Detection:
    """Counts of hits and misses of every latent as a detector of its feature."""

    def __init__(self, best: Tensor, world: World, own: Tensor):
        self.best, self.world, self.own = best, world, own
        counts = torch.zeros(4, len(best), dtype=torch.int64, device=best.device)
        self.hits, self.fired, self.present = counts[0], counts[1], counts[2]
        self.n_tokens = 0
        self.parent_counts = torch.zeros(4, len(own), dtype=torch.int64, device=best.device)

    def add(self, fires_BN: Tensor, truth_BG: Tensor) -> None:
        target_BN = truth_BG[:, self.best]
        self.hits += (fires_BN & target_BN).sum(0)
        self.fired += fires_BN.sum(0)
        self.present += target_BN.sum(0)
        self.n_tokens += len(fires_BN)
        parents, latents = self.own.unbind(1)
        children = self.world.children[parents]
        with_child = (truth_BG[:, children.clamp(min=0)] & (children >= 0)).any(2)
        present, seen = truth_BG[:, parents], fires_BN[:, latents]
        for row, where in enumerate((present & ~with_child, present & with_child)):
            self.parent_counts[2 * row] += where.sum(0)
            self.parent_counts[2 * row + 1] += (where & seen).sum(0)

    def scores(self) -> dict[str, Tensor]:
        hits, fired, present = self.hits.double(), self.fired.double(), self.present.double()
        wrong = fired + present - 2 * hits
        return {
            "precision": hits / fired.clamp(min=1),
            "recall": hits / present.clamp(min=1),
            "f1": 2 * hits / (fired + present).clamp(min=1),
            "accuracy": 1 - wrong / max(1, self.n_tokens),
        }

    def absorption_gap(self) -> tuple[float | None, float | None, int]:
        alone, alone_seen, together, together_seen = self.parent_counts.double()
        enough = (alone >= LEAST_TOKENS) & (together >= LEAST_TOKENS)
        if not enough.any():
            return None, None, 0
        gaps = (alone_seen / alone - together_seen / together)[enough].cpu().numpy()
        error = float(gaps.std(ddof=1) / np.sqrt(len(gaps))) if len(gaps) > 1 else None
        return float(gaps.mean()), error, len(gaps)


@register
class GroundTruthSuite(Suite):
    """Against the features of a synthetic world."""

    name = "ground-truth"
    caption = "against the world's own features"
    columns: ClassVar = {
        "MCC": ("mcc",),
        "F1": ("f1",),
        "precision": ("precision",),
        "recall": ("recall",),
        "unique": ("uniqueness",),
        "absorption gap": ("absorption_gap",),
    }

    def measure(self, evaluation: "Evaluation") -> None:
        """See `Suite.measure`; it is skipped where no world is named, or it is not the SAEs' own."""
        world, config, subjects = evaluation.world, evaluation.config, evaluation.subjects
        if world is None:
            raise EvaluationError("no synthetic world was named; give --world for SAEs trained on one")
        if any(getattr(subject.sae, "is_transcoder", False) for subject in subjects):
            raise EvaluationError("a world's true features are those of SAEs; a transcoder predicts another site")
        if world.d_model != subjects[0].sae.d_in:
            raise EvaluationError(
                f"world {config.world!r} is {world.d_model} wide, the SAE {subjects[0].sae.d_in}; name the world the "
                "SAE was trained on"
            )
        task = evaluation.bar.add_task("ground truth", total=len(subjects), unit="SAEs")
        for subject in subjects:
            found = evaluate_ground_truth(subject.sae, world, config.world_samples, config.seed)
            subject.report["ground-truth"] = found.to_dict()
            evaluation.bar.advance(task)
