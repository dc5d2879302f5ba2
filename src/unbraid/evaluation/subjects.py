"""What is judged: the SAEs of a run or one SAE folder, with the language model and held-out text they belong to.

A run says everything itself. An SAE folder in any layout says at most which model and site it was trained on; the rest
comes from the settings of the evaluation.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from unbraid import formats
from unbraid.config import EvaluationConfig, ModelConfig, RunConfig, load_config
from unbraid.errors import EvaluationError
from unbraid.formats.sae_lens import site_of
from unbraid.sae import SAE


@dataclass(frozen=True, eq=False)
class Subject:
    """One SAE to judge.

    Attributes:
        name: folder name.
        site: index of its site among the sites of the run.
        sae: acting on raw activations.
        twin: name of the SAE trained alike at lambda2 = 0, if there is one.
    """

    name: str
    site: int
    sae: SAE
    twin: str | None = None


@dataclass(frozen=True, eq=False)
class Subjects:
    """SAEs and the settings under which their activations can be had again; `run` is None where those are unknown."""

    saes: list[Subject]
    run: RunConfig | None


def open_subjects(path: Path, config: EvaluationConfig, device: torch.device) -> Subjects:
    """The SAEs at `path`, a run folder or an SAE folder.

    Raises:
        EvaluationError: the run has no finished SAE yet.
        FormatError: there is neither a run nor an SAE.
    """
    if (path / "config.json").is_file() and ((path / "saes").is_dir() or (path / "checkpoints").is_dir()):
        return _of_run(path, device)
    return _of_folder(path, config, device)


def _of_run(path: Path, device: torch.device) -> Subjects:
    run = load_config(path / "config.json")
    saes, twins = [], run.twins
    for index, site in enumerate(run.sites):
        for variant in run.variants:
            name = run.sae_name(site, variant)
            if not (path / "saes" / name).is_dir():
                raise EvaluationError(
                    f"{path} holds no finished SAE {name!r}; expected saes/{name}; end the run with "
                    f"`unbraid resume {path}`"
                )
            saes.append(Subject(name, index, formats.load(path / "saes" / name).to(device), twins.get(name)))
    return Subjects(saes, run)


def _of_folder(path: Path, config: EvaluationConfig, device: torch.device) -> Subjects:
    found = formats.open_folder(path)
    subject = Subject(path.resolve().name, 0, found.sae.to(device))
    model = config.model or found.metadata.get("model_name")
    site = config.site or site_of(str(found.metadata.get("hook_name", "")))
    if model is None or site is None:
        return Subjects([subject], None)
    context = found.metadata.get("context_size")
    text = config.text if not isinstance(context, int) else config.text.model_copy(update={"context_length": context})
    return Subjects([subject], RunConfig(model=ModelConfig(name=str(model), sites=[site]), text=text))
