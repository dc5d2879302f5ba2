"""All suites on all SAEs of a run (or one SAE folder), controls beside them: `unbraid eval`.

A suite that does not apply is skipped and the report says why. Each stands in one file (`suite.py` says what it is);
how results of several evaluations come together says `evaluation_file.py`.
"""

import time
from collections.abc import Callable, Sequence
from functools import cache, cached_property, partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from unbraid.config import EvaluationConfig
from unbraid.config.measuring import BUILT_IN as NAMES
from unbraid.config.measuring import READS_TEXT, SUITES
from unbraid.device import pick_device
from unbraid.errors import EvaluationError, UnbraidError
from unbraid.evaluation import absorption, context_scores, core, correlation, geometry, ground_truth, probing
from unbraid.evaluation.controls import controls_of, mean_l0, random_control
from unbraid.evaluation.evaluation_file import EvaluationFile, Report
from unbraid.evaluation.on_model import REFERENCE_ROWS, OnModel
from unbraid.evaluation.subjects import EvaluatedSAE, centre_where_needed, open_subjects
from unbraid.evaluation.suite import Suite
from unbraid.evaluation.tables import evaluation_tables
from unbraid.evaluation.trained_controls import WIDEST
from unbraid.formats import folder_name, path_or_name
from unbraid.progress import Stages
from unbraid.randomness import generator
from unbraid.sites import Route
from unbraid.synthetic import build_world

BUILT_IN = (core, correlation, context_scores, geometry, probing, absorption, ground_truth)
"""Importing them registers their suites."""


def run_suites(
    path: Path | str,
    config: EvaluationConfig | None = None,
    *,
    console: Console | None = None,
    out: Path | None = None,
    trust_remote_code: bool = False,
) -> Report:
    """Evaluate the SAEs at `path` and write `evaluation.json` (and `evaluation_features.safetensors`) beside them.

    What an earlier evaluation of the same weights found in suites that are not run again stays in the file.

    Args:
        path: a run folder, an SAE folder in any layout unbraid reads, or a name that `unbraid.load` takes.
        config: suites and sizes.
        console: where progress and the tables are shown; nothing is shown without one.
        out: folder to write into; `path` by default, and `evaluations/NAME` for a name.
        trust_remote_code: allow a run's settings to run code that comes with the model.

    Returns:
        What `evaluation.json` holds: `saes` and `controls` by name, each with a section per suite; `skipped`: suite ->
        reason; `seconds` by stage; `settings` by suite; `weights`: checksum of the SAEs.

    Raises:
        UnbraidError: with what was wrong, what was expected and what to change.
    """
    path, config, console = path_or_name(path), config or EvaluationConfig(), console or Console(quiet=True)
    if out is None and isinstance(path, Path):
        out = path.parent if path.is_file() else path
    out = out or Path("evaluations", folder_name(path))
    evaluation = Evaluation(path, config, console, trust_remote_code)
    file = EvaluationFile(out, evaluation.subjects)
    report = evaluation.run()
    for part in evaluation_tables(report):
        console.print(part, highlight=False, markup=False)
    report, kept = file.write(report, evaluation.subjects)
    console.print(f"\ndone: everything in {file.path}", highlight=False, markup=False)
    if kept:
        console.print(f"kept there from an earlier evaluation: {', '.join(kept)}", highlight=False, markup=False)
    return report


