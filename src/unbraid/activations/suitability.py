"""Whether a model is what a run takes it for, tried on a few tokens when it is loaded."""

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
    special = {index for index, token in beyond.items() if token in tokenizer.all_special_tokens}
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
    allowed = MOVED.get(before.dtype, MOVED_IN_FEW_BITS)
    moved = (after.double() - before.double()).norm(dim=-1) / before.double().norm(dim=-1).clamp_min(1e-30)
    if not float(moved.max()) <= allowed:
        raise ModelError(
            f"{name} looks ahead: other tokens at the end of a context change what stands before them (by "
            f"{float(moved.max()):.0%}); expected a causal language model; set model.bidirectional to true to use it "
            "as it is, or change model.name"
        )
