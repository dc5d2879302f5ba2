"""Do the contexts of a feature belong together? Judged by a sentence encoder, without written explanations.

Two scores of arXiv 2507.08473; neither needs a model that writes. *Embedding score*: held-out contexts in which
a feature fires must lie nearer to the mean of others in which it fires than random contexts do (area under the ROC
curve; .5 is chance). *Intruder detection*: of four contexts in which it fires and one random one, the odd one out must
be the random one (accuracy; .2 is chance). An encoder knows topics better than syntax, so both are floors, and a random
SAE beside them says how much is owed to contexts that share a word.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from unbraid.evaluation.intervals import mean_interval
from unbraid.evaluation.probes import area_under_curve
from unbraid.evaluation.sentence_encoder import Encoder

CONTEXTS = 10
"""Contexts per feature: half are the example of what it fires on, the other half are to be recognised."""
MEMBERS = 4
"""Contexts of the feature beside an intruder."""
BEFORE, AFTER = 12, 4
"""Tokens shown before and after the one on which the feature fires."""


def windows(rows: np.ndarray, values: np.ndarray, contexts_R: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`CONTEXTS` rows on which a feature fires, at most one per context, drawn from the stronger half; fewer if fewer.

    Args:
        rows: where the feature fires, ascending.
        values: its code there.
        contexts_R: the context of every row of the text.
        rng: of the draw.
    """
    order = np.argsort(-values, kind="stable")
    _, first = np.unique(contexts_R[rows[order]], return_index=True)
    strongest = rows[order[np.sort(first)]]
    stronger = strongest[: max(CONTEXTS, len(strongest) // 2)]
    return rng.permutation(stronger)[:CONTEXTS]


def embedding_score(own: Float[Tensor, "C W"], others: Float[Tensor, "O W"]) -> float:
    """Area under the ROC curve of the cosine with the mean of half of `own`: its other half against `others`.

    Args:
        own: unit rows of contexts in which the feature fires, in random order.
        others: unit rows of random contexts.
    """
    half = len(own) // 2
    example = own[:half].mean(0)
    scores = torch.cat([own[half:], others]) @ example
    labels = np.repeat([1, 0], [len(own) - half, len(others)])
    return area_under_curve(scores.double().numpy(), labels)


def intruder_accuracy(own: Float[Tensor, "C W"], others: Float[Tensor, "O W"], rng: np.random.Generator) -> float:
    """Share of random contexts that are least like the four contexts of the feature they stand among."""
    found = []
    for intruder in others:
        members = own[torch.from_numpy(rng.permutation(len(own))[:MEMBERS])]
        five = torch.cat([members, intruder[None]])
        likeness = five @ five.T
        found.append(int((likeness.sum(1) - likeness.diagonal()).argmin()) == MEMBERS)
    return float(np.mean(found))


def context_scores(
    own_texts: Sequence[Sequence[str]], others: Float[Tensor, "O W"], encoder: Encoder, seed: int = 0
) -> dict[str, Any]:
    """Both scores of an SAE's features.

    Args:
        own_texts: per feature, `CONTEXTS` texts in which it fires, in random order.
        others: the encoder's rows of contexts drawn from the whole text, the same for every SAE.
        encoder: texts to unit rows.
        seed: of the intruders' company and of the intervals.

    Returns:
        `embedding_score`, `intruder_accuracy`: means over features, each with its 95 % interval over features;
        `features`: how many were scored.
    """
    if not own_texts:
        return {"embedding_score": None, "intruder_accuracy": None, "features": 0}
    rng = np.random.default_rng(seed)
    flat = encoder([text for texts in own_texts for text in texts])
    parts = flat.split([len(texts) for texts in own_texts])
    embedding = np.array([embedding_score(own, others) for own in parts])
    intruder = np.array([intruder_accuracy(own, others, rng) for own in parts])
    return {
        "embedding_score": float(embedding.mean()),
        "embedding_score_interval": mean_interval(embedding, seed),
        "intruder_accuracy": float(intruder.mean()),
        "intruder_accuracy_interval": mean_interval(intruder, seed),
        "features": len(own_texts),
    }
