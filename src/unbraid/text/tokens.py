"""From a document to token ids, and which of them are learnt from.

Text is tokenised as text: a special token's name in it is read as plain letters unless `text.special_tokens` says
otherwise. A chat goes through the tokenizer's own template, whose special tokens stay tokens. Token ids are taken as
they are.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from unbraid.config import TextConfig
from unbraid.errors import TextError
from unbraid.text.documents import Content, Messages


class Tokens(NamedTuple):
    """Token ids of a document [tokens], without BOS and EOS at its ends, and which of them are learnt from."""

    ids: np.ndarray
    trains: np.ndarray


class DocumentTokenizer:
    """Turns usable documents into tokens.

    Args:
        tokenizer: a transformers tokenizer.
        config: special_tokens, train_on.
    """

    def __init__(self, tokenizer: Any, config: TextConfig) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.bos, self.eos = bos_token(tokenizer), tokenizer.eos_token_id

    def __call__(self, documents: Sequence[Content]) -> list[Tokens]:
        """Tokens of each document.

        Raises:
            TextError: a chat cannot be rendered, or only the assistant's tokens are to be learnt from and a document
                is no chat.
        """
        texts = [document for document in documents if isinstance(document, str)]
        of_texts = iter(tokenise(self.tokenizer, texts, self.config.special_tokens))
        return [self._tokens(item, next(of_texts) if isinstance(item, str) else None) for item in documents]

    def _tokens(self, document: Content, ids: list[int] | None) -> Tokens:
        if isinstance(document, list):
            found, trains = self._chat(document)
        else:
            if self.config.train_on == "assistant":
                raise TextError(
                    "text.train_on is 'assistant' but a document is no chat; expected lists of messages with role and "
                    "content in text.column; set text.train_on to all, or text.column to the column of messages"
                )
            found = document if isinstance(document, np.ndarray) else np.asarray(ids, dtype=np.int64)
            trains = np.ones(len(found), dtype=bool)
        return self._without_ends(found, trains)

    def _without_ends(self, ids: np.ndarray, trains: np.ndarray) -> Tokens:
        """Chats and token ids may bring BOS and EOS along; packing puts them where the settings say."""
        first = int(self.config.bos != "none" and self.bos is not None and len(ids) > 0 and ids[0] == self.bos)
        last = len(ids) - int(self.config.pack and self.eos is not None and len(ids) > first and ids[-1] == self.eos)
        return Tokens(ids[first:last], trains[first:last])

    def _chat(self, messages: Messages) -> tuple[np.ndarray, np.ndarray]:
        template = getattr(self.tokenizer, "chat_template", None)
        if not template:
            raise TextError(
                "a document is a chat, and the model's tokenizer has no chat template; expected an instruct model's "
                "tokenizer; render the chats to text yourself and set text.special_tokens to true, or change model.name"
            )
        text = self._render(messages)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = np.asarray(encoded["input_ids"], dtype=np.int64)
        if self.config.train_on == "all":
            return ids, np.ones(len(ids), dtype=bool)
        if "{% generation" in str(template) or "{%- generation" in str(template):
            rendered = self.tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            ids = np.asarray(rendered["input_ids"], dtype=np.int64)
            return ids, np.asarray(rendered["assistant_masks"], dtype=bool)
        starts, ends = np.array(encoded["offset_mapping"]).T
        trains = np.zeros(len(ids), dtype=bool)
        for start, end in self._assistant_spans(messages, text):
            trains |= (ends > start) & (starts < end)
        return ids, trains

    def _assistant_spans(self, messages: Messages, text: str) -> list[tuple[int, int]]:
        """Characters of the rendered chat that the assistant wrote, with the mark that ends its turn."""
        spans: list[tuple[int, int]] = []
        for turn, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._render(messages[:turn], add_generation_prompt=True)
                through = self._render(messages[: turn + 1])
                if not (text.startswith(before) and text.startswith(through)):
                    raise TextError(
                        "the tokenizer's chat template renders earlier turns of a chat differently once more follow, "
                        "so the assistant's tokens cannot be told; expected a template with a generation block or one "
                        "that only appends; set text.train_on to all, or put such a template into the tokenizer"
                    )
                spans.append((len(before), len(through)))
        return spans

    def _render(self, messages: Messages, **options: Any) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as problem:  # templates are programs of the model's makers
            reason = " ".join(str(problem).split())[:200] or type(problem).__name__
            raise TextError(
                f"the tokenizer's chat template refuses a chat with the roles "
                f"{', '.join(message['role'] for message in messages[:6])} ({reason}); expected chats as the model "
                "was trained on; change the data or text.column"
            ) from problem


def bos_token(tokenizer: Any) -> int | None:
    """The token a context begins with: BOS, or an encoder's class token."""
    bos = tokenizer.bos_token_id
    return getattr(tokenizer, "cls_token_id", None) if bos is None else bos


def tokenise(tokenizer: Any, texts: list[str], special_tokens: bool = False) -> list[list[int]]:
    """Token ids of each text, without BOS or EOS.

    The Rust tokenizer is called directly where there is one: transformers would also collect offsets and masks, which
    costs a fifth of the time. It is left as it was found.

    Args:
        tokenizer: a transformers tokenizer.
        texts: what to tokenise.
        special_tokens: read a special token's name inside a text as that token, not as plain text.
    """
    if not texts:
        return []
    if getattr(tokenizer, "is_fast", False):
        backend = tokenizer.backend_tokenizer
        truncation, padding, special = backend.truncation, backend.padding, backend.encode_special_tokens
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = not special_tokens
        try:
            return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        finally:
            backend.encode_special_tokens = special
            if truncation is not None:
                backend.enable_truncation(**truncation)
            if padding is not None:
                backend.enable_padding(**padding)
    return tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=not special_tokens,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