class Evaluation:
    """One evaluation, as its suites see it.

    Attributes:
        subjects: SAEs and controls; suites leave what they find in their reports.
        config: suites and sizes.
        suites: those that are run, in order.
        world: the synthetic world, where one is named.
        run_config: settings under which activations can be had again; None where unknown.
        device: where everything runs.
        bar: shows how far it is.
        skipped: what was left out, and why.
    """

    bar: Stages

    def __init__(self, path: Path | str, config: EvaluationConfig, console: Console, trust_remote_code: bool):
        self.path, self.config, self.console = path, config, console
        self.device = pick_device(config.device)
        self.world = None if config.world is None else build_world(config.world, self.device)
        self.subjects, self.run_config = open_subjects(path, config, self.device, trust_remote_code)
        known = SUITES.readers()
        self.suites: list[Suite] = [known[name]() for name in config.suites]
        self.skipped: dict[str, str] = {}
        self.seconds: dict[str, float] = {}

    @cached_property
    def model(self) -> OnModel:
        """The language model and what has been read of it.

        Raises:
            EvaluationError: nothing says which model.
        """
        if self.run_config is None:
            raise EvaluationError(
                self.subjects[0].unknown or "nothing says which model the SAEs belong to; give --model"
            )
        model = OnModel(self.run_config, self.subjects, self.config, self.device, self.bar)
        centre_where_needed(self.subjects, model.source.model.model)
        return model

    def run(self) -> Report:
        """Every suite on every subject."""
        suites = [suite.name for suite in self.suites]
        on_text = [suite.name for suite in self.suites if suite.reads in READS_TEXT]
        if self._reads_model and any(suite.reads == "prompts" for suite in self.suites):
            self.console.print(
                f"{len(suites)} suites of {len(self.subjects)} SAEs: probing, absorption and controls take minutes; "
                "--suites core,correlation,geometry and --controls false leave them out",
                highlight=False,
                markup=False,
            )
        with Stages(self.console) as self.bar:
            if self.config.controls:
                self._stage("controls", self._add_controls, suites)
            keep_codes = any(suite.reads == "codes" for suite in self.suites)
            self._stage("held-out text", lambda: self.model.read_held_out(keep_codes), on_text)
            for suite in self.suites:
                self._stage(suite.name, partial(self._measure, suite), [suite.name])
        if set(suites) <= set(self.skipped):
            reasons = "; ".join(f"{suite}: {self.skipped[suite]}" for suite in suites)
            raise EvaluationError(f"nothing could be measured, every suite was skipped. {reasons}")
        return {
            "path": str(self.path),
            "model": None if self.run_config is None else self.run_config.model.name,
            "settings": dict.fromkeys(suites, self.config.model_dump(mode="json", exclude={"suites"})),
            "saes": {subject.name: self._entry(subject) for subject in self.subjects if subject.control is None},
            "controls": {
                subject.name: self._entry(subject) for subject in self.subjects if subject.control is not None
            },
            "skipped": self.skipped,
            "seconds": self.seconds,
        }

    def _stage(self, name: str, work: Callable[[], None], suites: Sequence[str]) -> None:
        """`work`, timed, if a suite it serves still goes on; where it does not apply, the reason ends them all."""
        suites = [suite for suite in suites if suite not in self.skipped]
        if not suites:
            return
        started = time.perf_counter()
        try:
            work()
        except EvaluationError as problem:
            self.skipped |= dict.fromkeys(suites, str(problem))
            self.bar.end()
        self.seconds[name] = round(time.perf_counter() - started, 1)
        outcome = "skipped" if set(suites) <= set(self.skipped) else "done"
        self.console.print(f"{name}: {outcome} in {self.seconds[name]} s", highlight=False, markup=False)

    def _measure(self, suite: Suite) -> None:
        """Run it; what goes wrong in somebody else's code must not cost the others' results."""
        try:
            self.skipped |= suite.measure(self) or {}
        except UnbraidError:
            raise
        except Exception as problem:
            if suite.name in NAMES:
                raise
            raise EvaluationError(
                f"the suite {suite.name!r} of {type(suite).__module__} failed: {type(problem).__name__}: {problem}"
            ) from problem

    def _add_controls(self) -> None:
        """For each site, what has learned nothing, at the sparsity of the site's first SAE."""
        rows, to_train_on = self._reference_rows(), cache(lambda: self.model.control_rows())
        first = {subject.sites[0]: subject for subject in reversed(self.subjects) if subject.is_plain}
        for subject in self.subjects:
            if not subject.is_plain:
                self.skipped[f"controls of {subject.name}"] = (
                    "they reconstruct the one site they read, a transcoder or crosscoder does not"
                )
        for site, subject in sorted(first.items()):
            chance = generator(self.config.seed, "controls", site)
            if rows is None:  # nothing but directions is evaluated
                controls = {"random": random_control(subject.sae, torch.zeros(1, subject.sae.d_in), 1.0, chance)}
            else:
                controls = controls_of(subject.sae, rows[site], chance)
                if self._reads_model and self.config.control_tokens and len(subject.sae.W_dec) <= WIDEST:
                    l0 = mean_l0(subject.sae, rows[site])
                    controls |= self.model.trained_controls(site, len(subject.sae.W_dec), l0, to_train_on)
            where = self._site_name(site) or subject.name
            self.subjects += [
                EvaluatedSAE(f"{where}: {name}", (site,), sae, control=name) for name, sae in controls.items()
            ]

    @property
    def _reads_model(self) -> bool:
        return self.run_config is not None and any(suite.reads != "weights" for suite in self.suites)

    def _reference_rows(self) -> list[Tensor] | None:
        """Activations that controls are fitted to, one tensor a site, where any are read."""
        if self._reads_model:
            return self.model.training_rows(REFERENCE_ROWS)
        if self.world is not None and self.world.d_model == self.subjects[0].sae.d_in:
            chance = generator(self.config.seed, "controls", device=self.device)
            return [self.world.sample(REFERENCE_ROWS, chance)[0]]
        return None

    def _site_name(self, site: int) -> str | None:
        return None if self.run_config is None else str(self.run_config.sites[site])

    def _entry(self, subject: EvaluatedSAE) -> Report:
        if self.run_config is None:
            return {"site": None} | subject.report
        inputs = tuple(self.run_config.sites[site] for site in subject.sites)
        return {"site": str(Route(inputs, subject.outputs or inputs))} | subject.report
