"""The promises of the packaging: few dependencies, all declared; pins that match."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

from unbraid.training.loggers import LOGGERS

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "unbraid").rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Only where a user asked for them: a logger, a GPU kernel compiler that torch brings itself, other SAE libraries.
DISTRIBUTED_AS = {"yaml": "pyyaml"}
"""Modules whose package has another name."""
OPTIONAL_IMPORTS = {"wandb", "tensorboard", "trackio", "triton", "starlette", "uvicorn"}


def distribution(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9_.-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def imported_packages(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"unbraid"}


def pins(path: Path) -> dict[str, str]:
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return dict(tuple(line.partition(";")[0].strip().split("==")) for line in lines if line)


def test_every_third_party_import_is_a_declared_dependency():
    declared = {distribution(requirement) for requirement in PROJECT["dependencies"]}
    names = {name for path in SOURCES for name in imported_packages(path)}
    imported = {DISTRIBUTED_AS.get(name, name).lower().replace("_", "-") for name in names}
    assert imported - {name.replace("_", "-") for name in OPTIONAL_IMPORTS} <= declared


def test_the_base_install_has_no_logger_plot_server_or_notebook():
    unwanted = {
        "wandb",
        "tensorboard",
        "trackio",
        "plotly",
        "dash",
        "gradio",
        "streamlit",
        "jupyter",
        "notebook",
        "ipykernel",
    }
    assert not unwanted & {distribution(requirement) for requirement in PROJECT["dependencies"]}
    assert len(PROJECT["dependencies"]) <= 21


def test_every_logger_is_an_extra_and_all_holds_them_and_the_live_page():
    extras = PROJECT["optional-dependencies"]
    (everything,) = extras["all"]
    names = sorted(LOGGERS)
    assert sorted(set(extras) - {"dev", "all", "live"}) == names
    assert sorted(everything.removeprefix("unbraid[").removesuffix("]").split(",")) == sorted([*names, "live"])
    assert all(distribution(extras[name][0]) == name for name in names)


def test_what_is_installed_is_what_constraints_pin():
    wrong = {}
    for name, version in pins(ROOT / "constraints.txt").items():
        try:
            installed = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
        if installed != version:
            wrong[name] = (installed, version)
    assert not wrong, "run `make setup`"


def test_development_tools_are_pinned_to_the_same_version_in_both_places():
    constraints = {name.lower().replace("_", "-"): version for name, version in pins(ROOT / "constraints.txt").items()}
    for requirement in PROJECT["optional-dependencies"]["dev"]:
        name, version = requirement.split("==")
        assert constraints[distribution(name)] == version, requirement
