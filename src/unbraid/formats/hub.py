"""SAEs to and from the Hugging Face hub: a repository of SAELens folders with a model card that says what they are.

Each SAE lies in a folder of its name at the root of the repository, which is where SAELens looks for
`SAE.from_pretrained(release=REPOSITORY, sae_id=NAME)`; unbraid reads repositories in any layout it knows. Everything
goes through `huggingface_hub`, so tokens, caches and mirrors are configured as everywhere else.
"""

import dataclasses
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from unbraid.errors import FormatError
from unbraid.files import write_json
from unbraid.formats import open_folder, save
from unbraid.formats.export import open_source
from unbraid.formats.folder import SAEFolder
from unbraid.formats.reading import read_json
from unbraid.formats.registry import files_of
from unbraid.owned_folders import MARKER
from unbraid.progress import Progress, default_console
from unbraid.training.run_folder import RunFolder

WEIGHTS = (
    *("sae_weights.safetensors", "sae.safetensors", "ae.pt", "params.npz", "params.safetensors"),
    "checkpoints/final.safetensors",
)
"""Files that stand for the folder they lie in."""
LOCAL_PATH = re.compile(r"[/~]|\.{1,2}[/\\]|[A-Za-z]:[/\\]|\\\\|file:", re.IGNORECASE)
CARD_METRICS = ("r2", "l0", "correlation_mean", "correlation_top", "dead_fraction")


def push_to_hub(
    source: Path | str,
    repository: str,
    *,
    private: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
    console: Console | None = None,
) -> str:
    """Upload the SAEs of a run, or one SAE folder, with a model card; returns the address of the commit.

    Args:
        source: a run folder (with its metrics, figure and settings) or an SAE folder in any known layout.
        repository: `owner/name`; made if it is not there.
        private: whether a repository made now is private.
        token: access token; `hf auth login`'s by default.
        endpoint: address of the hub or of a mirror; `HF_ENDPOINT` by default.
        console: where progress is shown; a terminal or notebook by default.

    Raises:
        FormatError: there is no SAE at `source`, or the hub refused.
    """
    from huggingface_hub import HfApi

    folders = open_source(source)
    api = HfApi(endpoint=endpoint, token=token)
    with tempfile.TemporaryDirectory() as staging, _hub_errors(repository):
        stage = Path(staging)
        for name, found in folders.items():
            frequency_N = None if found.log10_frequency_N is None else 10.0**found.log10_frequency_N
            metadata = without_local_paths(found.metadata)
            save(found.sae, stage / name, metadata=metadata, frequency_N=frequency_N)
            folders[name] = dataclasses.replace(found, metadata=metadata)
        if (Path(source) / "saes").is_dir():
            _stage_run(RunFolder(Path(source)).path, stage)
        (stage / "README.md").write_text(model_card(repository, folders, stage), encoding="utf-8")
        api.create_repo(repository, private=private, exist_ok=True)
        return _upload(api, repository, stage, f"{len(folders)} sparse autoencoders", console or default_console())


