"""From a run folder to a model with its dictionaries: `unbraid.features("runs/demo")`.

Held-out codes are computed when first needed and kept in the run folder, so maxima, contexts and partners are there at
once the next time. The file says which weights it is of; one of other weights is computed again.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sparse
import torch
from rich.console import Console

from unbraid.activations.live import LiveActivations
from unbraid.bundled import bundled_folder, is_bundled
from unbraid.config import EvaluationConfig, RunConfig
from unbraid.device import pick_device
from unbraid.errors import FeatureError
from unbraid.feature_model.held_out import HeldOut
from unbraid.feature_model.model import FeatureModel
from unbraid.feature_model.stored_held_out import FILE as STORED
from unbraid.feature_model.stored_held_out import load_held_out
from unbraid.files import write_whole_tensors
from unbraid.formats import path_or_name
from unbraid.json_files import is_number, parse_json
from unbraid.progress import Progress
from unbraid.reporting.dashboard.passes import HeldOutPass, held_out_pass
from unbraid.sites import ARROW
from unbraid.training.run_folder import is_run

FILE = "held_out.safetensors"
TOKENS = 16_384
VERSION = 1


def features(
    run: Any,
    *,
    device: str = "auto",
    tokens: int = TOKENS,
    console: Console | None = None,
    trust_remote_code: bool = False,
) -> FeatureModel:
    """The model of a run with all its dictionaries attached, and the run's held-out text.

    Args:
        run: a run folder, the folder of one of its SAEs, another SAE folder that says its model and site, a name that
            `unbraid.load` takes, or a `Run`.
        device: where the model and dictionaries go.
        tokens: held-out token rows for maxima, contexts and partners.
        console: where progress is shown; standard error by default.
        trust_remote_code: allow a run's settings to run code that comes with the model.

    Raises:
        UnbraidError: there is no finished dictionary, or its model or site is unknown or not there.

    Example:
        >>> fm = features("runs/tiny")
        >>> fm.contexts("resid_post.1_twin/14", k=2)
        resid_post.1_twin/14: fires on ...
    """
    from unbraid.evaluation.subjects import centre_where_needed, open_subjects

    if tokens < 1:
        raise FeatureError(f"tokens = {tokens}; expected at least 1")
    path = path_or_name(getattr(run, "path", run))
    place = pick_device(device)
    subjects, config = open_subjects(path, EvaluationConfig(), place, trust_remote_code, transcoders=True)
    if config is None:
        raise FeatureError(
            f"{str(path)!r} cannot be placed in a model: {subjects[0].unknown}; expected a run folder, or SAELens "
            "metadata with model_name and hook_name; build FeatureModel(hf_model, tokenizer, {site: sae}) yourself"
        )
    source = LiveActivations(config, place)
    centre_where_needed(subjects, source.model.model)
    for one in subjects:
        one.require_one_site()
    ends = {one.name: [config.sites[one.sites[0]], *one.outputs] for one in subjects}
    sites = {name: ARROW.join(map(str, places)) for name, places in ends.items()}
    saes = {one.name: one.sae for one in subjects}
    twins = {name: twin for name, twin in config.twins.items() if name in saes and twin in saes}
    kept = path / FILE if isinstance(path, Path) and is_run(path) else None
    console = console or Console(stderr=True, soft_wrap=True, emoji=False)

    def held_out(fm: FeatureModel) -> HeldOut:
        if is_bundled(path) and tokens == TOKENS:
            stored = bundled_folder(str(path)) / STORED
            return load_held_out(stored, next(iter(saes)), fm.tokenizer, console)
        return _held_out(fm, config, source, tokens, kept, place, console)

    language_model = source.model
    fm = FeatureModel(
        language_model.model,
        language_model.tokenizer,
        saes,
        sites=sites,
        held_out=held_out,
        twins=twins,
        bos=source.prepends_bos,
    )
    if is_bundled(path) or (kept is not None and kept.is_file()):
        _ = fm.held_out  # It is read from a file, and with it every table has words and shares of maxima.
    return fm


def _held_out(
    fm: FeatureModel,
    config: RunConfig,
    source: LiveActivations,
    tokens: int,
    kept: Path | None,
    device: torch.device,
    console: Console,
) -> HeldOut:
    identity = _identity(fm, config, tokens)
    widths = {name: one.n_features for name, one in fm.dictionaries.items()}
    if kept is not None and (found := _load(kept, identity, widths)) is not None:
        return found
    sites = [str(site) for site in config.sites]
    located = {name: ((sites.index(one.site.partition(ARROW)[0]),), one.sae) for name, one in fm.dictionaries.items()}
    with Progress(console, "held-out text for maxima, contexts and partners", tokens, "rows") as progress:
        told = lambda done, _: progress.update(done)  # noqa: E731
        seen = held_out_pass(config, source, located, tokens, device, told)  # pyright: ignore[reportArgumentType]
    made = HeldOut(seen, seen.norms, np.full(len(seen.tokens_CT), seen.tokens_CT.shape[1]))
    if kept is not None:
        _save(made, kept, identity, console)
    return made


def _identity(fm: FeatureModel, config: RunConfig, tokens: int) -> str:
    """A digest of the model, the text and the dictionaries' weights."""
    digest = hashlib.blake2b(digest_size=16)
    settings = [VERSION, tokens, config.model.model_dump(mode="json"), config.text.model_dump(mode="json")]
    digest.update(json.dumps([*settings, config.buffer.model_dump(mode="json")], sort_keys=True).encode())
    for name, one in sorted(fm.dictionaries.items()):
        digest.update(f"{name} {one.site} {tuple(one.W_dec.shape)}".encode())
        for _, weight in sorted(one.sae.state_dict().items()):
            digest.update(weight.detach().flatten()[:: max(1, weight.numel() // 4096)].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _save(made: HeldOut, path: Path, identity: str, console: Console) -> None:
    from safetensors.numpy import save_file

    if os.path.lexists(path) and "identity" not in _metadata(path):
        why = f"the held-out codes are not kept: {str(path)!r} was not written by unbraid; move it away"
        console.print(why, highlight=False, markup=False)
        return
    arrays = {"tokens_CT": made.seen.tokens_CT, "context_R": made.seen.context_R, "position_R": made.seen.position_R}
    for name, codes in made.seen.codes.items():
        arrays |= {f"{name}/indptr": codes.indptr, f"{name}/indices": codes.indices, f"{name}/data": codes.data}
    shapes = {name: codes.shape for name, codes in made.seen.codes.items()}
    metadata = {"identity": identity, "norms": json.dumps(made.norms), "shapes": json.dumps(shapes)}
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    try:
        write_whole_tensors(path, lambda partial: save_file(whole, partial, metadata=metadata))
    except OSError as problem:
        why = f"the held-out codes are not kept: {str(path)!r} cannot be written ({problem.strerror})"
        console.print(why, highlight=False, markup=False)


def _metadata(path: Path) -> dict[str, str]:
    """What the file says of itself; nothing where it is none of ours."""
    from safetensors import SafetensorError, safe_open

    if path.is_symlink() or not path.is_file():
        return {}
    try:
        with safe_open(path, "np") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def _load(path: Path, identity: str, widths: dict[str, int]) -> HeldOut | None:
    """What the file holds, if it is whole, of these weights, and something such a pass could have seen."""
    from safetensors import SafetensorError, safe_open

    if _metadata(path).get("identity") != identity:
        return None
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata()
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        tokens_CT, context_R, position_R = (arrays[name] for name in ("tokens_CT", "context_R", "position_R"))
        shapes, norms = (parse_json(metadata[name], ValueError) for name in ("shapes", "norms"))
        contexts, length = tokens_CT.shape
        codes = {
            name: sparse.csc_array(
                (arrays[f"{name}/data"], arrays[f"{name}/indices"], arrays[f"{name}/indptr"]), shape=tuple(shapes[name])
            )
            for name in widths
        }
        for one in codes.values():
            one.check_format(full_check=True)  # the file may come from anywhere, and scipy trusts its indices
        sound = (
            context_R.shape == position_R.shape == (len(context_R),)
            and all(array.dtype.kind in "iu" for array in (tokens_CT, context_R, position_R))
            and all(
                ((array >= 0) & (array < end)).all() for array, end in ((context_R, contexts), (position_R, length))
            )
            and all(codes[name].shape == (len(context_R), width) for name, width in widths.items())
            and all(one.dtype.kind == "f" and np.isfinite(one.data).all() for one in codes.values())
            and all(is_number(norms[name]) for name in widths)
        )
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, IndexError):
        return None
    if not sound:
        return None
    seen = HeldOutPass(tokens_CT, context_R, position_R, codes, norms)
    return HeldOut(seen, norms, np.full(contexts, length))
