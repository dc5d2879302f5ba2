"""What a dashboard is about: the SAEs of a run, or one SAE from anywhere, with the settings of its model and text."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from unbraid.config import EvaluationConfig, RunConfig, TextConfig, overridden
from unbraid.errors import ConfigError, UnbraidError
from unbraid.evaluation.said import said_by_hand
from unbraid.formats import folder_name
from unbraid.formats.export import open_source
from unbraid.reporting.dashboard.labels import Labels
from unbraid.reporting.training_log import TrainingLog
from unbraid.training.run_folder import RunFolder, is_run

LABELS = "labels.json"
FOLDERS = Path("dashboards")


@dataclass
class Shown:
    """Everything a dashboard is made from beside the activations.

    Attributes:
        config: how the activations can be had again.
        saes: name -> (indices of the sites it reads, SAE on raw activations).
        twins: name -> name of the twin, both among `saes`.
        title: what the first page is called.
        summary, log: of a run; nothing of an SAE from elsewhere.
        commands: what to type to serve this dashboard, and for the live page.
        labels_file: where labels, notes and lists are kept; labels: what it holds.
        centred: names of SAEs made for activations without their mean.
    """

    config: RunConfig
    saes: dict[str, tuple[tuple[int, ...], Any]]
    twins: dict[str, str] = field(default_factory=dict)
    title: str = ""
    summary: dict[str, Any] = field(default_factory=dict)
    log: TrainingLog | None = None
    commands: dict[str, str] = field(default_factory=dict)
    labels_file: Path = Path(LABELS)
    labels: Labels = field(default_factory=Labels)
    centred: list[Any] = field(default_factory=list)

    @property
    def steps(self) -> dict[str, int] | None:
        """Planned and executed; None where nothing was trained here."""
        if self.log is None:
            return None
        return self.summary.get("steps", {"planned": self.config.steps, "executed": int(self.log.step[-1])})

    def labels_of(self, name: str) -> tuple[str, str]:
        """Site and variant of an SAE."""
        if self.log is None:
            return str(self.config.sites[self.saes[name][0][0]]), ""
        route, variant = self.config.dictionaries[name]
        return str(route), variant

    def centre(self, model: Any) -> None:
        """SAEs made for activations without their mean get them so, where `model` cannot see the mean."""
        from unbraid.evaluation.subjects import centre_where_needed

        centre_where_needed(self.centred, model)
        self.saes |= {one.name: (one.sites, one.sae) for one in self.centred}


def is_a_run(source: Path | str) -> bool:
    """Whether a dashboard of `source` is one of a whole run."""
    return isinstance(source, Path) and is_run(source)


def default_place(source: Path | str) -> Path:
    """Where a dashboard is written when nobody says."""
    return Path(source) / "report" if is_a_run(source) else FOLDERS / folder_name(source)


def labels_place(source: Path | str, final: Path) -> Path:
    """Where labels are kept: in the run, or beside the dashboard, which is replaced as a whole."""
    return Path(source) / LABELS if is_a_run(source) else final.parent / f"{final.name}.{LABELS}"


def describe_text(text: TextConfig) -> str:
    """Where contexts come from, in a few words."""
    named = text.dataset if text.source == "hub" else ", ".join(text.paths) if text.source == "files" else ""
    return f"{text.source} {named}".strip()


def open_shown(
    source: Path | str,
    final: Path,
    device: torch.device,
    *,
    model: str | None = None,
    site: str | None = None,
    text: str | list[str] | None = None,
    trust_remote_code: bool = False,
) -> Shown:
    """What a dashboard of `source` shows; see `write_dashboard`."""
    given = said_by_hand(model, site, text)
    settings = overridden(EvaluationConfig(), given, "dashboard")[0]
    shown = (
        _of_run(Path(source), given, device, trust_remote_code)
        if is_a_run(source)
        else _of_sae(source, settings, device, trust_remote_code)
    )
    typed = shlex.quote(str(source))
    out = "" if final == default_place(source) else f" --out {shlex.quote(str(final))}"
    shown.commands = {
        "serve": f"unbraid dashboard {typed}{out} --serve",
        "live": "" if given.keys() & {"model", "site"} else f"unbraid live {typed}",
    }
    shown.labels_file = labels_place(source, final)
    shown.labels = Labels.read(shown.labels_file)
    return shown


def _of_run(path: Path, given: dict[str, Any], device: torch.device, trust_remote_code: bool) -> Shown:
    if given:
        names = ", ".join(sorted({name.partition(".")[0] for name in given}))
        raise ConfigError(
            f"{names} was given for {str(path)!r}, a run, whose own settings say which model, sites and held-out text; "
            "expected nothing; drop it, or name an SAE's folder copied out of the run"
        )
    folder = RunFolder(path, trust_remote_code)
    config = folder.config
    found = {name: one.sae for name, one in open_source(path).items()}
    log = TrainingLog.read(folder.metrics)
    places = {name: tuple(map(config.sites.index, route.inputs)) for name, (route, _) in config.dictionaries.items()}
    saes = {name: (places[name], found[name].to(device)) for name in log.names if name in found and name in places}
    twins = {name: twin for name, twin in config.twins.items() if name in saes and twin in saes}
    return Shown(config, saes, twins, f"Run {config.name}", folder.read_summary(), log)


def _of_sae(source: Path | str, settings: EvaluationConfig, device: torch.device, trust_remote_code: bool) -> Shown:
    from unbraid.evaluation.subjects import open_subjects

    subjects, config = open_subjects(source, settings, device, trust_remote_code)
    if config is None:
        raise UnbraidError(
            f"no dashboard of {str(source)!r}: {subjects[0].unknown}; expected an SAE whose model and site are known"
        )
    twins = {one.name: one.twin for one in subjects if one.twin is not None}
    saes = {one.name: (one.sites, one.sae) for one in subjects}
    known = {name: twin for name, twin in twins.items() if twin in saes}
    return Shown(config, saes, known, f"SAE {folder_name(source)}", centred=subjects)
