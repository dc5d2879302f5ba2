"""Do the contexts of a feature belong together? Judged by a sentence encoder, without written explanations.

Two scores of arXiv 2507.08473; neither needs a model that writes. *Embedding score*: held-out contexts in which
a feature fires must lie nearer to the mean of others in which it fires than random contexts do (area under the ROC
curve; .5 is chance). *Intruder detection*: of four contexts in which it fires and one random one, the odd one out must
be the random one (accuracy; .2 is chance). An encoder knows topics better than syntax, so both are floors, and a random
SAE beside them says how much is owed to contexts that share a word.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from unbraid.evaluation.intervals import mean_interval
from unbraid.evaluation.pairs import stack_codes
from unbraid.evaluation.probes import area_under_curve
from unbraid.evaluation.sentence_encoder import Encoder, SentenceEncoder
from unbraid.evaluation.suite import Suite, register
from unbraid.randomness import derive_seed

if TYPE_CHECKING:
    from unbraid.evaluation.suites import Evaluation

CONTEXTS = 10
"""Contexts per feature: half are the example of what it fires on, the other half are to be recognised."""
MEMBERS = 4
"""Contexts of the feature beside an intruder."""
BEFORE, AFTER = 12, 4
"""Tokens shown before and after the one on which the feature fires."""
RANDOM_CONTEXTS = 100


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


@register
class ContextsSuite(Suite):
    """Whether the contexts of a feature belong together."""

    name = "contexts"
    caption = "whether a feature's contexts belong together, by a sentence encoder; chance is .5 and .2"
    columns: ClassVar = {
        "embedding": ("embedding_score",),
        "intruder": ("intruder_accuracy",),
        "features": ("features",),
    }
    reads = "codes"

    def measure(self, evaluation: "Evaluation") -> None:
        """See `Suite.measure`; it is skipped where the sentence encoder is not installed."""
        encoder, config, model = SentenceEncoder(device=evaluation.device), evaluation.config, evaluation.model
        place_R2 = torch.cat(
            [
                torch.stack([torch.full_like(at, context), at], dim=1)
                for context, (_, keep_T) in enumerate(model.held_out)
                for at in [keep_T.nonzero().squeeze(1)]
            ]
        ).numpy()

        def words(row: int) -> str:
            context, position = place_R2[row].tolist()
            return model.words(context, position, BEFORE, AFTER)

        random_rows = np.random.default_rng(config.seed).permutation(len(place_R2))[:RANDOM_CONTEXTS]
        others = encoder([words(row) for row in random_rows.tolist()])
        with_codes = [subject for subject in evaluation.subjects if subject.codes]
        task = evaluation.bar.add_task("contexts", total=len(with_codes), unit="SAEs")
        for subject in with_codes:
            rng = np.random.default_rng(derive_seed(config.seed, "contexts", subject.name))
            by_feature = stack_codes(subject.codes, subject.codes[0].n_features).tocsc()
            own: list[list[str]] = []
            for feature in rng.permutation(by_feature.shape[1]):
                part = slice(by_feature.indptr[feature], by_feature.indptr[feature + 1])
                rows = windows(by_feature.indices[part], by_feature.data[part], place_R2[:, 0], rng)
                if len(rows) == CONTEXTS:
                    own.append([words(row) for row in rows.tolist()])
                if len(own) == config.context_features:
                    break
            subject.report["contexts"] = context_scores(own, others, encoder, config.seed)
            evaluation.bar.advance(task)
