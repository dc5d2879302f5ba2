"""The commands about finished SAEs: export, search, compare and dashboard.

They import what they need only when they run, so that `unbraid --help` stays fast.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from unbraid.errors import ConfigError
from unbraid.flags import TRUST, Trust

console = Console(soft_wrap=True, emoji=False)


@dataclasses.dataclass
class _Export:
    source: tyro.conf.Positional[str]
    """A run folder, an SAE folder in any known layout, a folder of such folders, or a published SAE's name."""
    to: str
    """sae_lens, dictionary_learning, sparsify or crosscoder; circuit_tracer, transcoders of every layer as one set; or
    neuronpedia, the features as JSON."""
    out: Path
    """Folder for the SAE folders, or for the set."""
    overwrite: bool = False
    """Replace SAE folders of the same names in it, if unbraid wrote them."""
    set_name: str | None = None
    """For neuronpedia: what the set of SAEs is called there; made from the SAE's name by default."""
    tokens: int | None = None
    """For neuronpedia: held-out token rows to look at; 16,384 by default."""
    trust_remote_code: Trust = False


def export(arguments: list[str]) -> None:
    """Write a run's SAEs in another library's layout, or their features for Neuronpedia; all of them or none."""
    options = tyro.cli(_Export, args=arguments, prog="unbraid export")
    for path in _exported(options):
        console.print(str(path), highlight=False, markup=False)


def _exported(options: _Export) -> list[Path]:
    from unbraid.feature_model.neuronpedia import TOKENS, export_neuronpedia, is_neuronpedia

    if is_neuronpedia(options.to):
        return export_neuronpedia(
            options.source,
            options.out,
            set_name=options.set_name,
            tokens=TOKENS if options.tokens is None else options.tokens,
            overwrite=options.overwrite,
            console=Console(stderr=True, soft_wrap=True, emoji=False),
            trust_remote_code=options.trust_remote_code,
        )
    given = {"--set-name": options.set_name, "--tokens": options.tokens, TRUST: options.trust_remote_code or None}
    unread = [flag for flag, value in given.items() if value is not None]
    if unread:
        raise ConfigError(
            f"{' and '.join(unread)} {'is' if len(unread) == 1 else 'are'} read with --to neuronpedia only, which runs "
            f"the model; found --to {options.to}; drop what is not read"
        )
    from unbraid.formats.export import export as export_saes

    return export_saes(options.source, options.to, options.out, overwrite=options.overwrite)


@dataclasses.dataclass
class _Search:
    query: tyro.conf.Positional[str]
    """Words of release, id, model or Neuronpedia id, such as "gemma 2b layer 12"."""
    limit: int = 30
    """How many are shown."""
    refresh: bool = False
    """Download the list of published dictionaries anew."""


def search(arguments: list[str]) -> None:
    """List published dictionaries whose name has every word, for `unbraid.load(name)`."""
    options = tyro.cli(_Search, args=arguments, prog="unbraid search")
    from unbraid.errors import ConfigError, FormatError
    from unbraid.formats.registry import download
    from unbraid.formats.registry import search as find

    if options.limit < 1:
        raise ConfigError(f"--limit = {options.limit}; expected at least 1")
    if options.refresh:
        download()
    found = find(options.query)
    if not found:
        raise FormatError(f"nothing in the registry has every word of {options.query!r}; try fewer words")
    shown = found[: options.limit]
    width = max(len(entry.name) for entry in shown)
    for entry in shown:  # whole names on a line each, to be copied
        l0 = "" if entry.l0 is None else f"L0 {entry.l0:g}"
        line = f"{entry.name:{width}}  {l0:9}  {'' if entry.layout else '(layout not read) '}{entry.neuronpedia or ''}"
        console.print(line.rstrip(), highlight=False, markup=False)
    if len(found) > options.limit:
        console.print(f"{len(shown)} of {len(found):,} shown; --limit shows more", highlight=False)


@dataclasses.dataclass
class _Compare:
    paths: tyro.conf.Positional[list[str]]
    """Finished run folders, where SAEs alike in all but their seed become one point with an interval; or two SAEs:
    folders in any known layout, or names that `unbraid.load` takes."""
    out: Path | None = None
    """For runs: folder for frontier.png and frontier.svg; by default `comparison`, where an earlier one is replaced."""
    overwrite: bool = False
    """For runs: replace an earlier comparison in the folder that --out names."""
    json: bool = False
    """Print JSON; for runs no figure is drawn unless --out names its folder."""


