"""Packing: what a context is made of, and that any saved position goes on exactly where it was."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unbraid.activations.random_model import word_tokenizer
from unbraid.config import TextConfig
from unbraid.errors import TextError
from unbraid.text import Contexts, Counts, Document, Position, count_contexts, explain_shortage
from unbraid.text import contexts as contexts_module
from unbraid.text.contexts import is_held_out
from unbraid.text.documents import TOO_LONG
from unbraid.text.generated import GeneratedSource
from unbraid.text.tokens import tokenise

TOKENIZER = word_tokenizer()
BOS, EOS = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id


class ListSource:
    def __init__(self, texts: list[Any]) -> None:
        self.texts = texts
        self.identity = {"source": "list"}

    def documents(self, start: int = 0, bookmark: dict[str, Any] | None = None) -> Iterator[Document]:
        for index in range(start, len(self.texts)):
            yield Document(index, self.texts[index])

    def bookmark(self, document: int) -> None:
        return None


class NoSpecialTokens:
    """A tokenizer in Python, without BOS and EOS: one id a byte."""

    bos_token_id = eos_token_id = pad_token_id = None
    is_fast = False

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        assert options["add_special_tokens"] is False and options["split_special_tokens"] is True
        return {"input_ids": [list(text.encode()) for text in texts]}


def config(length: int = 16, held_out: float = 0.0, most_skipped: float = 1.0, characters: int = 10_000) -> TextConfig:
    return TextConfig(
        context_length=length,
        held_out_fraction=held_out,
        max_skipped_fraction=most_skipped,
        max_document_characters=characters,
    )


def rows(contexts: Contexts) -> list[list[int]]:
    return [context.tolist() for context in contexts]


LONG = "bade " * 40
documents = st.lists(
    st.one_of(
        st.text(alphabet="ab .é<>eos", max_size=40),
        st.sampled_from([None, b"\xff\xfe", "  ", "", LONG, 7, "\ud800"]),
    ),
    max_size=20,
)


def test_a_context_is_bos_then_documents_separated_by_eos_and_nothing_is_lost() -> None:
    texts = ["bade gale", "tape", "lire side bame " * 5, "mide"]
    expected = [token for text in texts for token in [*TOKENIZER.encode(text, add_special_tokens=False), EOS]]
    contexts = rows(Contexts(ListSource(texts), TOKENIZER, config(length=8)))
    assert all(context[0] == BOS and len(context) == 8 for context in contexts)
    body = [token for context in contexts for token in context[1:]]
    assert body == expected[: len(body)]
    assert len(expected) - len(body) < 7


def test_a_tokenizer_without_bos_and_eos_packs_documents_without_gaps() -> None:
    contexts = rows(Contexts(ListSource(["abc", "defgh", "ij"]), NoSpecialTokens(), config(length=4)))
    assert bytes(token for context in contexts for token in context) == b"abcdefgh"


def test_contexts_are_int64_rows_of_the_asked_length() -> None:
    context = next(Contexts(ListSource(["bade " * 50]), TOKENIZER, config(length=16)))
    assert context.dtype == torch.int64 and context.shape == (16,)


@given(documents, st.integers(2, 20), st.integers(0, 40), st.sampled_from([0.0, 0.3]), st.booleans())
def test_contexts_rebuilt_at_any_position_go_on_identically(
    texts: list[Any], length: int, taken: int, fraction: float, held_out: bool
) -> None:
    settings = config(length=length, held_out=fraction)
    source = ListSource([*texts, "gale"])
    whole = Contexts(source, TOKENIZER, settings, held_out)
    for _ in zip(range(taken), whole, strict=False):
        pass
    saved = Position.from_json(json.loads(json.dumps(whole.position.to_json())))
    again = Contexts(source, TOKENIZER, settings, held_out, saved)
    assert rows(again) == rows(whole)
    assert again.position == whole.position


@given(documents.map(lambda texts: [text for text in texts if text != LONG]), st.sampled_from([0.0, 0.2, 0.5]))
def test_every_document_is_trained_on_held_out_or_counted_as_skipped(texts: list[Any], fraction: float) -> None:
    source = ListSource([*texts, "gale"])
    sides = [Contexts(source, TOKENIZER, config(length=2, held_out=fraction), held_out) for held_out in (False, True)]
    used = [rows(side) for side in sides]
    counts = [side.counts for side in sides]
    assert counts[0].skipped == counts[1].skipped
    assert counts[0].seen == counts[1].seen == len(source.texts)
    assert counts[0].used + counts[1].used + sum(counts[0].skipped.values()) == len(source.texts)
    separators = sum(context[1] == EOS for side in used for context in side)
    assert separators == counts[0].used + counts[1].used


@given(st.lists(st.text(min_size=1), unique=True), st.floats(0.0, 0.5))
def test_a_text_is_held_out_or_not_wherever_it_stands(texts: list[str], fraction: float) -> None:
    texts = [text for text in texts if text.isprintable()]
    first = [is_held_out(text, fraction) for text in texts]
    assert [is_held_out(text, fraction) for text in reversed(texts)] == first[::-1]
    assert not any(is_held_out(text, 0.0) for text in texts)


def test_held_out_takes_about_its_share() -> None:
    chosen = sum(is_held_out(f"document {number}", 0.02) for number in range(20_000))
    assert 300 < chosen < 500


def test_equal_texts_never_fall_on_both_sides() -> None:
    texts = [f"bade {number % 50}" for number in range(500)]
    train, held = (Contexts(ListSource(texts), TOKENIZER, config(held_out=0.4), side) for side in (False, True))
    assert rows(train) and rows(held)
    sides = {text: is_held_out(text, 0.4) for text in texts}
    assert train.counts.used == sum(not sides[text] for text in texts)
    assert held.counts.used == sum(sides[text] for text in texts)


def test_a_special_token_named_in_a_text_stays_text() -> None:
    ids = tokenise(TOKENIZER, ["bade<eos>gale<bos>"])[0]
    assert EOS not in ids and BOS not in ids
    assert TOKENIZER.decode(ids) == "bade<eos>gale<bos>"


@given(st.lists(st.text(alphabet="bade gle<eos>é\n", max_size=40), min_size=1, max_size=5))
def test_tokenising_directly_gives_what_transformers_gives(texts: list[str]) -> None:
    ours = tokenise(TOKENIZER, texts)
    assert TOKENIZER(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"] == ours


def test_unusable_documents_are_counted_by_reason() -> None:
    texts = ["bade gale", "", "   ", None, 3, b"\xff\xfe", "\ud800", "x" * 101, b"tape tape"]
    contexts = Contexts(ListSource(texts), TOKENIZER, config(length=2, characters=100))
    assert len(rows(contexts)) == 6
    assert contexts.counts == Counts(9, 2, {"empty": 2, "not text": 2, "not UTF-8": 2, TOO_LONG: 1})


def test_too_many_unusable_documents_stop_with_their_reasons() -> None:
    texts = ["bade"] * 40 + [None] * 70 + ["bade"] * 500
    with pytest.raises(TextError, match=r"61 of the first 101 documents .*61 not text.*max_skipped_fraction"):
        rows(Contexts(ListSource(texts), TOKENIZER, config(most_skipped=0.6)))
    assert rows(Contexts(ListSource(texts), TOKENIZER, config(most_skipped=0.7)))


def test_a_short_text_of_which_nothing_is_usable_is_an_error() -> None:
    with pytest.raises(TextError, match="2 of the first 2 documents cannot be used"):
        rows(Contexts(ListSource([None, ""]), TOKENIZER, config(most_skipped=0.5)))


def test_an_empty_source_is_an_error() -> None:
    with pytest.raises(TextError, match="holds no documents"):
        rows(Contexts(ListSource([]), TOKENIZER, config()))


def test_text_that_ends_stays_ended() -> None:
    contexts = Contexts(ListSource(["bade gale tape"]), TOKENIZER, config(length=3))
    assert len(rows(contexts)) == 2
    assert rows(contexts) == []
    assert contexts.position.document == 1


def test_a_few_held_out_contexts_are_found_without_reading_a_batch_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counted(GeneratedSource):
        read = 0

        def text(self, index: int) -> str:
            self.read += 1
            return super().text(index)

    source, settings = Counted(0), config(length=32, held_out=0.02)
    held_out = Contexts(source, TOKENIZER, settings, held_out=True)
    found = [next(held_out).tolist() for _ in range(20)]
    assert source.read < 600, "some 200 hold four held-out documents; a whole batch would be 6,000"
    monkeypatch.setattr(contexts_module, "FIRST_CHARACTERS", contexts_module.BATCH_CHARACTERS)
    at_once = Contexts(source, TOKENIZER, settings, held_out=True)
    assert [next(at_once).tolist() for _ in range(20)] == found
    assert at_once.position == held_out.position


def test_counting_stops_at_the_limit() -> None:
    source = ListSource(["bade"] * 100)
    assert count_contexts(Contexts(source, TOKENIZER, config(length=3)), 20) == 20
    assert count_contexts(Contexts(source, TOKENIZER, config(length=3)), 1000) == 100


def test_a_shortage_is_explained_with_its_arithmetic() -> None:
    message = explain_shortage(contexts=10, rows_per_context=127, batch_tokens=512, steps=20)
    assert "10 contexts = 1270 token rows = 2 steps of 512" in message
    assert "20 steps = 10240 token rows" in message