def _upload(api: Any, repository: str, stage: Path, message: str, console: Console) -> str:
    """Every file of `stage` in one commit; its address. Large files go one by one, so that progress can be shown."""
    from huggingface_hub import CommitOperationAdd

    files = sorted(path for path in stage.rglob("*") if path.is_file() and path.name != MARKER)
    sizes = [max(1, path.stat().st_size // 1000) for path in files]
    additions = [CommitOperationAdd(path.relative_to(stage).as_posix(), path) for path in files]
    with _no_bars(), Progress(console, f"uploading to {repository}", sum(sizes), "kB") as progress:
        for addition, size in zip(additions, sizes, strict=True):
            api.preupload_lfs_files(repository, [addition])
            progress.update(min(progress.done + size, sum(sizes) - 1))
        commit = api.create_commit(repository, additions, commit_message=message)
        progress.update(sum(sizes))
    return str(commit.commit_url)


@contextmanager
def _no_bars() -> Iterator[None]:
    """The hub's own progress bars stay out of the way."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    if shown:
        disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def _stage_run(run: Path, stage: Path) -> None:
    """What a run says of itself, without where its files lie on this machine."""
    for name in ("config.json", "summary.json"):
        if (run / name).is_file():
            write_json(stage / name, without_local_paths(read_json(run / name)))
    figure = Path("figures", "figure1.png")
    if (run / figure).is_file():
        (stage / figure).parent.mkdir(exist_ok=True)
        shutil.copyfile(run / figure, stage / figure)


def without_local_paths(data: Any) -> Any:
    """The same JSON data with every path of this machine cut to its last part: what goes to a hub says no more.

    A path is a text that begins like one (`/`, `~`, `./`, `../`, `C:\\`, `file:`) or that exists here.
    """
    if isinstance(data, dict):
        return {key: without_local_paths(value) for key, value in data.items()}
    if isinstance(data, list):
        return [without_local_paths(value) for value in data]
    if isinstance(data, str) and (LOCAL_PATH.match(data) or _exists(data)):
        return re.split(r"[/\\]", data.rstrip("/\\"))[-1]
    return data


def _exists(text: str) -> bool:
    try:
        return ("/" in text or "\\" in text) and Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # no path at all
        return False


def from_hub(
    repository: str,
    name: str | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    cache: Path | str | None = None,
) -> SAEFolder:
    """Download one SAE of a repository, in any layout unbraid knows.

    Args:
        repository: `owner/name`.
        name: folder of the SAE, or its file in layouts with one per file; may be left out where the repository holds
            only one folder.
        revision: branch, tag or commit.
        token: access token, for private and gated repositories.
        endpoint: address of the hub or of a mirror; `HF_ENDPOINT` by default.
        cache: where downloads are kept; the hub cache by default.

    Raises:
        FormatError: no such SAE, the layout is unknown, or the hub refused.
    """
    from huggingface_hub import HfApi, snapshot_download

    with _hub_errors(repository):
        files = HfApi(endpoint=endpoint, token=token).list_repo_files(repository, revision=revision)
        chosen = _choose(repository, files, name)
        local = snapshot_download(
            repository,
            revision=revision,
            token=token,
            endpoint=endpoint,
            cache_dir=cache,
            allow_patterns=files_of(chosen),
        )
    return open_folder(Path(local) / chosen)


def _choose(repository: str, files: list[str], name: str | None) -> str:
    ends = [(f"/{path}", f"/{end}") for path in files for end in WEIGHTS]
    found = sorted({path.removesuffix(end).strip("/") for path, end in ends if path.endswith(end)})
    if name is not None and name.strip("/") in [*found, *files]:
        return name.strip("/")
    if name is None and len(found) == 1:
        return found[0]
    shown = ", ".join(repr(folder) for folder in found[:8]) + (", ..." if len(found) > 8 else "")
    asked = "no SAE was named" if name is None else f"there is no SAE {name!r}"
    raise FormatError(f"{asked} in repository {repository!r}; expected one of {shown or 'none: it holds no SAE'}")


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """Errors of the hub and the network as one readable message."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FormatError(
            f"the upload or download of {repository!r} failed: {reason}; expected a repository you may use, a token "
            "(`hf auth login`) and a connection"
        ) from error


def model_card(repository: str, folders: dict[str, SAEFolder], stage: Path) -> str:
    """The repository's README: what the SAEs are, how good they are, how to load them.

    Args:
        repository: `owner/name`.
        folders: the SAEs by name.
        stage: the staged repository; its summary.json, config.json and figure are used where present.
    """
    summary = read_json(stage / "summary.json").get("saes", {}) if (stage / "summary.json").is_file() else {}
    models = sorted({str(found.metadata["model_name"]) for found in folders.values() if "model_name" in found.metadata})
    header: dict[str, Any] = {"library_name": "unbraid", "tags": ["sparse-autoencoder", "interpretability", "saelens"]}
    if len(models) == 1 and "/" in models[0] and ":" not in models[0]:
        header["base_model"] = models[0]
    first = next(iter(folders))
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in header.items()), "---", ""]
    lines += [f"# {repository.rpartition('/')[2]}", ""]
    lines += [f"Sparse autoencoders trained with `unbraid` on {', '.join(models) or 'a language model'}.", ""]
    if (stage / "figures" / "figure1.png").is_file():
        lines += ["![Training: threshold, correlations, updates, loss](figures/figure1.png)", ""]
    lines += ["## Load", "", "```python", "from unbraid.formats.hub import from_hub", ""]
    lines += [f'sae = from_hub("{repository}", "{first}").sae', "f = sae.encode(x)  # raw activations in", "```", ""]
    lines += ["```python", "from sae_lens import SAE", ""]
    lines += [f'sae = SAE.from_pretrained(release="{repository}", sae_id="{first}")', "```", ""]
    lines += ["## What is here", "", _table(folders, summary), ""]
    if summary:
        lines += [
            "Measured on held-out text; top correlation is the mean of the most correlated 0.1 % of pairs or the "
            "fraction given in config.json.",
            "",
        ]
    if (stage / "config.json").is_file():
        lines += ["`config.json` holds every setting of the run; `summary.json` all its metrics.", ""]
    return "\n".join(lines)


def _table(folders: dict[str, SAEFolder], summary: dict[str, Any]) -> str:
    metrics = [metric for metric in CARD_METRICS if any(metric in summary.get(name, {}) for name in folders)]
    head = ["SAE", "architecture", "features", "reads", *metrics]
    rows = [head, ["---"] * len(head)]
    for name, found in folders.items():
        hook = str(found.metadata.get("hook_name", found.metadata.get("hookpoint", "")))
        row = [f"`{name}`", found.sae.architecture, f"{found.sae.n_features:,}", f"`{hook}`" if hook else ""]
        values = (summary.get(name, {}).get(metric) for metric in metrics)
        rows.append(row + ["" if value is None else f"{value:.4g}" for value in values])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
