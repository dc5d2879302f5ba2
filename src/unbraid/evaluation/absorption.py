"""First-letter absorption on a language model (arXiv 2409.14507), computed as SAEBench does.

A model that can spell holds the first letter of a word at the word's token. Where a probe reads the letter but the
SAE's letter features stay silent, and another feature aligned with the probe carries it ("short" instead of "starts
with S"), the letter has been absorbed. Without a model that can spell there is nothing to measure: a model that names
fewer than a quarter of the letters when asked is refused, and so is a site where fewer than 20 can be read, as in
SAEBench.

What differs from SAEBench is size and speed, not the formula: some hundred words a letter instead of the whole
vocabulary, a prompt that goes on to ask about the next word (each is read behind the solved ones before it, and nothing
after it can matter to a causal model), and codes taken times the norm of their decoder rows, so that a folded decoder
gives the same numbers.
"""

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unbraid.config import SpellingConfig
from unbraid.errors import EvaluationError
from unbraid.evaluation.intervals import mean_interval
from unbraid.evaluation.probes import Probe, f1_score, fit_probe
from unbraid.evaluation.prompts import cached_activations, prompt_batches
from unbraid.evaluation.protocols import Autoencoder, decoder_rows
from unbraid.evaluation.suite import Suite, register
from unbraid.randomness import generator

if TYPE_CHECKING:
    from unbraid.evaluation.suites import Evaluation

QUESTION = " has the first letter:"
LEAST_ACCURACY = 0.25  # six times chance; what a site holds is judged letter by letter below
LEAST_PROBE_F1, LEAST_LETTERS = 0.6, 20
WORDS_A_PROMPT = 15
ASKED_AT_ONCE = 4
LARGEST_K, F1_JUMP = 10, 0.03
L1_DECAY, L1_STEPS, L1_LR, L1_END_LR = 0.01, 300, 0.01, 1e-5
FULL_COSINE, FRACTION_COSINE, PROPORTION, MOST_ABSORBERS = 0.025, 0.1, 0.4, 3


@dataclass(frozen=True)
class Spelling:
    """Activations at words of known first letter.

    Attributes:
        activations: `[words, D]`, one tensor a site.
        letters: `[words]`, 0 for a to 25 for z.
        is_test: `[words]`.
        accuracy: share of the words asked about whose first letter the model named.
    """

    activations: list[Tensor]
    letters: np.ndarray
    is_test: np.ndarray
    accuracy: float = 1.0


