"""What a caller hands in: activations and text in any form, models, penalties; a resumed run needs them again."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from stopped_runs import Stop, stop_at

import unbraid
from unbraid import features, recipes
from unbraid import run as run_module
from unbraid.activations.handed_in import HandedInActivations, settings_for
from unbraid.activations.live import LiveActivations
from unbraid.config import EvaluationConfig, RunConfig, overridden, validated
from unbraid.errors import ActivationError, CheckpointError, ConfigError, ModelError, TextError, UnbraidError
from unbraid.evaluation.suites import run_suites
from unbraid.inputs import Inputs
from unbraid.replay import Replay
from unbraid.reporting.dashboard import write_dashboard
from unbraid.text.handed_in import HandedInText

CPU, D = torch.device("cpu"), 12
X = torch.randn(3000, D, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.2, 2, D) + 5


def small(**training) -> RunConfig:
    data = recipes.tiny().model_dump(mode="json")
    data["sae"] |= {"n_features": 32}
    data["training"] |= {"tokens": 2_048, "batch_tokens": 128, "checkpoint_every": 4, "held_out_tokens": 256} | training
    data["text"]["held_out_fraction"] = 0.1
    data["variants"] = {"": {}}
    return validated(RunConfig, data, "test")


def folder_of(path: Path, suffix: str) -> Path:
    for number, part in enumerate(X.split(1100)):
        if suffix == "npy":
            np.save(path / f"{number}.npy", part.numpy())
        else:
            safetensors.torch.save_file({"x": part}, path / f"{number}.safetensors")
    return path


def memmap_of(path: Path) -> np.memmap:
    array = np.lib.format.open_memmap(path / "x.npy", "w+", np.float32, X.shape)
    array[:] = X.numpy()
    return array


def column_of(_: Path):
    import datasets

    return datasets.Dataset.from_dict({"x": X.numpy()})["x"]


FORMS = {
    "tensor": lambda path: X,
    "sequences": lambda path: X.view(30, 100, D),
    "memmap": memmap_of,
    "npy folder": lambda path: folder_of(path, "npy"),
    "safetensors folder": lambda path: folder_of(path, "safetensors"),
    "datasets column": column_of,
}


def rows_of(source: HandedInActivations, held_out: bool = False, position=None) -> torch.Tensor:
    return torch.cat([chunk.activations[0][0] for chunk in source.chunks(position, held_out)])


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows_in_the_same_order(tmp_path, form):
    config = small()
    expected = rows_of(HandedInActivations(X, config))
    source = HandedInActivations(FORMS[form](tmp_path), config)
    assert torch.equal(rows_of(source), expected)
    assert source.count_rows(1 << 40) == len(expected)
    assert source.widths == [D] and [str(site.folder) for site in source.sites] == ["activations"]


def test_every_row_is_trained_on_or_held_out_and_the_split_is_seeded():
    source = HandedInActivations(X, small())
    together = torch.cat([rows_of(source), rows_of(source, held_out=True)])
    assert sorted(together[:, 0].tolist()) == sorted(X[:, 0].tolist())
    assert 0.07 < len(rows_of(source, held_out=True)) / len(X) < 0.13
    other = HandedInActivations(X, small().model_copy(update={"seed": 1}))
    assert not torch.equal(rows_of(other, held_out=True)[:50], rows_of(source, held_out=True)[:50])


@pytest.mark.parametrize("form", ["tensor", "batches"])
def test_a_position_leads_to_the_rows_after_it(form):
    source = HandedInActivations(X if form == "tensor" else list(X.split(700)), small())
    chunks = list(source.chunks(None))
    for number in (0, 3):
        again = rows_of(source, position=chunks[number].position)
        assert torch.equal(again, torch.cat([chunk.activations[0][0] for chunk in chunks[number + 1 :]]))


class Stateful:
    """Batches that can be entered where they stood."""

    def __init__(self):
        self.place, self.read = 0, 0

    def __iter__(self):
        while self.place < 30:
            self.place += 1
            self.read += 1
            yield X[100 * (self.place - 1) : 100 * self.place]

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


def final(run: unbraid.Run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.path.glob("saes/*/*.safetensors")} | {
        "metrics": run.folder.metrics.read_bytes()
    }


@pytest.mark.parametrize(
    "form", [lambda: X, lambda: lambda: iter(X.split(100)), Stateful], ids=["tensor", "replay", "state"]
)
def test_a_run_on_activations_resumes_to_the_same_bytes(tmp_path, form):
    whole = unbraid.train(small(), tmp_path / "whole", activations={"x": form()})
    with pytest.raises(Stop):
        unbraid.train(small(), tmp_path / "cut", activations={"x": form()}, callbacks=[stop_at(9)])
    assert sorted(path.name for path in (tmp_path / "cut" / "checkpoints").iterdir())[-1] == "step_9"
    resumed = unbraid.resume(tmp_path / "cut", activations={"x": form()})
    assert len(final(whole)) == 3 and final(resumed) == final(whole)
    assert list(resumed.saes) == ["x"]
    x_hat = resumed.saes["x"](X)
    assert 1 - (X - x_hat).square().sum() / (X - X.mean(0)).square().sum() > 0


def test_an_iterable_that_saves_its_place_is_not_read_again_from_the_start():
    source = Stateful()
    replay = Replay(source, "activations", ActivationError)
    number, _, state = list(itertools.islice(replay.items(), 20))[-1]
    source.read = 0
    assert next(replay.items(number, state))[0] == 19 and source.read == 1


def test_a_resumed_run_needs_the_same_activations(tmp_path):
    with pytest.raises(Stop):
        unbraid.train(small(), tmp_path / "cut", activations=X, callbacks=[stop_at(9)])
    with pytest.raises(ConfigError, match=r"activations that were handed in .* unbraid\.resume\(path, activations"):
        unbraid.resume(tmp_path / "cut")
    with pytest.raises(CheckpointError, match=r"not the one .* activations.sample was .* is "):
        unbraid.resume(tmp_path / "cut", activations=X + 1)


@pytest.mark.parametrize(
    ("activations", "message"),
    [
        (torch.zeros(5), r"shape \(5,\); expected \[rows, D\]"),
        ({"../x": X}, "named '../x'; expected letters"),
        ({}, "activations is empty"),
        ({"a": X, "b": X[:10]}, "as many of each, row by row"),
        (iter([X]), "can be read only once.*lambda"),
        (lambda: iter([]), "no batch"),
        ("/nonexistent", "no folder of .npy or .safetensors"),
        (["words", "words"], "expected numbers"),
        ([torch.zeros(0, 4)], "expected \\[rows, D\\] numbers"),
        (object(), "cannot be iterated"),
    ],
)
def test_what_is_no_activations_is_refused_with_what_was_expected(activations, message, tmp_path):
    with pytest.raises(ActivationError, match=message):
        unbraid.train(small(), tmp_path / "run", activations=activations)
    assert not (tmp_path / "run").exists()


def test_activations_beside_a_model_or_text_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="handed in beside text"):
        unbraid.train(small(), tmp_path / "run", activations=X, text=["a"])


def test_too_few_rows_are_said_with_the_tokens_that_fit(tmp_path):
    with pytest.raises(TextError, match=r"lower training\.tokens to 2,560"):
        unbraid.train(small(tokens=50_000), tmp_path / "run", activations=X)


WORDS = [f"{word} {number} goes" for number in range(400) for word in ("river", "stone", "north")]


def live(text, config=None, **handed) -> LiveActivations:
    return LiveActivations(config or small(), CPU, text=text, **handed)


def test_strings_and_their_token_ids_are_the_same_text():
    source = live(WORDS)
    ids = [source.model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in WORDS]
    tokens = [chunk.tokens_BT for chunk in itertools.islice(source.chunks(None), 3)]
    same = [chunk.tokens_BT for chunk in itertools.islice(live([torch.tensor(row) for row in ids]).chunks(None), 3)]
    train_side = {tuple(context.tolist()) for chunk in tokens for context in chunk}
    assert len(train_side) > 5
    assert {token for chunk in same for token in chunk.flatten().tolist()} <= {
        token for chunk in tokens for token in chunk.flatten().tolist()
    } | {token for row in ids for token in row}


def test_a_text_is_entered_at_any_position():
    source = live(lambda: iter(WORDS))
    chunks = list(itertools.islice(source.chunks(None), 4))
    again = next(source.chunks(chunks[1].position))
    assert torch.equal(again.tokens_BT, chunks[2].tokens_BT)


def test_chat_messages_are_documents():
    talk = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "abcde"}]
    assert [document.text for document in HandedInText([talk], 100).documents()] == [talk]


def test_a_generator_that_yields_without_gradients_does_not_turn_them_off():
    def batches():
        with torch.no_grad():
            for part in X.split(100):
                assert not torch.is_grad_enabled()
                yield part

    for _ in zip(Replay(batches, "activations", ActivationError).items(), range(3), strict=False):
        assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (3.5, "is a float; expected a string"),
        ([5, 99_999], "token ids from 5 to 99999; expected 0 to"),
        ([0.5], "is a list; expected a string"),
    ],
)
def test_an_item_that_is_no_text_is_named(item, message):
    with pytest.raises(TextError, match=message):
        list(HandedInText(["fine", item], 400).documents())


def test_a_model_of_ones_own_needs_its_tokenizer_and_is_read(tmp_path):
    made = live(WORDS).model
    with pytest.raises(ModelError, match="without a tokenizer"):
        live(WORDS, model=made.model)
    run = unbraid.train(small(tokens=1_024), tmp_path / "run", model=made.model, tokenizer=made.tokenizer, text=WORDS)
    assert run.summary["steps"]["executed"] == 8


def test_a_run_on_text_handed_in_is_not_resumed_on_another(tmp_path):
    with pytest.raises(Stop):
        unbraid.train(small(), tmp_path / "cut", text=WORDS, callbacks=[stop_at(5)])
    with pytest.raises(TextError, match=r"text\.source is handed_in.*unbraid\.resume\(run, text="):
        unbraid.resume(tmp_path / "cut")
    with pytest.raises(CheckpointError, match=r"text\.sample was"):
        unbraid.resume(tmp_path / "cut", text=WORDS[1:])
    assert unbraid.resume(tmp_path / "cut", text=WORDS).summary["steps"]["executed"] == 16


def test_batches_that_differ_are_not_resumed_on(tmp_path):
    batches = list(X.split(100))
    with pytest.raises(Stop):
        unbraid.train(small(), tmp_path / "cut", activations=batches, callbacks=[stop_at(5)])
    with pytest.raises(CheckpointError, match=r"sample was"):
        unbraid.resume(tmp_path / "cut", activations=[batch + 1 for batch in batches])


CHATS = [
    [{"role": "user", "content": f"tell me of {number}"}, {"role": "assistant", "content": f"the tide {number} " * 9}]
    for number in range(300)
]
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }} {% endfor %}"


def test_text_handed_in_can_be_trained_on_the_assistants_tokens_alone(tmp_path):
    """The setting is refused beside a text that has no chats, with what would have it read, and does something here."""
    with pytest.raises(ConfigError, match=r"train_on is read only while text\.source is files or hub or handed_in"):
        overridden(small(), {"text.train_on": "assistant"})
    made = live(WORDS).model
    made.tokenizer.chat_template = TEMPLATE
    handed = {"model": made.model, "tokenizer": made.tokenizer, "text": CHATS}
    rows = []
    for train_on in ("all", "assistant"):
        config = overridden(small(tokens=1_024), {"text.source": "handed_in", "text.train_on": train_on})[0]
        run = unbraid.train(config, tmp_path / train_on, **handed)
        assert run.config.text.train_on == train_on
        rows.append(run.summary["rows"]["dropped"])
    assert "not_trained" not in rows[0] and rows[1]["not_trained"] > 0


def test_a_run_on_text_handed_in_is_measured_on_other_text_given_by_hand(tmp_path):
    run = unbraid.train(small(tokens=1_024), tmp_path / "run", text=WORDS)
    (tmp_path / "text").mkdir()
    for number in range(200):
        (tmp_path / "text" / f"{number}.txt").write_text(" ".join(WORDS[number : number + 20]))
    text = {"source": "files", "paths": [str(tmp_path / "text")], "held_out_fraction": 0.5}
    settings = {"suites": ["core"], "tokens": 128, "splice_contexts": 2, "text": text, "controls": False}
    report = run_suites(run.path, validated(EvaluationConfig, settings, "eval"))
    assert set(report["saes"]) == set(run.saes) and not report["skipped"]
    with pytest.raises(ConfigError, match="site of an evaluation is read for an SAE folder"):
        run_suites(run.path, validated(EvaluationConfig, settings | {"site": "resid_post.1"}, "eval"))


def test_a_run_says_that_its_text_and_model_were_handed_in_and_is_not_measured_on_others(tmp_path):
    made = live(WORDS).model
    config = overridden(small(tokens=1_024), {"model.dtype": "bfloat16"})[0]
    plan = run_module.plan(
        config, tmp_path / "run", inputs=Inputs(model=made.model, tokenizer=made.tokenizer, text=WORDS)
    )
    assert any("model.dtype = bfloat16" in dropped for dropped in plan.dropped), "a setting of another model"
    run = unbraid.train(config, tmp_path / "run", model=made.model, tokenizer=made.tokenizer, text=WORDS)
    assert (run.config.text.source, run.config.model.name) == ("handed_in", "handed_in")
    for measure in (lambda path: run_suites(path, EvaluationConfig(suites=["core"])), write_dashboard, features):
        with pytest.raises(UnbraidError, match=r"is handed_in, which stands for"):
            measure(run.path)
    with pytest.raises(TextError, match=r"text\.source is handed_in"):
        unbraid.train(overridden(small(), {"text.source": "handed_in"})[0], tmp_path / "none")
    with pytest.raises(ModelError, match=r"model\.name is handed_in"):
        unbraid.train(overridden(small(), {"model.name": "handed_in"})[0], tmp_path / "none")
    with pytest.raises(ModelError, match="model is a Linear; expected a transformers"):
        unbraid.train(small(), tmp_path / "none", model=torch.nn.Linear(2, 2), tokenizer=made.tokenizer)


def overlap(f, *, codes, decoder):
    return (decoder @ decoder.T).square().mean(), None


def test_a_function_is_a_penalty_and_a_resumed_run_needs_it_again(tmp_path):
    with pytest.raises(Stop):
        unbraid.train(small(), tmp_path / "cut", activations=X, penalty=overlap, callbacks=[stop_at(9)])
    with pytest.raises(CheckpointError, match=r"penalty was 'overlap', is None"):
        unbraid.resume(tmp_path / "cut", activations=X)
    resumed = unbraid.resume(tmp_path / "cut", activations=X, penalty=overlap)
    whole = unbraid.train(small(), tmp_path / "whole", activations=X, penalty=overlap)
    plain = unbraid.train(small(), tmp_path / "plain", activations=X)
    assert final(resumed) == final(whole) != final(plain)


def test_fit_trains_on_every_row_and_gives_what_a_run_would(tmp_path):
    steps = []
    sae = unbraid.SAEConfig(architecture="topk", n_features=32, k=4)
    saes = unbraid.fit(sae, X, batch_tokens=250, callback=lambda step, records: steps.append((step, records)))
    assert [step for step, _ in steps] == list(range(1, 13))
    assert steps[9][1]["sae"]["l0"] == 4 and steps[8][1] is None
    assert torch.equal(saes["sae"].W_dec, unbraid.fit(sae, X, batch_tokens=250)["sae"].W_dec)
    both = unbraid.fit({"a": sae}, {"x": X, "y": X + 1}, batch_tokens=250)
    assert sorted(both) == ["x_a", "y_a"]
    with pytest.raises(ActivationError, match=r"3000 rows .* lower tokens"):
        unbraid.fit(sae, X, tokens=10_000)


def test_settings_for_activations_name_them_as_sites():
    config = settings_for(small(), {"patches": X, "pooled": X})
    assert config.sae_names == ["patches", "pooled"] and not config.buffer.drop_first_position


class StatefulText:
    """Strings that can be entered where they stood."""

    def __init__(self):
        self.place, self.read = 0, 0

    def __iter__(self):
        while self.place < len(WORDS):
            self.place += 1
            self.read += 1
            yield WORDS[self.place - 1]

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


def test_text_that_saves_its_place_is_entered_near_a_position_and_goes_on_exactly():
    text = StatefulText()
    source = live(text)
    chunks = list(itertools.islice(source.chunks(None), 4))
    position = chunks[1].position
    assert position["bookmark"] is not None and 0 < position["document"] - position["bookmark"]["document"] < 16
    fresh = live(StatefulText())
    fresh.documents.replay.source.read = 0  # without the sample that says which text it is
    again = next(fresh.chunks(position))
    assert torch.equal(again.tokens_BT, chunks[2].tokens_BT)
    assert fresh.documents.replay.source.read <= len(WORDS) - position["bookmark"]["document"]
