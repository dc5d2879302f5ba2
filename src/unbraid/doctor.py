"""`unbraid doctor`: what this machine has of what a run needs, and the command for what is missing."""

import importlib.metadata
import importlib.util
import platform
import shutil

import torch
from rich.console import Console

from unbraid.text.cache_folder import cache_root

NEEDED = ["torch", "transformers", "datasets", "safetensors", "pydantic", "tyro", "matplotlib"]
INSTALL_PACKAGED = "pip install --no-deps -r requirements/packaged.txt"


def report(console: Console) -> bool:
    """Print the findings; True when `unbraid train demo` can run."""
    from unbraid import __version__
    from unbraid.activations.packaged_model import MODELS, find_packaged_model
    from unbraid.text.packaged import find_packaged_corpus

    rows: list[tuple[str, str, bool]] = [("unbraid", f"{__version__} on Python {platform.python_version()}", True)]
    for name in NEEDED:
        version = _version(name)
        rows.append((name, version or "missing; pip install unbraid", version is not None))
    model, gemma, corpus = find_packaged_model(), find_packaged_model("gemma3"), find_packaged_corpus()
    rows.append(("packaged model", str(model[0]) if model else f"missing; {INSTALL_PACKAGED}", model is not None))
    terms = f"not installed, and nothing needs it; `make gemma` brings it; {MODELS['gemma3'].terms}"
    rows.append(("packaged:gemma3", str(gemma[0].parent) if gemma else terms, True))
    for name, place in corpus:
        rows.append((f"text of {name}", str(place) if place else f"missing; {INSTALL_PACKAGED}", place is not None))
    rows.append(("device", _device(), True))
    cache = cache_root()
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    rows.append(("cache folder", f"{cache} ({shutil.disk_usage(existing).free / 2**30:,.0f} GiB free)", True))

    width = max(len(name) for name, _, _ in rows)
    for name, finding, good in rows:  # lines, not a table, which would cut or fold a path that is to be copied
        line = f"{'ok' if good else 'missing':7}  {name:{width}}  {finding}"
        console.print(line, style=None if good else "red", highlight=False, markup=False, soft_wrap=True)
    return all(good for _, _, good in rows)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device() -> str:
    threads = f"cpu with {torch.get_num_threads()} threads"
    if not torch.cuda.is_available():
        return f"{threads}; no CUDA device"
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)} ({memory:,.0f} GiB); {threads}"