def read_spelling(
    model: Any,
    settings: SpellingConfig,
    seed: int = 0,
    on_prompts: Callable[[int, int], None] = lambda done, total: None,
) -> Spelling:
    """Ask `model` for the first letter of words that are one token of its vocabulary, and read it at the word.

    Args:
        model: a language model with `tokenizer`, `sites`, `activations` and `logits`.
        settings: how many words.
        seed: of the choice of words and examples.
        on_prompts: called with the number of prompts done and their total.

    Raises:
        EvaluationError: the vocabulary lacks words, or the model cannot spell them.
    """
    words = _words_by_letter(model.tokenizer)
    chance = generator(seed, "spelling")
    chosen: list[tuple[int, int, bool]] = []
    for letter, ids in enumerate(words):
        order = torch.randperm(len(ids), generator=chance)[: settings.train + settings.test].tolist()
        # A letter with few words gives the same share of them to the test.
        n_test = len(order) * settings.test // (settings.train + settings.test)
        chosen += [(ids[index], letter, place < n_test) for place, index in enumerate(order)]
    chosen = [chosen[i] for i in torch.randperm(len(chosen), generator=chance).tolist()]
    practice = [(token, letter) for token, letter, is_test in chosen if not is_test]
    letters = np.array([letter for _, letter, _ in chosen])
    format = _Format(model.tokenizer)
    prompts, places = [], []
    for first in range(0, len(chosen), WORDS_A_PROMPT):
        picks = torch.randperm(len(practice), generator=chance)[: settings.examples].tolist()
        read = [(token, letter) for token, letter, _ in chosen[first : first + WORDS_A_PROMPT]]
        prompt, at = format.prompt([practice[i] for i in picks] + read)
        prompts.append(prompt)
        places.append(at[-len(read) :])
    n_asked = min(len(prompts), -(-settings.asked // WORDS_A_PROMPT))
    total = n_asked + len(prompts)
    accuracy = _accuracy(
        model, prompts[:n_asked], places[:n_asked], letters, format, lambda done: on_prompts(done, total)
    )
    if accuracy < LEAST_ACCURACY:
        raise EvaluationError(
            f"the model cannot spell: asked for the first letter of words it is right for {accuracy:.0%}; absorption "
            f"needs {LEAST_ACCURACY:.0%}; use a larger model"
        )
    activations = cached_activations(model, prompts, places, lambda done: on_prompts(n_asked + done, total))
    on_prompts(total, total)
    return Spelling(activations, letters, np.array([is_test for _, _, is_test in chosen]), accuracy)


def _accuracy(
    model: Any,
    prompts: list[list[int]],
    places: list[list[int]],
    letters: np.ndarray,
    format: "_Format",
    on_prompts: Callable[[int], None],
) -> float:
    """How often the right one of the 26 answers has the highest logit at the end of the question."""
    answers = torch.tensor([ids[0] for ids in format.answers])
    right = done = 0
    for batch, tokens_CT, mask_CT in prompt_batches(prompts, ASKED_AT_ONCE):
        logits_CTV = model.logits(tokens_CT, mask=mask_CT).cpu()
        for row, i in enumerate(batch):
            ends = torch.tensor(places[i]) + len(format.question)
            named = logits_CTV[row, ends][:, answers].argmax(1)
            first = i * WORDS_A_PROMPT
            right += int((named == torch.from_numpy(letters[first : first + len(ends)])).sum())
        done += len(batch)
        on_prompts(done)
    return right / sum(map(len, places))


class _Format:
    """`WORD has the first letter: W`, a line a word."""

    def __init__(self, tokenizer: Any):
        self.start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.newline, self.question = self._ids(tokenizer, "\n"), self._ids(tokenizer, QUESTION)
        self.answers = [self._ids(tokenizer, f" {letter}") for letter in string.ascii_uppercase]

    @staticmethod
    def _ids(tokenizer: Any, text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt(self, words: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
        """Token ids, and where the words are."""
        ids, places = list(self.start), []
        for token, letter in words:
            ids += [*self.newline, token, *self.question, *self.answers[letter]]
            places.append(len(ids) - 1 - len(self.question) - len(self.answers[letter]))
        return ids, places


def _words_by_letter(tokenizer: Any) -> list[list[int]]:
    """Token ids of every word of letters only, with or without a leading space, by first letter."""
    words: list[list[int]] = [[] for _ in string.ascii_lowercase]
    for token in range(len(tokenizer)):
        text = tokenizer.decode([token]).removeprefix(" ")
        if text.isascii() and text.isalpha():
            words[string.ascii_lowercase.index(text[0].lower())].append(token)
    if min(map(len, words)) < 3:
        raise EvaluationError(
            "the vocabulary has letters that begin fewer than 3 words; first-letter absorption needs a tokenizer of "
            "English; leave the absorption suite out for this model"
        )
    return words


class Letters:
    """Probes that read the first letter from the activations of one site.

    Raises:
        EvaluationError: fewer than 20 letters can be read (F1 above 0.6 on held-out words): no spelling here.
    """

    def __init__(self, spelling: Spelling, site: int):
        self.x, self.letters, self.is_test = spelling.activations[site], spelling.letters, spelling.is_test
        self.spelling_accuracy = spelling.accuracy
        x = self.x.numpy()
        self.probes: list[Probe] = []
        self.f1: list[float] = []
        self.found: list[np.ndarray] = []  # the held-out words in which the probe rightly sees the letter
        for letter in range(26):
            is_letter = self.letters == letter
            probe = fit_probe(x[~self.is_test], is_letter[~self.is_test].astype(np.int64), balanced=True)
            predicted = probe.scores(x[self.is_test]) > 0
            self.probes.append(probe)
            self.f1.append(f1_score(predicted, is_letter[self.is_test]))
            self.found.append(np.flatnonzero(self.is_test)[predicted & is_letter[self.is_test]])
        self.readable = [letter for letter in range(26) if self.f1[letter] > LEAST_PROBE_F1]
        if len(self.readable) < LEAST_LETTERS:
            raise EvaluationError(
                f"the model cannot spell at this site: a probe reads {len(self.readable)} of 26 first letters with F1 "
                f"above {LEAST_PROBE_F1}; absorption needs {LEAST_LETTERS}; use a larger model or an earlier site"
            )


def absorption_scores(letters: Letters, sae: Autoencoder, seed: int = 0) -> dict[str, Any]:
    """SAEBench's absorption metrics of `sae`, an SAE of the site the letters were read at.

    Returns:
        `mean`: mean_absorption_fraction_score, mean_full_absorption_score, mean_num_split_features, their std_dev_*
        over letters and the 95 % interval of the first two; `letters`: the same by letter, with the probe's F1;
        `spelling_accuracy`: how often the model names the letter when asked.
    """
    W_dec = decoder_rows(sae)
    with torch.no_grad():
        f_BN = (sae.encode(letters.x.to(W_dec.device)).float() * W_dec.norm(dim=1)).cpu()
    W_dec = W_dec.cpu()
    weights = _l1_probe(f_BN[~letters.is_test], letters.letters[~letters.is_test])
    details = []
    for letter in letters.readable:
        main = _main_features(f_BN.numpy(), letters, letter, weights[letter])
        probe = letters.probes[letter]
        direction = F.normalize(torch.from_numpy(probe.weights / probe.scale).float(), dim=0)
        cosines = F.normalize(W_dec, dim=1) @ direction
        outcomes = [
            _absorbed(f_BN[word] * cosines, f_BN[word], cosines, float(letters.x[word] @ direction), main)
            for word in letters.found[letter]
        ]
        fractions, full = (np.array([outcome[i] for outcome in outcomes], dtype=float) for i in (0, 1))
        if len(outcomes):
            details.append(
                {
                    "first_letter": string.ascii_lowercase[letter],
                    "mean_absorption_fraction": float(fractions.mean()),
                    "full_absorption_rate": float(full.mean()),
                    "num_full_absorption": int(full.sum()),
                    "num_probe_true_positives": len(outcomes),
                    "num_split_features": len(main),
                    "probe_f1": letters.f1[letter],
                }
            )
    return {"mean": _means(details, seed), "letters": details, "spelling_accuracy": letters.spelling_accuracy}


def _means(details: list[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    names = {
        "absorption_fraction_score": "mean_absorption_fraction",
        "full_absorption_score": "full_absorption_rate",
        "num_split_features": "num_split_features",
    }
    report: dict[str, Any] = {}
    for name, key in names.items():
        values = np.array([float(detail[key]) for detail in details])
        report[f"mean_{name}"] = float(values.mean())
        report[f"std_dev_{name}"] = float(values.std(ddof=1)) if len(values) > 1 else 0.0
        if name != "num_split_features":
            report[f"mean_{name}_interval"] = mean_interval(values, seed)
    return report


def _l1_probe(f_BN: Tensor, letters: np.ndarray) -> Tensor:
    """`[26, N]` weights of one-vs-rest probes with an L1 penalty, on codes of unit overall root mean square."""
    codes = (f_BN / f_BN.square().mean().sqrt().clamp(min=1e-12)).to_sparse_csr()
    transposed = codes.to_dense().T.to_sparse_csr()
    targets = F.one_hot(torch.from_numpy(letters), 26).float()
    importance = (len(targets) - targets.sum(0)) / targets.sum(0).clamp(min=1)  # of a positive, beside a negative
    weights, bias = torch.zeros(f_BN.shape[1], 26), torch.zeros(26)
    optimiser = torch.optim.Adam([weights, bias], lr=L1_LR, weight_decay=1e-6)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, (L1_END_LR / L1_LR) ** (1 / L1_STEPS))
    for _ in range(L1_STEPS):
        positive = torch.sigmoid(codes @ weights + bias)
        slope = (positive * (1 - targets) - (1 - positive) * targets * importance) / targets.numel()
        weights.grad = transposed @ slope + L1_DECAY / 26 * weights.sign()
        bias.grad = slope.sum(0)
        optimiser.step()
        schedule.step()
    return weights.T


def _main_features(f_BN: np.ndarray, letters: Letters, letter: int, weights: Tensor) -> list[int]:
    """The features that stand for the letter: one, and more as long as each raises the F1 of a probe by 0.03."""
    is_letter, test = letters.letters == letter, letters.is_test
    best, main = -100.0, []
    for k in range(1, min(LARGEST_K, len(weights)) + 1):
        columns = weights.topk(k).indices.numpy()
        chosen = f_BN[:, columns]
        probe = fit_probe(chosen[~test], is_letter[~test].astype(np.int64), balanced=True)
        score = f1_score(probe.scores(chosen[test]) > 0, is_letter[test])
        if score <= best + F1_JUMP:
            break
        best, main = score, columns.tolist()
    return main


def _absorbed(
    projections: Tensor, codes: Tensor, cosines: Tensor, probe_projection: float, main: list[int]
) -> tuple[float, bool]:
    """(absorption fraction, whether fully absorbed by one feature) at one word."""
    by_main = float(projections[main].sum())
    others = (cosines >= FRACTION_COSINE) & (projections > 0)
    others[main] = False
    by_others = float(projections[others].sort(descending=True).values[:MOST_ABSORBERS].sum())
    if by_main >= probe_projection or by_others / probe_projection < PROPORTION:
        fraction = 0.0
    elif by_main <= 0:
        fraction = 1.0
    else:
        absorbed = min(by_others, probe_projection - by_main)
        fraction = float(np.clip(absorbed / (absorbed + by_main), 0.0, 1.0))
    strongest = int(projections.argmax())
    full = (
        bool((codes[main] < 1e-8).all())
        and float(cosines[strongest]) >= FULL_COSINE
        and probe_projection >= 0
        and float(projections[strongest]) / probe_projection >= PROPORTION
    )
    return fraction, full


@register
class AbsorptionSuite(Suite):
    """First-letter absorption."""

    name = "absorption"
    caption = (
        "first letters: share of a letter found in other features; words where it is wholly there; features a letter"
    )
    columns: ClassVar = {
        "fraction": ("mean", "mean_absorption_fraction_score"),
        "full": ("mean", "mean_full_absorption_score"),
        "split": ("mean", "mean_num_split_features"),
    }
    reads = "prompts"

    def measure(self, evaluation: "Evaluation") -> dict[str, str]:
        """See `Suite.measure`; it is skipped where the model cannot spell, or its tokenizer has no words."""
        config, source, bar = evaluation.config, evaluation.model.source, evaluation.bar
        task = bar.add_task("first letters", total=None, unit="prompts")
        spelling = read_spelling(
            source.model,
            config.spelling,
            config.seed,
            on_prompts=lambda done, total: bar.update(task, completed=done, total=total),
        )
        refused = {}
        for site, where in enumerate(source.sites):
            here = [subject for subject in evaluation.subjects if subject.sites == (site,) and subject.is_plain]
            for subject in evaluation.subjects:
                if not subject.is_plain:
                    refused[f"absorption at {subject.name}"] = (
                        "absorption compares decoder rows with probes of what is read, at one site; a transcoder's "
                        "predict another one, and a crosscoder reads several"
                    )
            if not here:
                continue
            try:
                letters = Letters(spelling, site)
            except EvaluationError as problem:
                refused[f"absorption at {where}"] = str(problem)
                continue
            task = bar.add_task(f"absorption at {where}", total=len(here), unit="SAEs")
            for subject in here:
                subject.report["absorption"] = absorption_scores(letters, subject.sae, config.seed)
                bar.advance(task)
        return refused
