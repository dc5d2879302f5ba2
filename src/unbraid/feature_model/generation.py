"""Text with and without edits, through the model's own `generate`: its cache, its sampling, its stopping rules."""

import html
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unbraid.errors import FeatureError
from unbraid.feature_model.edits import Edit
from unbraid.feature_model.prompts import Prompt
from unbraid.feature_model.tables import Result, Table

REFUSED = {
    "num_beams": (1, None),
    "num_return_sequences": (1, None),
    "assistant_model": (None,),
    "prompt_lookup_num_tokens": (None,),
    "penalty_alpha": (None,),
    "guidance_scale": (1.0, None),
    "prefill_chunk_size": (None,),
    "cache_implementation": (None, "dynamic"),
    "compile_config": (None,),
    "custom_generate": (None,),
}
"""Options of transformers under which rows, positions or hooks are not what they seem, and the values that are fine."""


def generate(
    fm: Any, prompt: Any, edits: Any, max_new_tokens: int, seed: int, stream: bool, hf: dict[str, Any]
) -> "Generation":
    """See `FeatureModel.generate`."""
    if max_new_tokens < 1:
        raise FeatureError(f"max_new_tokens={max_new_tokens}; expected at least 1")
    settings = hf.get("generation_config") or fm.hf_model.generation_config
    for name, fine in REFUSED.items():
        value = hf.get(name, getattr(settings, name, None))
        if value not in fine:
            raise FeatureError(
                f"generation with {name}={value!r} is refused: edits follow one row per prompt; expected "
                f"{name}={fine[0]!r}"
            )
    fm.editing(edits)  # wrong edits are refused now, not while streaming
    made = Generation(fm, fm.prompt(prompt), tuple(edits), max_new_tokens, seed, dict(hf))
    if not stream:
        made.finish()
    return made


@dataclass(eq=False, repr=False)
class Generation(Result):
    """A continuation. Iterating gives pieces of the edited text, as they come if it was asked to stream.

    Attributes:
        batch: the prompt.
        edits: carried out.
    """

    fm: Any
    batch: Prompt
    edits: tuple[Edit, ...]
    max_new_tokens: int
    seed: int
    hf: dict[str, Any]
    _ids: dict[bool, Tensor] = field(default_factory=dict)

    @property
    def ids(self) -> Tensor:
        """`[B, new]` ids of the edited continuation; shorter rows end in padding."""
        self.finish()
        return self._ids[True]

    @property
    def plain_ids(self) -> Tensor:
        """`[B, new]` ids without the edits."""
        self.finish(edited=False)
        return self._ids[False]

    @property
    def text(self) -> Any:
        """The edited continuation: a text, or a list where a list of prompts was given."""
        return self._decoded(self.ids)

    @property
    def plain(self) -> Any:
        """The continuation without edits, from the same seed; generated when first asked for."""
        return self._decoded(self.plain_ids)

    def finish(self, *, edited: bool = True) -> None:
        """Generate what has not been generated."""
        if edited not in self._ids:
            self._ids[edited] = self._generated(edited, None, None)

    def __iter__(self) -> Iterator[str]:
        yield from self.pieces()

    def pieces(self, *, edited: bool = True, stopped: Any = None) -> Iterator[str]:
        """Pieces of one prompt's continuation as they are generated.

        Args:
            edited: with the edits or without.
            stopped: called between tokens; True ends the generation.

        Raises:
            FeatureError: there are several prompts, or no tokenizer.
        """
        if self.fm.tokenizer is None or len(self.batch.tokens_BT) > 1:
            raise FeatureError("streaming needs a tokenizer and one prompt; expected stream=False otherwise")
        if edited in self._ids:
            yield self._decoded(self._ids[edited])
            return
        ended = threading.Event()
        pieces: queue.Queue[Any] = queue.Queue()

        def work() -> None:
            try:
                streamer = _Pieces(self.fm.tokenizer, self.batch.tokens_BT.shape[1], pieces)
                stop = lambda: ended.is_set() or (stopped is not None and stopped())  # noqa: E731
                ids = self._generated(edited, streamer, stop)
                if not stop():
                    self._ids[edited] = ids
                pieces.put(None)
            except BaseException as problem:
                pieces.put(problem)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:  # also when the reader goes away: the thread ends before its next token
            ended.set()
            worker.join()

    def _generated(self, edited: bool, streamer: Any, stopped: Any) -> Tensor:
        from transformers import StoppingCriteria, StoppingCriteriaList

        class Stopped(StoppingCriteria):
            def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # pyright: ignore
                return torch.full((len(input_ids),), bool(stopped()), device=input_ids.device)

        options: dict[str, Any] = {"pad_token_id": self.fm.special_ids[0] if self.fm.special_ids else 0} | self.hf
        if stopped is not None:
            options["stopping_criteria"] = StoppingCriteriaList([*options.get("stopping_criteria", []), Stopped()])
        if streamer is not None:
            options["streamer"] = streamer
        devices = [self.fm.device] if self.fm.device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices=devices),
            torch.no_grad(),
            self.fm.edited(self.edits if edited else ()) as model,
        ):
            torch.manual_seed(self.seed)
            made_BT = model.generate(
                input_ids=self.batch.tokens_BT,
                attention_mask=self.batch.real_BT.long(),
                max_new_tokens=self.max_new_tokens,
                **options,
            )
        made_BT = made_BT if isinstance(made_BT, Tensor) else made_BT.sequences
        return made_BT[:, self.batch.tokens_BT.shape[1] :]

    def _decoded(self, ids_BT: Tensor) -> Any:
        if self.fm.tokenizer is None:
            raise FeatureError("there is no tokenizer to write text with; expected one; read the ids instead")
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        texts = [self.fm.tokenizer.decode(row, **options) for row in ids_BT.tolist()]
        return texts[0] if self.batch.single else texts

    def to_table(self) -> Table:
        """Plain and steered text, one row per prompt."""
        plain, text = self.plain, self.text
        texts = [(plain, text)] if self.batch.single else zip(plain, text, strict=True)
        return Table(["plain", "steered"], [{"plain": one, "steered": other} for one, other in texts])

    def to_dict(self) -> dict[str, Any]:
        """Both texts."""
        return {"plain": self.plain, "steered": self.text}

    def _repr_html_(self) -> str:
        cell = "vertical-align:top;padding:4px 10px;white-space:pre-wrap;text-align:left;max-width:40em"
        rows = "".join(
            f'<tr><td style="{cell}">{html.escape(row["plain"][:4_000])}</td>'
            f'<td style="{cell}">{html.escape(row["steered"][:4_000])}</td></tr>'
            for row in self.to_table().rows[:2]
        )
        head = f'<tr><th style="{cell}">plain</th><th style="{cell}">steered</th></tr>'
        return f'<table style="border-collapse:collapse;font-size:90%">{head}{rows}</table>'


class _Pieces:
    """A streamer that decodes new ids into pieces of text, whole characters at a time."""

    def __init__(self, tokenizer: Any, prompt_tokens: int, pieces: "queue.Queue[Any]"):
        self.tokenizer, self.pieces = tokenizer, pieces
        self.ids: list[int] = []
        self.shown, self.prompt_seen = "", False

    def put(self, value: Tensor) -> None:
        """Ids of the prompt, then of each new token."""
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.ids += value.flatten().tolist()
        text = self._text()
        if not text.endswith("�"):
            self._show(text)

    def end(self) -> None:
        """What is left."""
        self._show(self._text())

    def _text(self) -> str:
        return self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _show(self, text: str) -> None:
        if len(text) > len(self.shown):
            self.pieces.put(text[len(self.shown) :])
            self.shown = text
