"""What is evaluated: the SAEs of a run or one SAE folder, with the language model and held-out text they belong to.

A run says everything itself, also about a single one of its SAEs. Another SAE folder, in any layout, says at most which
model and site it was trained on; the rest comes from the settings of the evaluation.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unbraid import formats
from unbraid.config import EvaluationConfig, RunConfig, overridden
from unbraid.errors import ConfigError, EvaluationError, FormatError
from unbraid.evaluation.origin import CentredInput, has_layer_norm, is_centred, origin, output_site
from unbraid.sae import Codes
from unbraid.sites import HANDED_IN, Site
from unbraid.training.run_folder import RunFolder, is_run


@dataclass(eq=False)
class EvaluatedSAE:
    """An SAE or a control, and what has been found about it.

    Attributes:
        name: folder name.
        sites: indices of what it reads among the sites of the run.
        sae: acting on raw activations.
        twin: name of the SAE trained alike at lambda2 = 0, if there is one.
        control: which control it is; None for an SAE.
        report: results by suite.
        codes: of held-out tokens, in chunks, for the correlation suite.
        features: `[N]` numbers by name.
        outputs: the sites that a transcoder predicts; none for an SAE, which reconstructs what it reads.
        centred: whether the SAE was made for activations without their mean over the width.
        unknown: why its activations cannot be had again; None where they can.
        variant: of the run that it belongs to.
    """

    name: str
    sites: tuple[int, ...]
    sae: Any
    twin: str | None = None
    control: str | None = None
    report: dict[str, Any] = field(default_factory=dict)
    codes: list[Codes] = field(default_factory=list)
    features: dict[str, Tensor] = field(default_factory=dict)
    outputs: tuple[Site, ...] = ()
    centred: bool = False
    unknown: str | None = None
    variant: str | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it reconstructs the one site it reads."""
        predicts_another = bool(self.outputs) or getattr(self.sae, "is_transcoder", False)
        return len(self.sites) == 1 and not predicts_another

    def require_one_site(self) -> None:
        """Refuse a dictionary of several sites.

        Raises:
            EvaluationError: naming it.
        """
        if max(len(self.sites), len(self.outputs)) > 1:
            raise EvaluationError(
                f"{self.name} stands on several sites; expected dictionaries that read one site and predict one here; "
                "use its codes in Python, with unbraid.load, or look at `unbraid dashboard`"
            )

    @property
    def has_own_features(self) -> bool:
        """Not so a permuted decoder: it has the codes and the directions of its SAE, differently combined."""
        return self.control != "permuted"


def open_subjects(
    path: Path | str,
    config: EvaluationConfig,
    device: torch.device,
    trust_remote_code: bool = False,
    transcoders: bool = False,
) -> tuple[list[EvaluatedSAE], RunConfig | None]:
    """The SAEs at `path`, and the settings under which their activations can be had again, None where unknown.

    Args:
        path: a run folder, the folder of one of its SAEs, any other SAE folder, or a name that `unbraid.load` takes.
        config: says what an SAE folder does not.
        device: where the SAEs go.
        trust_remote_code: allow a run's settings to run code that comes with the model.
        transcoders: place transcoders in their model as well; otherwise their model stays unknown.

    Raises:
        ConfigError: the settings ask for the model's own code and nobody allowed it.
        EvaluationError: the run has no finished SAE yet.
        FormatError: there is neither a run nor an SAE.
    """
    path = formats.path_or_name(path)
    if isinstance(path, str):
        return _of_folder(path, config, device, transcoders)
    if is_run(path):
        return _of_run(RunFolder(path, trust_remote_code), None, config, device)
    run = path.resolve().parent.parent
    if path.resolve().parent.name == "saes" and is_run(run):
        return _of_run(RunFolder(run, trust_remote_code), path.resolve().name, config, device)
    return _of_folder(path, config, device, transcoders)


def centre_where_needed(subjects: list[EvaluatedSAE], model: nn.Module) -> None:
    """SAEs made for activations without their mean get them so, where the model is one that cannot see the mean."""
    for one in subjects:
        if one.centred and has_layer_norm(model):
            one.sae, one.centred = CentredInput(one.sae), False


def _completed(run: RunConfig, config: EvaluationConfig, path: Path) -> RunConfig:
    """A run's settings, with the model and text given now in the place of those that were handed to it in Python.

    Raises:
        ConfigError: something was given that the run says itself.
    """
    open_to = {"model": run.model.name == HANDED_IN, "site": False, "text": run.text.source == HANDED_IN}
    given = [name for name in open_to if config.is_given((name,)) and getattr(config, name)]
    others = [name for name in given if not open_to[name]]
    if others:
        raise ConfigError(
            f"{' and '.join(others)} of an evaluation {'is' if len(others) == 1 else 'are'} read for an SAE folder "
            f"from elsewhere; {str(path)!r} belongs to a run, whose own settings say which model, sites and held-out "
            "text; drop what was given, or copy the SAE's folder out of the run"
        )
    changes: dict[str, Any] = {"model.name": config.model} if "model" in given else {}
    if "text" in given:
        changes |= {f"text.{name}": value for name, value in config.text.model_dump(exclude_unset=True).items()}
    return overridden(run, changes, "eval")[0] if changes else run


def _of_run(
    folder: RunFolder, only: str | None, config: EvaluationConfig, device: torch.device
) -> tuple[list[EvaluatedSAE], RunConfig]:
    path, run = folder.path, _completed(folder.config, config, folder.path)
    subjects, twins = [], run.twins
    for name, (route, variant) in run.dictionaries.items():
        if only not in (None, name):
            continue
        if not (path / "saes" / name).is_dir():
            raise EvaluationError(
                f"{path} holds no finished SAE {name!r}; expected saes/{name}; end the run with `unbraid resume {path}`"
            )
        sae, sites = formats.load(path / "saes" / name).to(device), tuple(map(run.sites.index, route.inputs))
        outputs = route.outputs if route.is_transcoder else ()
        subjects.append(EvaluatedSAE(name, sites, sae, twins.get(name), outputs=outputs, variant=variant))
    return subjects, run


def _of_folder(
    path: Path | str, config: EvaluationConfig, device: torch.device, transcoders: bool
) -> tuple[list[EvaluatedSAE], RunConfig | None]:
    try:
        found = formats.open_folder(path)
    except FormatError as problem:
        if isinstance(path, str) or not path.exists():
            raise
        raise FormatError(f"{str(path)!r} is no run folder (config.json beside saes/), and {problem}") from None
    subject = EvaluatedSAE(formats.folder_name(path), (0,), found.sae.to(device))
    try:
        run = origin(found.metadata, config, transcoders)
    except EvaluationError as problem:
        subject.unknown = str(problem)
        return [subject], None
    written = output_site(found.metadata)
    subject.outputs = () if written is None else (written,)
    subject.centred = is_centred(found.metadata, run.sites[0])
    return [subject], run
