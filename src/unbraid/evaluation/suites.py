"""All suites on all SAEs of a run (or one SAE folder), controls beside them: `unbraid eval`.

The expensive thing is the language model, so its passes are shared: one stream of held-out activations feeds the core
and correlation meters of every SAE of every site, intact and ablated passes serve all SAEs of a site, and the short
prompts of probing and absorption are read at all sites at once and cached. A suite that does not apply is skipped and
the report says why.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import save_file
from torch import Tensor

from unbraid.activations.live import LiveActivations
from unbraid.activations.rows import Chunk, RowFilter
from unbraid.config import EvaluationConfig
from unbraid.device import pick_device
from unbraid.errors import EvaluationError
from unbraid.evaluation.absorption import Letters, absorption_scores, read_spelling
from unbraid.evaluation.controls import pca_control, permuted_control, random_control
from unbraid.evaluation.core import CoreMeter
from unbraid.evaluation.correlation import evaluate_correlation
from unbraid.evaluation.geometry import composition_rate, max_cosines, seed_agreement
from unbraid.evaluation.ground_truth import evaluate_ground_truth
from unbraid.evaluation.probing import probe_task, summarise_probing, task_activations
from unbraid.evaluation.splice import preservation
from unbraid.evaluation.subjects import Subject, Subjects, open_subjects
from unbraid.evaluation.tables import evaluation_table
from unbraid.files import write_json, write_whole
from unbraid.randomness import generator
from unbraid.sae import Codes
from unbraid.synthetic import build_world

REFERENCE_ROWS = 4096
WIDEST_AGREEMENT = 8192
Report = dict[str, Any]


@dataclass
class _Judged:
    """An SAE or a control, and what has been found about it."""

    name: str
    site: int
    sae: Any
    subject: Subject | None = None
    report: Report = field(default_factory=dict)
    codes: list[Codes] = field(default_factory=list)
    features: dict[str, Tensor] = field(default_factory=dict)

    @property
    def is_control(self) -> bool:
        return self.subject is None


def run_suites(
    path: Path | str, config: EvaluationConfig | None = None, *, console: Console | None = None, out: Path | None = None
) -> Report:
    """Evaluate the SAEs at `path` and write `evaluation.json` (and `evaluation_features.safetensors`) beside them.

    Args:
        path: a run folder, or an SAE folder in any layout unbraid reads.
        config: suites and sizes.
        console: where progress and the table are shown; nothing is shown without one.
        out: folder to write into; `path` by default.

    Returns:
        What `evaluation.json` holds: `saes` and `controls` by name, each with a section per suite; `skipped`: suite ->
        reason; `seconds` by suite; the settings.

    Raises:
        UnbraidError: with what was wrong, what was expected and what to change.
    """
    path, config, console = Path(path), config or EvaluationConfig(), console or Console(quiet=True)
    evaluation = _Evaluation(path, config, console)
    report = evaluation.run()
    out = out or path
    write_json(out / "evaluation.json", report)
    features = {
        f"{judged.name}.{key}": values.contiguous()
        for judged in evaluation.judged
        for key, values in judged.features.items()
    }
    if features:
        write_whole(out / "evaluation_features.safetensors", lambda partial: save_file(features, partial))
    console.print(evaluation_table(report))
    return report


class _Evaluation:
    def __init__(self, path: Path, config: EvaluationConfig, console: Console):

        self.path, self.config, self.console = path, config, console
        self.device = pick_device(config.device)
        self.subjects: Subjects = open_subjects(path, config, self.device)
        self.judged = [_Judged(subject.name, subject.site, subject.sae, subject) for subject in self.subjects.saes]
        self.skipped: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.source: LiveActivations | None = None

    def run(self) -> Report:
        wanted = self.config.suites
        with Progress(console=self.console) as self.bar:
            if self.subjects.run is None:
                reason = "the folder does not say which model and site the SAE belongs to; give --model and --site"
                self.skipped |= {name: reason for name in wanted if name not in ("geometry", "ground-truth")}
            elif set(wanted) - {"geometry", "ground-truth"}:
                self._stage("activations", self._activations)
                suites: dict[str, Callable[[], None]] = {
                    "core": self._splice,
                    "correlation": self._correlation,
                    "probing": self._probing,
                    "absorption": self._absorption,
                }
                for name, suite in suites.items():
                    if name in wanted:
                        self._stage(name, suite)
            if "geometry" in wanted:
                self._stage("geometry", self._geometry)
            if "ground-truth" in wanted:
                self._stage("ground-truth", self._ground_truth)
        return {
            "path": str(self.path),
            "model": None if self.subjects.run is None else self.subjects.run.model.name,
            "settings": self.config.model_dump(mode="json"),
            "saes": {judged.name: judged.report for judged in self.judged if not judged.is_control},
            "controls": {judged.name: judged.report for judged in self.judged if judged.is_control},
            "skipped": self.skipped,
            "seconds": self.seconds,
        }

    def _stage(self, name: str, suite: Callable[[], None]) -> None:
        started = time.perf_counter()
        try:
            suite()
        except EvaluationError as problem:
            self.skipped[name] = str(problem)
        self.seconds[name] = round(time.perf_counter() - started, 1)

    def _activations(self) -> None:
        """One pass over held-out text: controls from its first rows, then core sums and codes of every SAE."""
        assert self.subjects.run is not None
        self.source = LiveActivations(self.subjects.run, self.device)
        self.filter = RowFilter(self.subjects.run.buffer, self.source.sites, self.source.special_ids)
        run = self.subjects.run
        wanted = -(-self.config.tokens // run.text.context_length)
        task = self.bar.add_task("held-out activations", total=wanted)
        chunks = self._chunks(wanted)
        first = next(chunks, None)
        if first is None:
            raise EvaluationError(
                f"no held-out text: text.held_out_fraction = {run.text.held_out_fraction} gave no full context; give "
                "more text or raise it"
            )
        if self.config.controls:
            self._add_controls(first)
        meters = [CoreMeter(judged.sae) for judged in self.judged]
        self.tokens: list[Tensor] = []
        for chunk, keep_CT in self._with_first(first, chunks):
            self.tokens += list(chunk.tokens_BT)
            for judged, meter in zip(self.judged, meters, strict=True):
                x_CTD = chunk.activations[judged.site].float()
                mask = keep_CT.to(x_CTD.device)
                if "core" in self.config.suites:
                    meter.add(x_CTD, mask)
                if "correlation" in self.config.suites and not judged.name.endswith("permuted"):
                    with torch.no_grad():
                        codes = Codes.from_dense(judged.sae.encode(x_CTD[mask]).cpu())
                    # A bare copy: the original remembers its sorted pattern, several times its size.
                    judged.codes.append(Codes(codes.offsets, codes.indices, codes.values, codes.n_features))
            self.bar.advance(task, len(chunk.tokens_BT))
        for judged, meter in zip(self.judged, meters, strict=True):
            judged.report["site"] = str(self.source.sites[judged.site])
            if "core" in self.config.suites:
                core = meter.result()
                judged.report["core"], judged.features = core.categories, core.features

    def _chunks(self, wanted: int) -> Iterator[tuple[Chunk, Tensor]]:
        assert self.source is not None
        left = wanted
        for chunk in self.source.chunks(None, held_out=True):
            chunk = Chunk(chunk.tokens_BT[:left], [x[:left] for x in chunk.activations], chunk.position)
            yield chunk, self.filter.mask(chunk)
            left -= len(chunk.tokens_BT)
            if left == 0:
                return

    @staticmethod
    def _with_first(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
        yield first
        yield from rest

    def _add_controls(self, first: tuple[Chunk, Tensor]) -> None:
        """For each site, what has learned nothing at the sparsity of the site's first SAE."""
        chunk, keep_CT = first
        for site, x_CTD in enumerate(chunk.activations):
            subject = next((judged for judged in self.judged if judged.site == site), None)
            if subject is None:
                continue
            x_BD = x_CTD[keep_CT.to(x_CTD.device)].float()[:REFERENCE_ROWS]
            with torch.no_grad():
                l0 = float((subject.sae.encode(x_BD) != 0).sum(-1).double().mean())
            chance = generator(self.config.seed, "controls", site)
            controls = {
                "random": random_control(subject.sae, x_BD, l0, chance),
                "permuted": permuted_control(subject.sae, chance),
                "pca": pca_control(x_BD, l0),
            }
            where = self.subjects.saes[0].name if len(chunk.activations) == 1 else str(self._site(site))
            self.judged += [_Judged(f"{where}: {name}", site, sae) for name, sae in controls.items()]

    def _site(self, index: int) -> Any:
        assert self.source is not None
        return self.source.sites[index]

    def _splice(self) -> None:
        assert self.source is not None
        contexts = torch.stack(self.tokens[: self.config.splice_contexts])
        sites = sorted({judged.site for judged in self.judged})
        task = self.bar.add_task("spliced passes", total=len(sites) * len(contexts))
        for site in sites:
            here = {judged.name: judged for judged in self.judged if judged.site == site}
            keep = _keep_rule(self.filter, site)

            def counted(task: Any = task) -> Iterator[Tensor]:
                for context in contexts:
                    yield context.unsqueeze(0)
                    self.bar.advance(task)

            saes = {name: judged.sae for name, judged in here.items()}
            found = preservation(self.source.model, self.source.sites[site], saes, counted(), keep, self.config.seed)
            for name, categories in found.items():
                core = here[name].report.setdefault("core", {})
                for category, metrics in categories.items():
                    core[category] = core.get(category, {}) | metrics

    def _correlation(self) -> None:
        context = self.subjects.run.text.context_length if self.subjects.run else 128
        with_codes = [judged for judged in self.judged if judged.codes]
        task = self.bar.add_task("correlation", total=len(with_codes))
        by_name = {judged.name: judged for judged in self.judged}
        for judged in with_codes:
            twin = by_name.get(judged.subject.twin or "") if judged.subject else None
            judged.report["correlation"] = evaluate_correlation(
                judged.codes,
                judged.codes[0].n_features,
                twin=None if twin is None else twin.codes,
                fraction=self.config.fraction,
                block_tokens=context,
                replicates=self.config.replicates,
                seed=self.config.seed,
            )
            self.bar.advance(task)

    def _probing(self) -> None:
        assert self.source is not None
        settings = self.config.probing
        scores: dict[str, dict[str, Any]] = {judged.name: {} for judged in self.judged}
        task = self.bar.add_task("probing tasks", total=len(settings.tasks))
        for file in settings.tasks:
            activations, labels = task_activations(self.source.model, file, settings)
            for site, x_BD in enumerate(activations):
                here = {judged.name: judged.sae for judged in self.judged if judged.site == site}
                found = probe_task(here, x_BD.to(self.device), labels, settings.train)
                for name in here:
                    scores[name][file] = {"activations": found["activations"], name: found[name]}
            self.bar.advance(task)
        for judged in self.judged:
            judged.report["probing"] = summarise_probing(scores[judged.name], judged.name, self.config.seed)

    def _absorption(self) -> None:
        assert self.source is not None
        task = self.bar.add_task("first letters", total=len(self.judged))
        spelling = read_spelling(self.source.model, self.config.spelling, self.config.seed)
        for site in sorted({judged.site for judged in self.judged}):
            here = [judged for judged in self.judged if judged.site == site]
            try:
                letters = Letters(spelling, site)
                for judged in here:
                    judged.report["absorption"] = absorption_scores(letters, judged.sae, self.config.seed)
                    self.bar.advance(task)
            except EvaluationError as problem:
                self.skipped[f"absorption at {self._site(site)}"] = str(problem)
                self.bar.advance(task, len(here))

    def _geometry(self) -> None:
        judged_here = [judged for judged in self.judged if not judged.name.endswith("permuted")]
        task = self.bar.add_task("geometry", total=len(judged_here))
        for judged in judged_here:
            W_dec = judged.sae.W_dec.detach().float()
            judged.report["geometry"] = {
                "mean_max_decoder_cosine": max_cosines(W_dec).double().mean().item(),
                "composition_rate": composition_rate(W_dec, self.config.meta_steps, self.config.seed),
                "composition_steps": self.config.meta_steps,
                "agreement": {
                    other.name: seed_agreement(W_dec, other.sae.W_dec.detach())
                    for other in judged_here
                    if other is not judged and _comparable(judged, other)
                },
            }
            self.bar.advance(task)

    def _ground_truth(self) -> None:
        if self.config.world is None:
            raise EvaluationError("no synthetic world was named; give --world for SAEs trained on one")
        world = build_world(self.config.world, self.device)
        if world.d_model != self.judged[0].sae.d_in:
            raise EvaluationError(
                f"world {self.config.world!r} is {world.d_model} wide, the SAE {self.judged[0].sae.d_in}; name the "
                "world the SAE was trained on"
            )
        for judged in self.judged:
            found = evaluate_ground_truth(judged.sae, world, self.config.world_samples, self.config.seed)
            judged.report["ground-truth"] = found.to_dict()


def _comparable(judged: _Judged, other: _Judged) -> bool:
    widths = judged.sae.W_dec.shape[0], other.sae.W_dec.shape[0]
    return judged.site == other.site and not other.is_control and max(widths) <= WIDEST_AGREEMENT


def _keep_rule(rows: RowFilter, site: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The row filter's rule at one site, for contexts that are not counted twice."""

    def keep(tokens_CT: Tensor, x_CTD: Tensor) -> Tensor:
        keep_CT = ~torch.isin(tokens_CT, rows.special_ids.to(tokens_CT.device))
        if rows.config.drop_first_position:
            keep_CT[:, 0] = False
        if rows.config.norm_limit is not None and rows.limits is not None:
            keep_CT &= x_CTD.float().norm(dim=2) <= rows.limits[site]
        return keep_CT

    return keep
