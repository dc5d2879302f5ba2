"""A run's dictionaries in another layout, all of them or none."""

from pathlib import Path

from unbraid.errors import FormatError
from unbraid.formats import (
    circuit_tracer_clt,
    folder_name,
    is_transcoder_set,
    open_folder,
    path_or_name,
    sae_folders_in,
    transcoder_set,
    writable_layout,
)
from unbraid.formats.folder import SAEFolder, check_sae_folder
from unbraid.sites import AND
from unbraid.training.run_folder import RunFolder, is_run


def export(source: Path | str, to: str, out: Path | str, *, overwrite: bool = False) -> list[Path]:
    """Write every dictionary of a run (or the one of an SAE folder) into `out/<name>` in the layout `to`.

    Args:
        source: a run folder, an SAE folder in any known layout, a folder of such folders, or a name that `unbraid.load`
            takes.
        to: sae_lens, dictionary_learning, sparsify, crosscoder, or circuit_tracer: transcoders of every layer, or one
            cross-layer transcoder, in one folder, `out`.
        out: folder for the SAE folders.
        overwrite: replace SAE folders of the same name in it, if unbraid wrote them.

    Returns:
        The folders written.

    Raises:
        FormatError: there is no SAE, the layout cannot hold one of them, a folder of its name is there already
            (nothing is written then), or `out` is not writable.
    """
    if is_transcoder_set(to):
        return [_circuit_tracer(_opened(source), Path(out), overwrite)]
    layout, folders = writable_layout(to), _opened(source)
    for name, found in folders.items():
        refusal = layout.cannot_hold(found.sae)
        if refusal is not None:
            raise FormatError(f"{name}: {refusal}")
        check_sae_folder(Path(out) / name, overwrite)
    written: list[Path] = []
    for name, found in folders.items():
        frequency_N = None if found.log10_frequency_N is None else 10.0**found.log10_frequency_N
        written.append(layout.save(found.sae, Path(out) / name, found.metadata, frequency_N))
    return written


def _circuit_tracer(found: dict[str, SAEFolder], out: Path, overwrite: bool) -> Path:
    """A set of transcoders, or the one cross-layer transcoder there is."""
    across = [name for name, one in found.items() if AND in str(one.metadata.get("hook_name"))]
    if not across:
        return transcoder_set.save_set(found, out, overwrite=overwrite)
    if len(found) > 1:
        raise FormatError(
            f"{', '.join(found)}: expected one cross-layer transcoder, which fills a folder of circuit-tracer's; "
            f"export the folder of one of them, such as saes/{across[0]}"
        )
    return circuit_tracer_clt.save_one(found[across[0]], across[0], out, overwrite=overwrite)


def _opened(source: Path | str) -> dict[str, SAEFolder]:
    """As `open_source`, and the SAEs of a folder that holds nothing but their folders."""
    place = path_or_name(source)
    inside = sae_folders_in(place) if isinstance(place, Path) and not is_run(place) else []
    return {path.name: open_folder(path) for path in inside} or open_source(source)


def open_source(source: Path | str) -> dict[str, SAEFolder]:
    """The SAEs of a run folder by name, or the one SAE of an SAE folder or a published name, under `folder_name`.

    Raises:
        FormatError: there is none.
        TrainingError: the run has not come to its end.
    """
    source = path_or_name(source)
    if isinstance(source, str) or not is_run(source):
        return {folder_name(source): open_folder(source)}
    return {name: open_folder(path) for name, path in RunFolder(source).finished_saes().items()}
