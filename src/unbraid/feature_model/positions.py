"""Which tokens an edit or a question is about, whatever the padding, the cache and the length of the chunk.

A position counts the real tokens of its row from 0, so it means the same in a batch, alone, and while generating: the
chunk that a cached pass sees is told its positions and never counts them itself. Negative positions count from the end
of the *prompt*: -1 is the last prompt token, the one that predicts the first new token.

Positions are an int, a slice, a list of ints, a mask over the prompt (`[T]` or `[B, T]`), or one of three words:
`"content"` is every token that is neither special nor at position 0, `"last"` the last prompt token, `"all"` everything
but padding. `"content"`, `"all"` and slices without a stop go on into generated text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unbraid.errors import FeatureError


@dataclass(frozen=True)
class Span:
    """The tokens of one forward pass.

    Attributes:
        position_BT: `[B, T]` int64, counted in real tokens; -1 is padding.
        special_BT: `[B, T]` bool.
        length_B: `[B]` real tokens of each prompt.
    """

    position_BT: Tensor
    special_BT: Tensor
    length_B: Tensor

    @classmethod
    def of_prompt(cls, tokens_BT: Tensor, real_BT: Tensor, special_ids: Sequence[int]) -> "Span":
        """The span of a pass over whole prompts."""
        position_BT = (real_BT.long().cumsum(1) - 1).masked_fill(~real_BT, -1)
        return cls(position_BT, is_special(tokens_BT, special_ids), real_BT.sum(1))

    @property
    def content_BT(self) -> Tensor:
        """Tokens that are neither special nor padding nor at position 0."""
        return (self.position_BT > 0) & ~self.special_BT


def is_special(tokens_BT: Tensor, special_ids: Sequence[int]) -> Tensor:
    """Which tokens are special, `[B, T]`."""
    return torch.isin(tokens_BT, torch.tensor(list(special_ids), device=tokens_BT.device, dtype=tokens_BT.dtype))


def chosen(at: Any, span: Span) -> Tensor:
    """Which tokens of `span` the positions `at` name, `[B, T]` bool.

    Raises:
        FeatureError: `at` is of no known kind, or a mask has another shape than the prompt.
    """
    position_BT, length_B1 = span.position_BT, span.length_B[:, None]
    if isinstance(at, str):
        words = {
            "content": span.content_BT,
            "last": position_BT == length_B1 - 1,
            "all": position_BT >= 0,
        }
        if at not in words:
            raise FeatureError(f"at={at!r} is not understood; expected {EXPECTED}")
        return words[at]
    if isinstance(at, slice):
        return _in_slice(at, position_BT, length_B1)
    if isinstance(at, bool):
        raise FeatureError(f"at={at!r} is not a position; expected {EXPECTED}")
    if isinstance(at, int):
        return (position_BT == (at if at >= 0 else length_B1 + at)) & (position_BT >= 0)
    if isinstance(at, Tensor) and at.dtype == torch.bool:
        return _in_mask(at, position_BT, span.length_B)
    places = at.tolist() if hasattr(at, "tolist") else at  # pyright: ignore
    if isinstance(places, list | tuple) and all(isinstance(one, int) for one in places):
        if places and all(isinstance(one, bool) for one in places):
            return _in_mask(torch.tensor(places), position_BT, span.length_B)
        mask_BT = torch.zeros_like(position_BT, dtype=torch.bool)
        for one in places:
            mask_BT |= chosen(int(one), span)
        return mask_BT
    raise FeatureError(f"at={at!r} is not understood; expected {EXPECTED}")


EXPECTED = "'content', 'last', 'all', a position, a slice, a list of positions, or a mask over the prompt"


def check_positions(at: Any, span: Span) -> Tensor:
    """`chosen` for a whole prompt; positions that name no token of it are refused.

    Raises:
        FeatureError: a position lies outside a prompt, or nothing is named.
    """
    places = [at] if isinstance(at, int) else at if isinstance(at, list | tuple) else []
    shortest = int(span.length_B.min())
    for place in places:
        if isinstance(place, int) and not isinstance(place, bool) and not -shortest <= place < shortest:
            raise FeatureError(
                f"position {place} is outside the prompt; expected {-shortest} to {shortest - 1}, the shortest prompt "
                f"has {shortest} tokens; change at"
            )
    mask_BT = chosen(at, span)
    if not bool(mask_BT.any()):
        if at == "content":
            raise FeatureError("the prompt is empty; expected some text")
        raise FeatureError(f"at={at!r} names no token of the prompt ({shortest} tokens); expected at least one")
    return mask_BT


def _in_slice(at: slice, position_BT: Tensor, length_B1: Tensor) -> Tensor:
    step = 1 if at.step is None else at.step
    if step < 1:
        raise FeatureError(f"at={at!r} has step {step}; expected a positive step")
    start_B1 = torch.zeros_like(length_B1) if at.start is None else torch.full_like(length_B1, at.start)
    start_B1 = torch.where(start_B1 < 0, (length_B1 + start_B1).clamp(min=0), start_B1)
    mask_BT = (position_BT >= start_B1) & ((position_BT - start_B1) % step == 0) & (position_BT >= 0)
    if at.stop is None:
        return mask_BT
    stop_B1 = length_B1 + at.stop if at.stop < 0 else torch.full_like(length_B1, at.stop)
    return mask_BT & (position_BT < stop_B1)


def _in_mask(mask: Tensor, position_BT: Tensor, length_B: Tensor) -> Tensor:
    """A mask is over the prompt's tokens: over columns where it has padding, else over positions."""
    mask_BL = (
        mask.to(position_BT.device).expand(len(position_BT), -1) if mask.ndim == 1 else mask.to(position_BT.device)
    )
    if mask_BL.ndim != 2 or len(mask_BL) != len(position_BT) or mask_BL.shape[1] < int(length_B.max()):
        raise FeatureError(
            f"the mask at has shape {tuple(mask.shape)}; expected [{int(length_B.max())}] or "
            f"[{len(position_BT)}, {int(length_B.max())}], one value per prompt token"
        )
    padding_B1 = (mask_BL.shape[1] - length_B)[:, None]  # rows are padded on the left
    column_BT = (position_BT + padding_B1).clamp(0, mask_BL.shape[1] - 1)
    inside_BT = (position_BT >= 0) & (position_BT < length_B[:, None])
    return mask_BL.gather(1, column_BT) & inside_BT
