"""Chats, token ids and special tokens: what transformers makes of them is what a context holds."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from unbraid.activations.buffer import ActivationBuffer
from unbraid.activations.live import LiveActivations
from unbraid.activations.packaged_model import packaged_model_folder
from unbraid.activations.random_model import word_tokenizer
from unbraid.activations.rows import RowFilter
from unbraid.config import BufferConfig, ModelConfig, RunConfig, TextConfig
from unbraid.errors import RowsUsedUp, TextError
from unbraid.text import Contexts, Document
from unbraid.text.documents import TOO_LONG, usable
from unbraid.text.tokens import DocumentTokenizer, tokenise

RENDERED = "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
CHAT = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello!"}]
PLAIN = "{% for m in messages %}{{ '<bos>' + m.role + ' ' + m.content + '<eos>' }}{% endfor %}"
MARKED = (
    "{% for m in messages %}{{ '<bos>' + m.role + ' ' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<eos>' }}{% endgeneration %}{% else %}{{ m.content + '<eos>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bos>assistant ' }}{% endif %}"
)


class ListSource:
    def __init__(self, items: list[Any]) -> None:
        self.items, self.identity = items, {"source": "list"}

    def documents(self, start: int = 0, bookmark: dict[str, Any] | None = None) -> Iterator[Document]:
        yield from (Document(index, self.items[index]) for index in range(start, len(self.items)))

    def bookmark(self, document: int) -> None:
        return None


@pytest.fixture(scope="module")
def smollm2() -> Any:
    return AutoTokenizer.from_pretrained(str(packaged_model_folder("smollm2")))


def config(length: int = 8, **settings: Any) -> TextConfig:
    files = {"source": "files", "paths": ["chats.jsonl"]}
    return TextConfig.model_validate(files | {"context_length": length, "held_out_fraction": 0.0} | settings)


def contexts(items: list[Any], tokenizer: Any, **settings: Any) -> list[list[int]]:
    return [row.tolist() for row in Contexts(ListSource(items), tokenizer, config(**settings))]


def test_special_tokens_named_in_a_text_are_tokens_when_asked_for_and_text_otherwise(smollm2: Any) -> None:
    theirs = smollm2(RENDERED, add_special_tokens=False)["input_ids"]
    assert len(theirs) == 15
    assert tokenise(smollm2, [RENDERED], special_tokens=True) == [theirs]
    assert len(tokenise(smollm2, [RENDERED])[0]) == 39
    assert contexts([RENDERED], smollm2, length=17, special_tokens=True) == [[0, *theirs, 0]]


def test_tokenising_leaves_the_tokenizer_as_it_was(smollm2: Any) -> None:
    before = smollm2.encode(RENDERED)
    smollm2.backend_tokenizer.enable_truncation(max_length=5)
    smollm2.backend_tokenizer.enable_padding(length=9)
    tokenise(smollm2, [RENDERED])
    assert smollm2.backend_tokenizer.truncation["max_length"] == 5
    assert smollm2.backend_tokenizer.padding["length"] == 9
    smollm2.backend_tokenizer.no_truncation()
    smollm2.backend_tokenizer.no_padding()
    tokenise(smollm2, [RENDERED])
    assert smollm2.backend_tokenizer.encode_special_tokens is False and smollm2.encode(RENDERED) == before


def test_a_chat_goes_through_the_packaged_models_own_template(smollm2: Any) -> None:
    theirs = smollm2.apply_chat_template(CHAT, tokenize=True, return_dict=True)["input_ids"]
    assert smollm2.decode(theirs).endswith(RENDERED)
    assert contexts([CHAT], smollm2, length=len(theirs) + 2) == [[0, *theirs, 0]]
    answer = DocumentTokenizer(smollm2, config(train_on="assistant"))([CHAT])[0]
    assert smollm2.decode(answer.ids[answer.trains]) == "Hello!<|im_end|>\n"
    longer = [*CHAT, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Good bye, naïve 🙂."}]
    both = DocumentTokenizer(smollm2, config(train_on="assistant"))([longer])[0]
    assert smollm2.decode(both.ids[both.trains]) == "Hello!<|im_end|>\nGood bye, naïve 🙂.<|im_end|>\n"


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_only_what_the_assistant_said_is_learnt_from_exactly(template: str) -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template if template == MARKED else template + MARKED[MARKED.index("{% if add") :]
    chat = [*CHAT, {"role": "user", "content": "bade gale"}, {"role": "assistant", "content": "tape lire"}]
    found = DocumentTokenizer(tokenizer, config(train_on="assistant", bos="none", pack=False))([chat])[0]
    tokenizer.chat_template = MARKED
    theirs = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert found.ids.tolist() == theirs["input_ids"]
    assert found.trains.tolist() == [bool(mask) for mask in theirs["assistant_masks"]]
    assert tokenizer.decode(found.ids[found.trains]) == "Hello!<eos> tape lire<eos>"


def test_a_chat_that_cannot_be_rendered_says_why() -> None:
    tokenizer = word_tokenizer()
    with pytest.raises(TextError, match="no chat template; expected an instruct model"):
        contexts([CHAT], tokenizer)
    tokenizer.chat_template = "{{ raise_exception('only one turn') }}"
    with pytest.raises(TextError, match=r"refuses a chat with the roles user, assistant \(only one turn\)"):
        contexts([CHAT], tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ messages | length ~ m.content }}{% endfor %}"
    with pytest.raises(TextError, match=r"renders earlier turns of a chat differently.*text\.train_on"):
        contexts([CHAT], tokenizer, train_on="assistant")
    with pytest.raises(TextError, match=r"text\.train_on is 'assistant' but a document is no chat"):
        contexts(["bade gale"], tokenizer, train_on="assistant")


def test_messages_made_of_parts_are_chats_and_empty_ones_are_counted() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi there"}, {"type": "image"}]}]
    assert usable(parts, 100) == (parts, "")
    assert usable(parts, 5)[1] == TOO_LONG
    assert usable([{"role": "user", "content": " "}], 100)[1] == "empty"


ROWS = [[0, 5, 6, 7, 1], [8, 9], list(range(20, 33))]


def test_token_ids_are_taken_as_they_are_with_marks_where_the_settings_put_them() -> None:
    tokenizer = word_tokenizer()
    packed = [[0, 5, 6, 7, 1, 8, 9, 1], [0, *range(20, 27)], [0, *range(27, 33), 1]]
    for rows in (ROWS, [np.array(row) for row in ROWS], [torch.tensor(row) for row in ROWS]):
        assert contexts(rows, tokenizer) == packed
    by_document = contexts(ROWS, tokenizer, bos="document")
    assert by_document == [[0, 5, 6, 7, 1, 0, 8, 9], [1, 0, *range(20, 26)], [*range(26, 33), 1]]
    nowhere = contexts(ROWS, tokenizer, bos="none", length=7)
    assert nowhere == [[0, 5, 6, 7, 1, 8, 9], [1, *range(20, 26)], [*range(26, 33)]]


def test_a_context_of_one_document_is_filled_up_and_the_filling_is_never_learnt_from() -> None:
    rows = Contexts(ListSource(ROWS), word_tokenizer(), config(length=6, pack=False))
    found = list(rows.with_masks())
    assert [context.tokens.tolist() for context in found] == [
        [0, 5, 6, 7, 1, 1], [0, 8, 9, 1, 1, 1], [0, 20, 21, 22, 23, 24], [0, 25, 26, 27, 28, 29], [0, 30, 31, 32, 1, 1],
    ]  # fmt: skip
    assert [int(context.present.sum()) for context in found] == [5, 3, 6, 6, 4]
    assert all(torch.equal(context.trains, context.present) for context in found)


@pytest.mark.parametrize("settings", [{"pack": False}, {"bos": "document"}, {"bos": "none", "pack": False}])
def test_contexts_of_any_kind_go_on_from_any_position(settings: dict[str, Any]) -> None:
    items = [*ROWS, "bade gale. " * 9, [3], "tape", *ROWS]
    whole = [row.tolist() for row in Contexts(ListSource(items), word_tokenizer(), config(**settings))]
    for taken in range(len(whole)):
        first = Contexts(ListSource(items), word_tokenizer(), config(**settings))
        for _ in range(taken):
            next(first)
        again = Contexts(ListSource(items), word_tokenizer(), config(**settings), position=first.position)
        assert [row.tolist() for row in again] == whole[taken:]


@pytest.mark.parametrize("bad", [[1, -2], [1.5], [True], ["a"], [{"content": "no role"}], {"role": "user"}, 7, None])
def test_what_is_neither_text_nor_chat_nor_token_ids_is_skipped_and_counted(bad: Any) -> None:
    rows = Contexts(ListSource([bad, "bade"]), word_tokenizer(), config(length=2))
    assert len(list(rows)) == 2 and rows.counts.skipped == {"not text": 1}


def test_pretokenised_data_give_the_activations_that_transformers_computes(tmp_path: Path) -> None:
    rows = [[0, *range(5 + n, 20 + n)] for n in range(40)]
    datasets.Dataset.from_dict({"input_ids": rows}).to_parquet(tmp_path / "ids.parquet")
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    for name in ("ids.parquet", "ids.jsonl"):
        live = LiveActivations(
            RunConfig(
                text=config(16, source="files", paths=[str(tmp_path / name)], column="input_ids", pack=False),
                model=ModelConfig(name="random:llama", sites=["resid_post.0"], batch_contexts=40),
            ),
            torch.device("cpu"),
        )
        (chunk,) = live.chunks(None)
        assert sorted(chunk.tokens_BT.tolist()) == rows
        with torch.inference_mode():
            hidden = live.model.model(chunk.tokens_BT, output_hidden_states=True).hidden_states[1]
        assert torch.equal(chunk.activations[0], hidden)


def test_rows_that_are_not_to_be_learnt_from_never_reach_the_buffer_and_are_counted(tmp_path: Path) -> None:
    chats = [[{"role": "user", "content": f"bade {n}"}, {"role": "assistant", "content": "gale"}] for n in range(6)]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    run = RunConfig(
        text=config(24, source="files", paths=[str(path)], column="messages", pack=False, train_on="assistant"),
        model=ModelConfig(name="random:llama", sites=["resid_post.0"], batch_contexts=6),
        buffer=BufferConfig(norm_limit=None),
    )
    tokenizer = word_tokenizer()
    tokenizer.chat_template = MARKED
    plain = LiveActivations(run, torch.device("cpu"))
    live = LiveActivations(run, torch.device("cpu"), model=plain.model.model, tokenizer=tokenizer)
    (chunk,) = live.chunks(None)
    rows = RowFilter(run.buffer, run.sites, live.special_ids)
    kept = rows.mask(chunk)
    answer = tokenizer.encode(" gale", add_special_tokens=False)
    assert chunk.tokens_BT[kept].tolist() == answer * 6
    assert rows.dropped["not_trained"] + rows.dropped["special"] + 6 + rows.kept == 6 * 24


def conversation(number: int) -> list[dict[str, str]]:
    """Turns of different lengths, so that contexts are filled up differently."""
    words = [f"w{number}q{part} " * (1 + (number + part) % 4) for part in range(4)]
    return [{"role": ("user", "assistant")[part % 2], "content": word.strip()} for part, word in enumerate(words)]


@pytest.mark.parametrize(("column", "train_on"), [("messages", "assistant"), ("messages", "all"), ("input_ids", "all")])
def test_what_is_trained_on_is_what_transformers_computes(column: str, train_on: str, tmp_path: Path) -> None:
    """Chats are rendered, tokenised and masked by transformers alone here, and each is run by itself."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = MARKED
    chats = [conversation(number) for number in range(24)]
    theirs = [
        tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        for chat in chats
    ]
    items = chats if column == "messages" else [one["input_ids"] for one in theirs]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({column: item}) + "\n" for item in items))
    length = max(len(one["input_ids"]) for one in theirs)
    run = RunConfig(
        text=config(length, source="files", paths=[str(path)], column=column, pack=False, train_on=train_on),
        model=ModelConfig(name="random:llama", sites=["resid_post.0"], batch_contexts=4),
        buffer=BufferConfig(norm_limit=None, contexts=8),
    )
    plain = LiveActivations(run, torch.device("cpu"))
    live = LiveActivations(run, torch.device("cpu"), model=plain.model.model, tokenizer=tokenizer)
    expected = []
    for one in theirs:
        ids = torch.tensor([one["input_ids"]])
        with torch.inference_mode():
            hidden_TD = live.model.model(ids, output_hidden_states=True).hidden_states[1][0]
        keep_T = ~torch.isin(ids[0], torch.tensor(sorted(live.special_ids)))
        if train_on == "assistant":
            keep_T &= torch.tensor(one["assistant_masks"], dtype=torch.bool)
        expected.append(hidden_TD[keep_T])
    expected_RD = torch.cat(expected)
    rows = len(expected_RD)
    batch = next(size for size in range(32, 0, -1) if rows % size == 0)
    buffer = ActivationBuffer(live, run.buffer, batch, 0, planned_rows=rows)
    found_RD = torch.cat([buffer.next_batch()[0] for _ in range(rows // batch)])
    distance_RR = torch.cdist(found_RD.double(), expected_RD.double())
    for nearest in (distance_RR.min(dim=0), distance_RR.min(dim=1)):
        assert float(nearest.values.max()) < 1e-5 * float(expected_RD.norm(dim=1).mean()) and len(found_RD) == rows
    with pytest.raises(RowsUsedUp):
        buffer.next_batch()
