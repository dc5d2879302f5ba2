"""k-sparse probing: can one, two or five features tell what a text is about?

Binary tasks on real labelled text (from the `sae-probes` package, where pip put it) are read at the last token
of each text. A probe on k features of the SAE stands beside one on k raw channels, one on the whole activation and one
on all features (arXiv 2502.16681 found that SAE probes rarely beat the plain one: hence the baselines). Activations are
cached, because they cost a model pass and every SAE of a site shares them.
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from unbraid.activations.rows import side_by_side
from unbraid.config import ProbingConfig
from unbraid.errors import EvaluationError
from unbraid.evaluation.intervals import mean_interval
from unbraid.evaluation.probes import Score, fit_probe, score_probe, top_columns
from unbraid.evaluation.prompts import cached_activations
from unbraid.evaluation.protocols import Autoencoder
from unbraid.evaluation.suite import Suite, register
from unbraid.text.packaged import INSTALL, LONGEST_FIELD, find_packaged_corpus

if TYPE_CHECKING:
    from unbraid.evaluation.suites import Evaluation

KS = (1, 2, 5)


def load_task(file: str, n_texts: int) -> tuple[list[str], np.ndarray]:
    """`n_texts` distinct texts of a binary task, classes alternating, and their labels.

    Raises:
        EvaluationError: the package is not installed, there is no such file, or it holds too few texts of a class.
    """
    folder = dict(find_packaged_corpus())["sae-probes"]
    if folder is None:
        raise EvaluationError(f"the labelled texts are not installed; expected the package sae-probes; run `{INSTALL}`")
    path = folder / f"{file}.csv.zst"
    if not path.exists():
        raise EvaluationError(f"there is no task file {str(path)!r}; expected one of the files in {str(folder)!r}")
    by_class: dict[str, list[str]] = {"0": [], "1": []}
    seen: set[str] = set()
    for row in _rows(path):
        label, text = row["target"], row["prompt"]
        if label in by_class and text.strip() and text not in seen:
            seen.add(text)
            by_class[label].append(text)
    half = n_texts // 2
    if min(map(len, by_class.values())) < half:
        counts = {label: len(texts) for label, texts in by_class.items()}
        raise EvaluationError(f"{file} has {counts} texts by class; expected {half} of each; lower train or test")
    texts = [text for pair in zip(by_class["1"][:half], by_class["0"][:half], strict=True) for text in pair]
    return texts, np.array([1, 0] * half)


def _rows(path: Path) -> Iterator[dict[str, str]]:
    import zstandard

    limit = csv.field_size_limit(LONGEST_FIELD)
    try:
        with path.open("rb") as file:
            text = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), encoding="utf-8", newline="")
            yield from csv.DictReader(text)
    finally:
        csv.field_size_limit(limit)


def task_activations(model: Any, file: str, settings: ProbingConfig) -> tuple[list[Tensor], np.ndarray]:
    """Last-token activations of a task at every site of `model`, from the cache once they have been computed."""
    texts, labels = load_task(file, settings.train + settings.test)
    start = [] if model.tokenizer.bos_token_id is None else [model.tokenizer.bos_token_id]
    ids = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    prompts = [(start + row)[: settings.max_tokens] for row in ids]
    return cached_activations(model, prompts, [[len(prompt) - 1] for prompt in prompts]), labels


@torch.no_grad()
def probe_task(
    saes: Mapping[str, Autoencoder], x_BD: Tensor, labels: np.ndarray, n_train: int, ks: Sequence[int] = KS
) -> dict[str, dict[str, Score]]:
    """Scores on one task: for `activations` and every SAE, `all` columns and the `top_K` ones.

    Args:
        saes: by name; they act on raw activations.
        x_BD: activations of all texts.
        labels: 0 or 1.
        n_train: the first so many texts are for fitting, the others for scoring.
        ks: numbers of columns.
    """
    result = {}
    inputs = {"activations": x_BD} | {name: sae.encode(x_BD) for name, sae in saes.items()}
    for name, columns in inputs.items():
        values = columns.float().cpu().numpy()
        fit, test = (values[:n_train], labels[:n_train]), (values[n_train:], labels[n_train:])
        result[name] = {"all": score_probe(fit_probe(*fit), *test)}
        for k in ks:
            result[name][f"top_{k}"] = score_probe(fit_probe(*fit, top_columns(*fit, k)), *test)
    return result


def summarise_probing(
    tasks: Mapping[str, Mapping[str, Mapping[str, Score]]], name: str, seed: int = 0
) -> dict[str, Any]:
    """Means over tasks with 95 % intervals over tasks, under SAEBench's names: `llm_*` for activations, `sae_*` for the
    SAE `name`; and every task's scores under `tasks`."""
    report: dict[str, Any] = {"llm": {}, "sae": {}, "tasks": {}}
    for prefix, source in (("llm", "activations"), ("sae", name)):
        for probe in next(iter(tasks.values()))[source]:
            key = f"{prefix}_test" if probe == "all" else f"{prefix}_{probe}_test"
            for metric in ("accuracy", "auc"):
                values = np.array([getattr(scores[source][probe], metric) for scores in tasks.values()])
                report[prefix][f"{key}_{metric}"] = float(values.mean())
                report[prefix][f"{key}_{metric}_interval"] = mean_interval(values, seed)
    for task, scores in tasks.items():
        report["tasks"][task] = {
            f"{prefix}_{probe}": {"accuracy": score.accuracy, "auc": score.auc}
            for prefix, source in (("llm", "activations"), ("sae", name))
            for probe, score in scores[source].items()
        }
    return report


@register
class ProbingSuite(Suite):
    """k-sparse probes on labelled text."""

    name = "probing"
    caption = "mean test accuracy of probes on 1 or 5 features, on 1 channel, on the whole activation"
    columns: ClassVar = {
        "k = 1": ("sae", "sae_top_1_test_accuracy"),
        "k = 5": ("sae", "sae_top_5_test_accuracy"),
        "channel": ("llm", "llm_top_1_test_accuracy"),
        "whole": ("llm", "llm_test_accuracy"),
    }
    reads = "prompts"

    def measure(self, evaluation: "Evaluation") -> None:
        """See `Suite.measure`."""
        settings = evaluation.config.probing
        probed = [subject for subject in evaluation.subjects if subject.has_own_features]
        scores = {subject.name: {} for subject in probed}
        task = evaluation.bar.add_task("probing", total=len(settings.tasks), unit="tasks")
        for file in settings.tasks:
            activations, labels = task_activations(evaluation.model.source.model, file, settings)
            for sites in dict.fromkeys(subject.sites for subject in probed):
                here = {subject.name: subject.sae for subject in probed if subject.sites == sites}
                x_BD = side_by_side(activations, sites)
                found = probe_task(here, x_BD.to(evaluation.device), labels, settings.train)
                for name in here:
                    scores[name][file] = {"activations": found["activations"], name: found[name]}
            evaluation.bar.advance(task)
        for subject in probed:
            subject.report["probing"] = summarise_probing(scores[subject.name], subject.name, evaluation.config.seed)
