"""First-letter absorption: none in an honest SAE, full where it is planted, refused where nothing can be spelled."""

import string

import numpy as np
import pytest
import torch

from unbraid.config import SpellingConfig
from unbraid.errors import EvaluationError
from unbraid.evaluation.absorption import Letters, Spelling, absorption_scores, read_spelling
from unbraid.evaluation.controls import LinearSAE
from unbraid.randomness import generator

PER_LETTER, ABSORBED = 30, 4
N_OWN = 26 * ABSORBED
WIDTH = 26 + N_OWN


def spelled(seed: int = 0) -> Spelling:
    """Each word is its letter's direction plus noise; 4 of the 12 held-out words of a letter have their own too."""
    letters = np.repeat(np.arange(26), PER_LETTER)
    x = 0.02 * torch.randn(len(letters), WIDTH, generator=generator(seed, "words"))
    x[torch.arange(len(letters)), torch.from_numpy(letters)] += 1
    place = np.arange(len(letters)) % PER_LETTER
    own = np.flatnonzero(place >= PER_LETTER - ABSORBED)
    x[torch.from_numpy(own), 26 + torch.arange(N_OWN)] += 1
    return Spelling([x], letters, place >= 18)


def honest() -> LinearSAE:
    return LinearSAE(torch.eye(WIDTH), torch.full((WIDTH,), -0.3), torch.eye(WIDTH), torch.zeros(WIDTH))


def absorbing() -> LinearSAE:
    """A letter's feature falls silent on the words that have a feature of their own, which carries the letter too."""
    encoder, decoder = torch.eye(WIDTH), torch.eye(WIDTH)
    encoder[26:, :26] = -2.0
    decoder[26 + torch.arange(N_OWN), torch.arange(N_OWN) // ABSORBED] = 1.0
    return LinearSAE(encoder, torch.full((WIDTH,), -0.3), decoder, torch.zeros(WIDTH))


def test_an_honest_sae_absorbs_nothing():
    report = absorption_scores(Letters(spelled(), 0), honest())
    assert report["mean"]["mean_full_absorption_score"] == 0
    assert report["mean"]["mean_absorption_fraction_score"] < 0.02
    assert len(report["letters"]) == 26 and report["mean"]["mean_num_split_features"] == 1


def test_planted_absorption_is_found_at_its_rate_whatever_the_norm_of_the_decoder():
    letters = Letters(spelled(), 0)
    sae = absorbing()
    report = absorption_scores(letters, sae)
    assert report["mean"]["mean_full_absorption_score"] == pytest.approx(1 / 3, abs=0.05)
    assert report["mean"]["mean_absorption_fraction_score"] == pytest.approx(1 / 3, abs=0.1)
    low, high = report["mean"]["mean_full_absorption_score_interval"]
    assert low <= 1 / 3 <= high + 0.02
    scale = torch.rand(WIDTH, generator=generator(0, "scale")) + 0.5
    folded = LinearSAE(sae.W_enc * scale, sae.b_enc * scale, sae.W_dec / scale[:, None], sae.b_dec)
    again = absorption_scores(letters, folded)["mean"]
    assert again["mean_full_absorption_score"] == pytest.approx(report["mean"]["mean_full_absorption_score"], abs=1e-6)


def test_a_model_that_cannot_spell_is_refused_with_a_reason():
    known = spelled()
    noise = Spelling([torch.randn_like(known.activations[0])], known.letters, known.is_test)
    with pytest.raises(EvaluationError, match="cannot spell at this site"):
        Letters(noise, 0)


class Tokenizer:
    """Every two-letter word is a token, then what the prompt is made of."""

    words = [a + b for a in string.ascii_lowercase for b in string.ascii_lowercase]  # noqa: RUF012
    extra = ["<bos>", "\n", " has the first letter:", *(f" {c}" for c in string.ascii_uppercase)]  # noqa: RUF012
    bos_token_id = len(words)

    def __len__(self):
        return len(self.words) + len(self.extra)

    def decode(self, ids):
        return (self.words + self.extra)[ids[0]]

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [len(self.words) + self.extra.index(text)]}


class Model:
    tokenizer = Tokenizer()
    sites = ("only",)
    identity = {"name": "toy"}  # noqa: RUF012

    def activations(self, tokens, mask):
        return [torch.nn.functional.one_hot(tokens, len(self.tokenizer)).float()]

    def logits(self, tokens, mask):
        """Names the first letter of the word it was asked about, right before the suffix."""
        letter = torch.zeros_like(tokens)
        for row, ids in enumerate(tokens.tolist()):
            for at in range(1, len(ids)):
                word = self.tokenizer.decode([ids[at - 1]]).strip().lower()
                letter[row, at] = ord(word[0]) - ord("a") if word.isalpha() else 0
        first_answer = len(Tokenizer.words) + Tokenizer.extra.index(" A")
        return torch.nn.functional.one_hot(first_answer + letter, len(self.tokenizer)).float()


class Illiterate(Model):
    identity = {"name": "illiterate toy"}  # noqa: RUF012

    def logits(self, tokens, mask):
        return torch.randn(*tokens.shape, len(self.tokenizer), generator=generator(0, "noise"))


def test_a_model_that_names_the_wrong_letters_is_refused_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(Illiterate, "activations", lambda self, tokens, mask: pytest.fail("was read"))
    with pytest.raises(EvaluationError, match=r"right for \d%; absorption needs 25%"):
        read_spelling(Illiterate(), SpellingConfig(train=4, test=2))


def test_words_are_read_where_they_stand_behind_solved_examples(tmp_path, monkeypatch):
    monkeypatch.setenv("UNBRAID_CACHE", str(tmp_path))
    seen = []
    model = Model()
    read = Model.activations
    monkeypatch.setattr(
        Model, "activations", lambda self, tokens, mask: seen.append(tokens) or read(self, tokens, mask)
    )
    spelling = read_spelling(model, SpellingConfig(train=4, test=2, examples=3))
    assert spelling.accuracy == 1.0
    assert spelling.is_test.sum() == 52 and len(spelling.letters) == 156
    words = [model.tokenizer.decode([token]) for token in spelling.activations[0].argmax(1).tolist()]
    assert [word.strip()[0].lower() for word in words] == [chr(97 + i) for i in spelling.letters]
    assert len(set(words)) == 156
    lines = "".join(model.tokenizer.decode([token]) for token in seen[0][-1].tolist()).split("\n")
    assert lines[0] == "<bos>" and len(lines) == 1 + 3 + 15
    assert all(line[2:-1] == " has the first letter: " and line.strip()[0].upper() == line[-1] for line in lines[1:])
