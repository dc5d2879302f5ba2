"""Whether a model is what a run takes it for, tried on a few tokens when it is loaded."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unbraid.errors import ModelError

TRIAL_TOKENS = 8
"""Length of the two contexts that a model is tried on."""
MOVED = {torch.float32: 1e-5, torch.float64: 1e-5}
"""Relative change of earlier activations that counts as looking ahead; in lower precision it is MOVED_IN_FEW_BITS."""
MOVED_IN_FEW_BITS = 0.03


def trial_tokens(vocabulary: int) -> Tensor:
    """Two short contexts of different tokens."""
    return (7 + torch.arange(2 * TRIAL_TOKENS)).view(2, TRIAL_TOKENS) % vocabulary


def check_vocabulary(name: str, tokenizer: Any, special_ids: tuple[int, ...], vocabulary: int) -> None:
    """Every token that the tokenizer can make of text must be in the embedding.

    Special tokens beyond it, an image's for example, never come from text and are no reason to refuse; those that mark
    beginning, end and padding do.

    Raises:
        ModelError: naming the first token without a row.
    """
    if not hasattr(tokenizer, "get_vocab"):
        return
    beyond = {index: token for token, index in tokenizer.get_vocab().items() if index >= vocabulary}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {index for index in beyond if getattr(added.get(index), "special", False)}
    special |= {index for index, token in beyond.items() if token in tokenizer.all_special_tokens}
    if set(beyond) - (special - set(special_ids)):
        first = min(beyond)
        raise ModelError(
            f"the tokenizer of {name} has {len(tokenizer):,} tokens and the model's embedding {vocabulary:,} rows: "
            f"token {first} ({beyond[first]!r}) has none; expected no more tokens than rows; use the tokenizer the "
            "model was trained with, or call model.resize_token_embeddings, train or set the new rows, and save the "
            "model"
        )


def check_causal(name: str, last_output: Callable[[Tensor], Tensor], vocabulary: int) -> None:
    """Other tokens at the end must leave the last block's output at the beginning where it was.

    Args:
        name: what messages call the model.
        last_output: token ids [C, T] -> the last block's output [C, T, D].
        vocabulary: token ids the model knows.

    Raises:
        ModelError: the model looks ahead.
    """
    tokens, half = trial_tokens(vocabulary), TRIAL_TOKENS // 2
    changed = tokens.clone()
    changed[:, half:] = (tokens[:, half:] + 5) % vocabulary
    before, after = last_output(tokens)[:, :half], last_output(changed)[:, :half]
    moved, allowed = _moved(before, after)
    if not moved <= allowed:
        raise ModelError(
            f"{name} looks ahead: other tokens at the end of a context change what stands before them (by "
            f"{moved:.0%}); expected a causal language model; set model.bidirectional to true to use it "
            "as it is, or change model.name"
        )


def check_keeps_documents_apart(name: str, last_output: Callable[[Tensor, Tensor], Tensor], vocabulary: int) -> None:
    """Two documents in one context, told apart by their positions, must give what each gives alone.

    Args:
        name: what messages call the model.
        last_output: token ids [C, T], positions [C, T] -> the last block's output [C, T, D].
        vocabulary: token ids the model knows.

    Raises:
        ModelError: a document sees the one before it, or positions are not understood.
    """
    tokens_1T = trial_tokens(vocabulary).view(1, -1)
    documents = tokens_1T.split([TRIAL_TOKENS + 3, TRIAL_TOKENS - 3], dim=1)
    positions = [torch.arange(document.shape[1])[None] for document in documents]
    try:
        together = last_output(tokens_1T, torch.cat(positions, dim=1))
        alone = torch.cat([last_output(*one) for one in zip(documents, positions, strict=True)], dim=1)
        moved, allowed = _moved(alone, together)
    except (RuntimeError, ValueError, TypeError, IndexError):  # code of the model's makers
        moved, allowed = math.inf, 0.0
    if not moved <= allowed:
        raise ModelError(
            f"{name} cannot keep the documents of a context apart: attention does not stop where positions start anew, "
            "as in state-space and recurrent models, or with positions that are no input; expected a model in which it "
            "does, such as Llama or GPT-2; set text.separate_documents to false, or text.pack to false for one "
            "document per context"
        )


def _moved(before: Tensor, after: Tensor) -> tuple[float, float]:
    """The largest relative change of a token's activations, and the one that rounding explains."""
    moved = (after.double() - before.double()).norm(dim=-1) / before.double().norm(dim=-1).clamp_min(1e-30)
    return float(moved.max()), MOVED.get(before.dtype, MOVED_IN_FEW_BITS)
