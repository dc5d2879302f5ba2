"""`evaluation.json`, in which the suites of several evaluations of the same weights come together.

Suites are run one by one as often as all at once, and a probing run must not cost the hour of core metrics before it.
So each suite stands with the settings it ran under, and one that is not run again stays, unless the weights changed.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from unbraid.config.measuring import suite_names
from unbraid.errors import EvaluationError
from unbraid.evaluation.subjects import EvaluatedSAE
from unbraid.files import held, write_json, write_whole_tensors
from unbraid.json_files import finite, read_json_object

Report = dict[str, Any]
WRITTEN_BY = {"written_by": "unbraid eval"}
"""Metadata of evaluation_features.safetensors, which is replaced only where it has this."""


class EvaluationFile:
    """What an earlier evaluation left in `folder`, and where this one goes.

    Args:
        folder: holds evaluation.json and evaluation_features.safetensors.
        subjects: the SAEs this evaluation is about.

    Raises:
        EvaluationError: there is an evaluation.json that cannot be read, or a file of that name that no evaluation
            wrote.
    """

    def __init__(self, folder: Path, subjects: Sequence[EvaluatedSAE]):
        self.folder = folder
        self.path, self.features_path = folder / "evaluation.json", folder / "evaluation_features.safetensors"
        self.weights = _checksum(subjects)
        self.earlier: Report = {}
        self._read()

    def write(self, report: Report, subjects: Sequence[EvaluatedSAE]) -> tuple[Report, list[str]]:
        """Write `report` with the earlier suites that were not run again; returns what was written and their names.

        What is there is read only now and held until it is written, so that evaluations at the same time, each of its
        own suites, all end up in the file.

        Raises:
            EvaluationError: the file cannot be read or written, or another process holds it for a minute.
        """
        try:
            with held(self.folder, wait=60.0):
                found = self._read()
                self.earlier = found if found.get("weights") == self.weights else {}
                return self._merge(report, subjects)
        except BlockingIOError:
            raise EvaluationError(
                f"{str(self.folder)!r} is held by another process; expected training or another evaluation there to "
                "end within a minute; wait for it, then repeat this command"
            ) from None
        except OSError as problem:
            raise EvaluationError(
                f"cannot write {str(self.path)!r}: {problem.strerror or problem}; expected a writable folder with "
                "free space"
            ) from problem

    def _read(self) -> Report:
        """What is there now; both files may be replaced."""
        there = self.path.exists()
        found = read_evaluation(self.path) if there else {}
        others = [self.features_path] if _is_of_others(self.features_path) else []
        if there and not {"saes", "weights"} <= found.keys():
            others.insert(0, self.path)
        if others:
            raise EvaluationError(
                f"{str(others[0])!r} was not written by an evaluation; expected a folder without it; move it away"
            )
        return found

    def _merge(self, report: Report, subjects: Sequence[EvaluatedSAE]) -> tuple[Report, list[str]]:
        earlier = self.earlier.get("settings", {})
        suites = list(dict.fromkeys((*suite_names(), *earlier)))  # a plugin's may be there without the plugin
        kept = [suite for suite in suites if suite in earlier and suite not in report["settings"]]
        for kind in ("saes", "controls"):
            for name, before in self.earlier.get(kind, {}).items():
                sections = {suite: before[suite] for suite in kept if suite in before}
                if sections or name in report[kind]:
                    now = {"site": before.get("site")} | sections | report[kind].get(name, {})
                    report[kind][name] = {key: now[key] for key in ("site", *suites) if key in now}
        for suite, reason in self.earlier.get("skipped", {}).items():
            if suite.partition(" at ")[0] in kept:
                report["skipped"][suite] = reason
        for table in ("settings", "seconds"):
            report[table] = self.earlier.get(table, {}) | report[table]
        report = finite(report | {"weights": self.weights})
        write_json(self.path, report)
        self._write_features(subjects)
        return report, kept

    def _write_features(self, subjects: Sequence[EvaluatedSAE]) -> None:
        features = {f"{one.name}.{key}": x.contiguous() for one in subjects for key, x in one.features.items()}
        if features:
            features = self._earlier_features() | features
            write_whole_tensors(self.features_path, lambda partial: save_file(features, partial, WRITTEN_BY))
        elif not self.earlier:
            self.features_path.unlink(missing_ok=True)

    def _earlier_features(self) -> dict[str, Tensor]:
        if not self.earlier or not self.features_path.is_file():
            return {}
        try:
            return load_file(self.features_path)
        except SafetensorError as problem:
            raise EvaluationError(
                f"{str(self.features_path)!r} cannot be read ({problem}); expected what an earlier evaluation wrote; "
                "move it away"
            ) from problem


def _is_of_others(features: Path) -> bool:
    """Whether a file of features is none that an evaluation wrote; version 0.1 left no word in it."""
    try:
        with safe_open(features, "pt") as file:
            of_0_1 = any(name.endswith(".feature_density") for name in file.keys())  # noqa: SIM118
            return not of_0_1 and (file.metadata() or {}) != WRITTEN_BY
    except FileNotFoundError:
        return features.is_symlink()
    except (SafetensorError, OSError):
        return True


def read_evaluation(path: Path) -> Report:
    """What `path` holds; nothing where there is no such file.

    Raises:
        EvaluationError: it cannot be read.
    """
    if not path.exists():
        return {}
    report = read_json_object(path, EvaluationError, "an earlier evaluation; move it away")
    problem = _problem(report)
    if problem is not None:
        raise EvaluationError(f"{path}: {problem}; expected an earlier evaluation; move it away")
    return report


def _problem(report: Report) -> str | None:
    """What about an evaluation nobody could have written; None for a good one."""
    for table in ("saes", "controls", "settings", "seconds", "skipped"):
        if not isinstance(report.get(table, {}), dict):
            return f"{table} is {report[table]!r}"
    suites = (*suite_names(), *report.get("settings", {}))
    for kind in ("saes", "controls"):
        for name, sections in report.get(kind, {}).items():
            if not isinstance(sections, dict):
                return f"{kind}.{name} is {sections!r}"
            if not all(isinstance(sections[suite], dict) for suite in suites if suite in sections):
                return f"{kind}.{name} has a suite that is no object"
    return None


def _checksum(subjects: Sequence[EvaluatedSAE]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for one in subjects:
        digest.update(one.name.encode())
        for name, tensor in one.sae.state_dict().items():
            content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(f"{name}{tuple(tensor.shape)}".encode() + content.numpy().tobytes())
    return digest.hexdigest()