def compare(arguments: list[str]) -> None:
    """Compare runs (metrics of each setting at its L0), or two SAEs (which features they share)."""
    options = tyro.cli(_Compare, args=arguments, prog="unbraid compare")
    from unbraid.training.run_folder import is_run

    runs = [path for path in options.paths if is_run(Path(path))]
    if not runs and len(options.paths) == 2:
        _compare_saes(options)
        return
    others = [path for path in options.paths if path not in runs]
    if others and (runs or len(others) != 1):
        raise ConfigError(
            f"compare takes run folders, or two SAEs; found {len(runs)} run folders and {len(others)} other paths "
            f"({', '.join(map(repr, others[:3]))}); name an SAE of a run by its folder, such as RUN/saes/NAME"
        )
    _compare_runs(options)


def _compare_saes(options: _Compare) -> None:
    if options.out is not None or options.overwrite:
        raise ConfigError("--out and --overwrite are for comparing runs; two SAEs give a table, or --json; drop them")
    from unbraid.reporting.compare_saes import compare_saes

    found = compare_saes(*options.paths)
    if options.json:
        print(json.dumps(found.to_dict(), allow_nan=False))
    else:
        console.print(str(found), highlight=False, markup=False)


def _compare_runs(options: _Compare) -> None:
    from unbraid.reporting.compare import METRICS, frontier, write_comparison

    points = frontier(list(options.paths))
    if options.json:
        print(json.dumps([dataclasses.asdict(point) for point in points], allow_nan=False))
    else:
        shown = [metric for metric in METRICS if any(metric in point.metrics for point in points)]
        table = Table(box=None, padding=(0, 1, 0, 0))
        table.add_column("site", no_wrap=True)
        table.add_column("settings", overflow="fold")
        table.add_column("seeds")
        for metric in shown:
            table.add_column(METRICS[metric].replace("$", "").replace("^", ""), justify="right")
        for point in points:
            values = [str(point.metrics[metric]) if metric in point.metrics else "-" for metric in shown]
            table.add_row(point.site, escape(point.label), str(point.seeds), *values)
        console.print(table)
        console.print("± is half of the 95 % interval of the mean over seeds (Student's t)")
    if options.json and options.out is None:
        return
    out = options.out or Path("comparison")
    for path in write_comparison(points, out, overwrite=options.overwrite or options.out is None):
        if not options.json:
            console.print(str(path), highlight=False, markup=False)


@dataclasses.dataclass
class _Dashboard:
    source: tyro.conf.Positional[str]
    """A finished run folder, an SAE folder in any known layout, or a published SAE's name."""
    model: str | None = None
    """Language model, where an SAE's folder does not say (or under another name here)."""
    site: str | None = None
    """Site, where an SAE's folder does not say, such as resid_post.6."""
    text: list[str] | None = None
    """What contexts of an SAE are read from: packaged (the default), files or folders, or hub:NAME. A run has its own
    held-out text."""
    out: Path | None = None
    """Where to write the site; report/ in a run folder, else dashboards/NAME."""
    overwrite: bool = False
    """Replace an earlier dashboard in that folder."""
    tokens: int = 16_384
    """Held-out token rows to look at; more give better contexts and steadier correlations."""
    serve: bool = False
    """Serve an existing or new dashboard on this machine until interrupted; nothing else can reach it. Only a served
    dashboard keeps labels, notes and lists."""
    port: Annotated[int, tyro.conf.arg(help="Port for --serve; 0 takes a free one.")] = 0
    trust_remote_code: Trust = False


def dashboard(arguments: list[str]) -> None:
    """Write a static site of features and most entangled pairs, of a run or an SAE, and serve it on request."""
    options = tyro.cli(_Dashboard, args=arguments, prog="unbraid dashboard")
    from unbraid.formats import path_or_name
    from unbraid.reporting.dashboard import serve, write_dashboard
    from unbraid.reporting.dashboard.live_page import address
    from unbraid.reporting.dashboard.opening import default_place, labels_place

    source = path_or_name(options.source)
    final = options.out if options.out is not None else default_place(source)
    index = final / "index.html"
    if not (options.serve and index.is_file()):
        index = write_dashboard(
            source,
            options.out,
            options.tokens,
            model=options.model,
            site=options.site,
            text=options.text,
            console=console,
            overwrite=options.overwrite,
            trust_remote_code=options.trust_remote_code,
        )
    elif given := [name for name in ("model", "site", "text") if getattr(options, name) is not None]:
        raise ConfigError(
            f"{str(index)!r} is there and is served as it is, so --{' and --'.join(given)} would do nothing; drop what "
            "was given, or write the dashboard again without --serve"
        )
    console.print(str(index), highlight=False, markup=False)
    if options.serve:
        with serve(index, options.port, labels=labels_place(source, final), live=lambda: address(source)) as server:
            console.print(f"{server.url} (Ctrl-C ends it)", highlight=False)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                console.print("stopped")
