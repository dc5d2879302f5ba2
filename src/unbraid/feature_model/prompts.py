"""Text, token ids or chat messages as one left-padded batch with a mask; BOS if the tokenizer adds one, never twice."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unbraid.errors import FeatureError
from unbraid.feature_model.positions import Span


@dataclass(frozen=True)
class Prompt:
    """A batch of prompts.

    Attributes:
        tokens_BT: `[B, T]` ids, shorter rows padded on the left.
        real_BT: `[B, T]` bool, False at padding.
        span: where the tokens stand.
        single: whether one prompt was given that was not in a list.
    """

    tokens_BT: Tensor
    real_BT: Tensor
    span: Span
    single: bool

    def inputs(self, *, positions: bool = True) -> dict[str, Tensor]:
        """Arguments of the model; a mask and positions only where there is padding, so one prompt runs as it would."""
        if bool(self.real_BT.all()):
            return {"input_ids": self.tokens_BT}
        inputs = {"input_ids": self.tokens_BT, "attention_mask": self.real_BT.long()}
        return inputs | ({"position_ids": self.span.position_BT.clamp(min=0)} if positions else {})


class PromptReader:
    """Turns prompts into token ids.

    Args:
        tokenizer: a transformers tokenizer, or None where only ids are given.
        bos: whether a text begins with BOS; None does as the tokenizer does.
        special_ids: tokens that are not content.
        device: where the ids go.
    """

    def __init__(self, tokenizer: Any, bos: bool | None, special_ids: Sequence[int], device: torch.device):
        self.tokenizer, self.special_ids, self.device = tokenizer, tuple(special_ids), device
        self.bos_id: int | None = None if tokenizer is None else tokenizer.bos_token_id
        if bos is None and tokenizer is not None and self.bos_id is not None:
            bos = tokenizer("a")["input_ids"][:1] == [self.bos_id]
        self.adds_bos = bool(bos) and self.bos_id is not None

    def __call__(self, prompt: Any) -> Prompt:
        """The batch a prompt means.

        Args:
            prompt: a text, a list of texts, chat messages (dicts with role and content), a list of chats, ids `[T]` or
                `[B, T]` as a tensor, or a Prompt.

        Raises:
            FeatureError: the prompt is empty, of no known kind, or a text where there is no tokenizer.
        """
        if isinstance(prompt, Prompt):
            return prompt
        rows, single = self._rows(prompt)
        if not rows or not all(rows):
            raise FeatureError(f"the prompt {prompt!r} has no tokens; expected at least one in every prompt")
        width = max(map(len, rows))
        tokens_BT = torch.full((len(rows), width), self.special_ids[0] if self.special_ids else 0)
        real_BT = torch.zeros(len(rows), width, dtype=torch.bool)
        for row, ids in enumerate(rows):
            tokens_BT[row, width - len(ids) :] = torch.tensor(ids)
            real_BT[row, width - len(ids) :] = True
        tokens_BT, real_BT = tokens_BT.to(self.device), real_BT.to(self.device)
        return Prompt(tokens_BT, real_BT, Span.of_prompt(tokens_BT, real_BT, self.special_ids), single)

    def _rows(self, prompt: Any) -> tuple[list[list[int]], bool]:
        if isinstance(prompt, Tensor):
            if prompt.ndim not in (1, 2) or prompt.is_floating_point() or prompt.dtype == torch.bool:
                raise FeatureError(
                    f"ids of shape {tuple(prompt.shape)} and type {prompt.dtype}; expected whole numbers [T] or [B, T]"
                )
            return (prompt[None] if prompt.ndim == 1 else prompt).tolist(), prompt.ndim == 1 or len(prompt) == 1
        if isinstance(prompt, str):
            return [self._text(prompt)], True
        if isinstance(prompt, list | tuple) and prompt:
            if all(isinstance(one, Mapping) for one in prompt):
                return [self._chat(prompt)], True
            if all(isinstance(one, str) for one in prompt):
                return [self._text(one) for one in prompt], False
            if all(isinstance(one, list | tuple) and one and isinstance(one[0], Mapping) for one in prompt):
                return [self._chat(one) for one in prompt], False
        raise FeatureError(
            f"a prompt of type {type(prompt).__name__} is not understood; expected a text, a list of texts, chat "
            "messages, or token ids as a tensor [B, T]"
        )

    def _text(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise FeatureError("a text was given but there is no tokenizer; expected token ids; or give the tokenizer")
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if self.bos_id is None or not self.adds_bos or ids[:1] == [self.bos_id]:
            return ids
        return [self.bos_id, *ids]

    def _chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        if self.tokenizer is None or not getattr(self.tokenizer, "chat_template", None):
            raise FeatureError("chat messages were given but the tokenizer has no chat template; expected a text")
        text = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        return self._text(text)  # a template that writes BOS is not given another
