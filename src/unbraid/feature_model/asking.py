"""Questions about a model's features whose answer is a table: search and the logit lens."""

from typing import Any

import torch
from torch import Tensor

from unbraid.errors import FeatureError
from unbraid.feature_model.dictionaries import Feature
from unbraid.feature_model.positions import check_positions
from unbraid.feature_model.tables import Table, visible
from unbraid.reporting.dashboard.features import logit_lens

FEW_WORDS = 3
LONGEST_WORD = 16


def search(fm: Any, prompt: Any, contrast: Any, by: str, at: Any, k: int) -> Table:
    """See `FeatureModel.search`."""
    if by not in ("max", "sum", "mean"):
        raise FeatureError(f"by={by!r} is unknown; expected 'max', 'sum' or 'mean'")
    if k < 1:
        raise FeatureError(f"k={k}; expected at least 1")
    asked = _scores(fm, prompt, by, at)
    other = {} if contrast is None else _scores(fm, contrast, by, at)
    found = []
    for name, score_N in asked.items():
        difference_N = score_N - other[name] if other else score_N
        values, indices = difference_N.topk(min(k, len(difference_N)))
        for value, index in zip(values.tolist(), indices.tolist(), strict=True):
            if value > 0:
                found.append((value, name, index, float(score_N[index]), float(other[name][index]) if other else None))
    found.sort(key=lambda one: (-one[0], one[1], one[2]))
    rows = [
        {
            "feature": f"{name}/{index}",
            "score": value,
            "prompt": here,
            "contrast": there,
            "share of max": fm.share(name, index, here),
            "words": fm.words(name, index),
        }
        for value, name, index, here, there in found[:k]
    ]
    compared = ["prompt", "contrast"] if contrast is not None else []
    return Table(["feature", "score", *compared, "share of max", "words"], rows, f"features by {by} code")


def _scores(fm: Any, prompt: Any, by: str, at: Any) -> dict[str, Tensor]:
    """NAME -> `[N]`: over each prompt's positions by `by`, then the mean over prompts."""
    batch = fm.prompt(prompt)
    count_B = check_positions(at, batch.span).sum(1).cpu()
    reading = fm.read(batch, at=at)
    scores = {}
    for name, codes in reading.codes.items():
        rows, _, features = codes.indices()
        per_BN = torch.zeros(codes.shape[0] * codes.shape[2])
        place = rows * codes.shape[2] + features
        per_BN.scatter_reduce_(0, place, codes.values(), "amax" if by == "max" else "sum")
        per_BN = per_BN.view(codes.shape[0], codes.shape[2])
        scores[name] = (per_BN / count_B.clamp(min=1)[:, None] if by == "mean" else per_BN).mean(0)
    return scores


def lens(fm: Any, feature: Feature, k: int) -> Table:
    """See `FeatureModel.lens`."""
    if k < 1:
        raise FeatureError(f"k={k}; expected at least 1")
    found = logit_lens(feature.dictionary.W_dec[feature.index : feature.index + 1], fm.hf_model, k)  # pyright: ignore
    if found is None:
        raise FeatureError(
            f"{feature} writes {feature.dictionary.W_dec.shape[1]} wide, not into the residual stream that the "
            "unembedding reads; expected a site of the stream"
        )
    raised_ids, raised, lowered_ids, lowered = (part[0].tolist() for part in found)
    rows = [
        {"raised": text(fm, up), "by": plus, "lowered": text(fm, down), "by ": minus}
        for up, plus, down, minus in zip(raised_ids, raised, lowered_ids, lowered, strict=True)
    ]
    return Table(["raised", "by", "lowered", "by "], rows, f"{feature}: logits through the final norm")


def few_words(fm: Any, feature: Feature) -> str:
    """The tokens a feature fires on where that is known, else those it raises, behind ↑.

    Empty without a tokenizer or an unembedding of the feature's width.
    """
    known = fm.known_held_out
    if known is not None and (fires_on := known.peaks(fm, feature, FEW_WORDS)):
        return " ".join(visible(token)[:LONGEST_WORD] for token in fires_on)
    if fm.tokenizer is None:
        return ""
    found = logit_lens(feature.dictionary.W_dec[feature.index : feature.index + 1], fm.hf_model, FEW_WORDS)  # pyright: ignore
    if found is None:
        return ""
    return "↑ " + " ".join(visible(text(fm, token).strip())[:LONGEST_WORD] for token in found[0][0].tolist())


def text(fm: Any, token: int) -> str:
    """A token's text."""
    return f"<{token}>" if fm.tokenizer is None else fm.tokenizer.decode([token], clean_up_tokenization_spaces=False)
