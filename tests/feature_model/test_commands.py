"""read, feature, steer and attribute on the command line: what they print, as text and as JSON."""

import json

import pytest
from feature_models import PROMPT

import unbraid
from unbraid import Ablate, Clamp, Scale, Steer, cli
from unbraid.errors import FeatureError
from unbraid.feature_model.commands import parse_edit, parse_positions


@pytest.fixture(scope="module")
def fm(run):
    return unbraid.features(run)


def call(capsys, *words) -> str:
    cli.main([str(word) for word in words])
    return capsys.readouterr().out


def test_read_prints_each_token_with_its_features(run, fm, capsys):
    name = next(iter(run.saes))
    best = fm.read(PROMPT).of(name).top(1)[0]
    shown = call(capsys, "read", run.path, PROMPT, "--sae", name)
    assert best["feature"].rpartition("/")[2] in shown and " %)" in shown and "error" in shown
    data = json.loads(call(capsys, "read", run.path, PROMPT, "--json"))
    assert data["prompts"][0][best["position"]]["features"][best["feature"]] == pytest.approx(best["code"])


def test_feature_prints_contexts_partners_and_words(run, fm, capsys):
    feature = fm.read(PROMPT).top(1)[0]["feature"]
    shown = call(capsys, "feature", run.path, feature)
    assert "fires on" in shown and "entangled with" in shown and "raised" in shown
    data = json.loads(call(capsys, "feature", run.path, feature, "--json"))
    assert data["contexts"] == fm.contexts(feature).to_dict() and data["pairs"]["rows"]


def test_steer_prints_both_texts_and_the_partners(run, fm, capsys):
    feature = fm.read(PROMPT).top(1)[0]["feature"]
    shown = call(capsys, "steer", run.path, PROMPT, f"{feature}=+3", "--tokens", 6)
    assert "plain" in shown and "steered" in shown and "KL" in shown and "partner" in shown
    data = json.loads(call(capsys, "steer", run.path, PROMPT, f"{feature}=+3", "--tokens", 6, "--json"))
    made = fm.generate(PROMPT, [Steer(feature, 3)], max_new_tokens=6, do_sample=False)
    assert (data["plain"], data["steered"]) == (made.plain, made.text)
    partner = data["partners"][0]["partner"]
    held = json.loads(
        call(capsys, "steer", run.path, PROMPT, f"{feature}=+3", "--without", partner, "--tokens", 6, "--json")
    )
    assert held["kl"] != data["kl"]
    call(capsys, "steer", run.path, PROMPT, f"{feature}=+3@40:", "--tokens", 6)  # only on text to come


def test_attribute_prints_the_metric_and_its_gap(run, fm, capsys):
    shown = call(capsys, "attribute", run.path, PROMPT)
    assert "metric: logit of" in shown and shown.count("gap") == len(run.saes)
    data = json.loads(call(capsys, "attribute", run.path, PROMPT, "--metric", " kate - life", "--json"))
    found = fm.attribute(PROMPT, unbraid.logit(" kate", minus=" life"))
    assert data["metric"] == pytest.approx(found.metric, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "edit"),
    [
        ("a/1=+2", Steer("a/1", 2.0)),
        ("a/1=-2", Steer("a/1", -2.0)),
        ("a/1=+2@5:", Steer("a/1", 2.0, at=slice(5, None))),
        ("a/1=2", Clamp("a/1", 2.0)),
        ("a/1=0", Ablate("a/1")),
        ("a/all=0@last", Ablate("a/all", "last")),
        ("module:x.y/1=x.5@-1", Scale("module:x.y/1", 0.5, -1)),
    ],
)
def test_an_edit_is_spelt_one_way(text, edit):
    assert parse_edit(text, []) == edit


def test_without_takes_an_index_or_an_address():
    assert parse_edit("a/1=+2", ["7", "b/3"]).without == ("a/7", "b/3")


@pytest.mark.parametrize("text", ["a/1", "a=2", "a/1=two", "a/1=+2@", "a/1=++2", "=2", "a/x=2"])
def test_what_is_no_edit_is_refused(text):
    with pytest.raises(FeatureError, match=r"is no edit|names no positions"):
        parse_edit(text, [])


@pytest.mark.parametrize("text", [":", "1:2:3:4", "a", "1.5", ""])
def test_what_are_no_positions_is_refused(text):
    with pytest.raises(FeatureError, match="names no positions"):
        parse_positions(text)


@pytest.mark.parametrize(
    "words",
    [
        ["read", "nowhere", "text"],
        ["read", "RUN", "text", "--k", "-3"],
        ["read", "RUN", ""],
        ["feature", "RUN", "nowhere/1"],
        ["steer", "RUN", "text", "nowhere/1=+2"],
        ["attribute", "RUN", "text", "--method", "guess"],
        ["attribute", "RUN", "text", "--metric", "two tokens at least"],
    ],
)
def test_a_wrong_word_ends_in_one_message(run, words, capsys):
    with pytest.raises(SystemExit):
        cli.main([str(run.path) if word == "RUN" else word for word in words])
    assert "expected" in capsys.readouterr().err
