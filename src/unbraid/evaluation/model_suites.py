"""The suites that read the language model: core, correlation, probing, absorption.

The model is what costs, so its passes are shared: one stream of held-out activations feeds the meters of every SAE of
every site, one intact pass serves all of them, and the short prompts of probing and absorption are read at all sites
at once and cached.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unbraid.activations.live import LiveActivations
from unbraid.activations.rows import Chunk, RowFilter, side_by_side
from unbraid.config import EvaluationConfig, RunConfig
from unbraid.errors import EvaluationError
from unbraid.evaluation.absorption import Letters, absorption_scores, read_spelling
from unbraid.evaluation.context_scores import AFTER, BEFORE, CONTEXTS, context_scores, windows
from unbraid.evaluation.core import CoreMeter
from unbraid.evaluation.correlation import CorrelationMeasured, measure_correlation
from unbraid.evaluation.pairs import stack_codes
from unbraid.evaluation.probing import probe_task, summarise_probing, task_activations
from unbraid.evaluation.sentence_encoder import SentenceEncoder
from unbraid.evaluation.splice import Together, preservation
from unbraid.evaluation.subjects import EvaluatedSAE
from unbraid.evaluation.trained_controls import ControlSite, steps_on, trained_controls
from unbraid.progress import Stages
from unbraid.randomness import derive_seed
from unbraid.sae import Codes
from unbraid.sites import Route

REFERENCE_ROWS = 4096
RANDOM_CONTEXTS = 100
ON_CODES = ("correlation", "contexts")


class ModelSuites:
    """Measures SAEs on the model and text of `run`; every method leaves what it found in the reports of `subjects`.

    Args:
        run: model, sites and text.
        subjects: SAEs and controls; controls may be added before the first suite.
        config: sizes.
        device: where everything runs.
        bar: shows how far it is.
    """

    def __init__(
        self, run: RunConfig, subjects: list[EvaluatedSAE], config: EvaluationConfig, device: torch.device, bar: Stages
    ):
        self.subjects, self.config, self.device, self.bar = subjects, config, device, bar
        task = bar.add_task(f"loading {run.model.name}", total=1, unit="models")
        self.source = LiveActivations(run, device)
        self.filter = RowFilter(run.buffer, self.source.sites, self.source.special_ids)
        self.contexts: list[tuple[Tensor, Tensor]] = []
        self.held_out: list[tuple[Tensor, Tensor]] = []
        self.positions: list[Tensor] = []
        bar.advance(task)

    def control_rows(self) -> list[Tensor]:
        """Rows that controls are trained on, `[control_tokens, D]` a site."""
        task = self.bar.add_task("activations for controls", total=self.config.control_tokens, unit="rows")
        return self.training_rows(self.config.control_tokens, lambda found: self.bar.update(task, completed=found))

    def training_rows(self, wanted: int, told: Callable[[int], None] = lambda _: None) -> list[Tensor]:
        """Rows of training text, `[wanted, D]` a site or all there are: what controls are fitted to.

        Raises:
            EvaluationError: there is no text.
        """
        parts: list[list[Tensor]] = []
        found = 0
        for chunk in self.source.chunks(None):
            parts.append([x_BD.float() for x_BD in self.filter(chunk)])
            found += len(parts[-1][0])
            told(min(found, wanted))
            if found >= wanted:
                break
        if not parts:
            raise EvaluationError(f"the text gave no context of {self.source.context_length} tokens; give more text")
        return [torch.cat(pieces)[:wanted] for pieces in zip(*parts, strict=True)]

    def trained_controls(self, site: int, width: int, l0: float, rows: Callable[[], list[Tensor]]) -> dict[str, Any]:
        """Controls of which half has learned, of a width and sparsity; see `trained_controls`.

        Raises:
            EvaluationError: there is too little text, or the cache cannot be written.
        """
        run, name = self.source, str(self.source.sites[site])
        kept = {"site": name, "context_length": run.context_length, "bos": run.prepends_bos} | {
            "rows": self.filter.config.model_dump(mode="json", include={"drop_first_position", "norm_limit"})
        }
        source = kept | run.identity
        place = ControlSite(width, max(1, round(l0)), self.config.seed, source, self.config.control_tokens)

        def train_on() -> Tensor:
            x_RD = rows()[site]
            self.bar.add_task(f"controls at {name}", total=steps_on(len(x_RD)), unit="steps")
            return x_RD

        return trained_controls(place, train_on, self.device, self.bar.advance_now)

    def read_held_out(self, suites: Sequence[str]) -> None:
        """One pass over held-out text: core metrics and codes of every SAE, and the contexts that `splice` takes.

        Raises:
            EvaluationError: there is no held-out text.
        """
        meters = []
        for subject in self.subjects:
            with_codes = bool(set(suites) & set(ON_CODES)) and subject.has_own_features
            meters.append((subject, CoreMeter(subject.sae, on_codes=_keep_codes(subject) if with_codes else None)))
        for chunk, keep_CT in self._held_out_chunks():
            self.held_out += zip(chunk.tokens_BT, keep_CT, strict=True)
            if chunk.positions_BT is not None:
                self.positions += chunk.positions_BT
            activations = [x_CTD.float() for x_CTD in chunk.activations]
            for subject, meter in meters:
                outputs = [self.source.sites.index(site) for site in subject.outputs]
                y_CTM = side_by_side(activations, outputs) if outputs else None
                meter.add(side_by_side(activations, subject.sites), keep_CT.to(self.device), y_CTM)
        self.contexts = self.held_out[: self.config.splice_contexts]
        for subject, meter in meters:
            core = meter.result()
            if "core" in suites:
                subject.report["core"], subject.features = core.categories, core.features

    def _held_out_chunks(self) -> Iterator[tuple[Chunk, Tensor]]:
        """Held-out chunks, `config.tokens` in whole contexts, and which of their tokens count."""
        text = self.source.text
        wanted = left = -(-self.config.tokens // text.context_length)
        task = self.bar.add_task("held-out activations", total=wanted, unit="contexts")
        if text.held_out_fraction > 0:
            for chunk in self.source.chunks(None, held_out=True):
                chunk = chunk.of_first(left)
                yield chunk, self.filter.mask(chunk)
                self.bar.advance(task, len(chunk.tokens_BT))
                left -= len(chunk.tokens_BT)
                if left == 0:
                    return
        if left == wanted:
            raise EvaluationError(
                f"no held-out text: text.held_out_fraction = {text.held_out_fraction} gave no full context; give more "
                "text or raise it"
            )
        self.bar.update(task, total=wanted - left)

    def splice(self) -> dict[str, str]:
        """The part of core that continues the model behind reconstructions; what was left out of it, and why."""
        task = self.bar.add_task("spliced passes", total=len(self.contexts), unit="contexts")

        def counted() -> Iterator[tuple[Tensor, ...]]:
            for number, context in enumerate(self.contexts):
                yield tuple(table_T.unsqueeze(0) for table_T in (*context, *self.positions[number : number + 1]))
                self.bar.advance(task)

        saes: dict[Any, dict[str, Any]] = {}
        for subject in self.subjects:
            saes.setdefault(self._route(subject), {})[subject.name] = subject.sae
        sets, left_out = self._sets()
        for name, members in sets.items():
            place = Together(tuple(self._route(member) for member in members))
            saes.setdefault(place, {})[name] = tuple(member.sae for member in members)
        found = preservation(self.source.model, saes, counted(), self.config.seed)
        for subject in self.subjects:
            core = subject.report["core"]
            for category, metrics in found[subject.name].items():
                core[category] = core.get(category, {}) | metrics
        for name, members in sets.items():
            for member in members:
                metrics = found[name]["model_performance_preservation"] | found[name]["model_behavior_preservation"]
                member.report["core"]["replaced_together"] = {"dictionaries": len(members)} | metrics
        return left_out

    def _route(self, subject: EvaluatedSAE) -> Route:
        inputs = tuple(self.source.sites[site] for site in subject.sites)
        return Route(inputs, subject.outputs or inputs)

    def _sets(self) -> tuple[dict[str, list[EvaluatedSAE]], dict[str, str]]:
        """The dictionaries that one variant has at different sites, under a name that no dictionary has; and why a
        variant's are not replaced together."""
        found: dict[str, list[EvaluatedSAE]] = {}
        for subject in self.subjects:
            if subject.variant is not None and not self._route(subject).has_several_sites:
                found.setdefault(f"all of {subject.variant}", []).append(subject)
        sets, left_out = {}, {}
        for name, members in found.items():
            sites = [str(self._route(member).writes) for member in members]
            twice = sorted({site for site in sites if sites.count(site) > 1})
            if twice:
                left_out[f"CE {name}"] = f"several of its dictionaries predict {', '.join(twice)}"
            elif len(members) > 1:
                sets[name] = members
        return sets, left_out

    def correlation(self) -> None:
        """The paper's correlation reduction, on the codes that `read_held_out` kept."""
        with_codes = [subject for subject in self.subjects if subject.codes]
        task = self.bar.add_task("correlation", total=len(with_codes), unit="SAEs")
        measured: dict[str | None, CorrelationMeasured] = {}
        for subject in with_codes:
            measured[subject.name] = measure_correlation(
                subject.codes,
                subject.codes[0].n_features,
                fraction=self.config.fraction,
                block_tokens=self.source.context_length,
                replicates=self.config.replicates if subject.control is None else 0,
                seed=self.config.seed,
            )
            self.bar.advance(task)
        for subject in with_codes:
            subject.report["correlation"] = measured[subject.name].report
            if subject.twin in measured:
                subject.report["correlation"]["reduction"] = measured[subject.name].reduction(measured[subject.twin])

    def context_scores(self) -> None:
        """Whether the contexts of a feature belong together, on the codes that `read_held_out` kept.

        Raises:
            EvaluationError: the sentence encoder is not installed.
        """
        encoder = SentenceEncoder(device=self.device)
        place_R2 = torch.cat(
            [
                torch.stack([torch.full_like(at, context), at], dim=1)
                for context, (_, keep_T) in enumerate(self.held_out)
                for at in [keep_T.nonzero().squeeze(1)]
            ]
        ).numpy()
        random_rows = np.random.default_rng(self.config.seed).permutation(len(place_R2))[:RANDOM_CONTEXTS]
        others = encoder([self._window(*place_R2[row].tolist()) for row in random_rows])
        with_codes = [subject for subject in self.subjects if subject.codes]
        task = self.bar.add_task("contexts", total=len(with_codes), unit="SAEs")
        for subject in with_codes:
            rng = np.random.default_rng(derive_seed(self.config.seed, "contexts", subject.name))
            by_feature = stack_codes(subject.codes, subject.codes[0].n_features).tocsc()
            own: list[list[str]] = []
            for feature in rng.permutation(by_feature.shape[1]):
                part = slice(by_feature.indptr[feature], by_feature.indptr[feature + 1])
                rows = windows(by_feature.indices[part], by_feature.data[part], place_R2[:, 0], rng)
                if len(rows) == CONTEXTS:
                    own.append([self._window(*place_R2[row].tolist()) for row in rows])
                if len(own) == self.config.context_features:
                    break
            subject.report["contexts"] = context_scores(own, others, encoder, self.config.seed)
            self.bar.advance(task)

    def _window(self, context: int, position: int) -> str:
        tokens_T = self.held_out[context][0][max(0, position - BEFORE) : position + AFTER + 1]
        return self.source.model.tokenizer.decode(tokens_T.tolist(), skip_special_tokens=True)

    def probing(self) -> None:
        """k-sparse probes on labelled text."""
        settings = self.config.probing
        probed = [subject for subject in self.subjects if subject.has_own_features]
        scores = {subject.name: {} for subject in probed}
        task = self.bar.add_task("probing", total=len(settings.tasks), unit="tasks")
        for file in settings.tasks:
            activations, labels = task_activations(self.source.model, file, settings)
            for sites in dict.fromkeys(subject.sites for subject in probed):
                here = {subject.name: subject.sae for subject in probed if subject.sites == sites}
                x_BD = side_by_side(activations, sites)
                found = probe_task(here, x_BD.to(self.device), labels, settings.train)
                for name in here:
                    scores[name][file] = {"activations": found["activations"], name: found[name]}
            self.bar.advance(task)
        for subject in probed:
            subject.report["probing"] = summarise_probing(scores[subject.name], subject.name, self.config.seed)

    def absorption(self) -> dict[str, str]:
        """First-letter absorption; returns site -> reason for the sites where no letters can be read.

        Raises:
            EvaluationError: the model cannot spell, or its tokenizer has no words.
        """
        task = self.bar.add_task("first letters", total=None, unit="prompts")
        spelling = read_spelling(
            self.source.model,
            self.config.spelling,
            self.config.seed,
            on_prompts=lambda done, total: self.bar.update(task, completed=done, total=total),
        )
        refused = {}
        for site, where in enumerate(self.source.sites):
            here = [subject for subject in self.subjects if subject.sites == (site,) and subject.is_plain]
            for subject in self.subjects:
                if not subject.is_plain:
                    refused[subject.name] = (
                        "absorption compares decoder rows with probes of what is read, at one site; a transcoder's "
                        "predict another one, and a crosscoder reads several"
                    )
            if not here:
                continue
            try:
                letters = Letters(spelling, site)
            except EvaluationError as problem:
                refused[str(where)] = str(problem)
                continue
            task = self.bar.add_task(f"absorption at {where}", total=len(here), unit="SAEs")
            for subject in here:
                subject.report["absorption"] = absorption_scores(letters, subject.sae, self.config.seed)
                self.bar.advance(task)
        return refused


def _keep_codes(subject: EvaluatedSAE) -> Callable[[Tensor], None]:
    def keep(f_BN: Tensor) -> None:
        codes = Codes.from_dense(f_BN.cpu())
        # A bare copy: the original remembers its sorted pattern, several times its size.
        subject.codes.append(Codes.unchecked(codes.offsets, codes.indices, codes.values, codes.n_features))

    return keep
