"""A whole run as one function: text -> model -> buffer -> SAEs -> held-out metrics -> exported SAEs -> Figure 1.

This is what `unbraid train` and `unbraid.train` do. Rooms that only read SAEs (evaluation, formats, reporting) are
brought together with training here and nowhere else. Every part that can be redone from the last checkpoint is, so a
run killed at any moment, even while it exports, is finished by `resume`. Under `torchrun` every process runs this; each
trains, measures and exports the SAEs of its cell, and the first one writes what belongs to the whole run.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress as Bar
from torch import Tensor

from unbraid import formats
from unbraid.activations.ahead import Ahead
from unbraid.activations.cache import PARTS, CachedActivations, harvest, wanted_rows
from unbraid.activations.live import LiveActivations
from unbraid.activations.rows import RowFilter
from unbraid.config import RunConfig
from unbraid.device import pick_device
from unbraid.distributed.mesh import joined, lay_out, restarts
from unbraid.distributed.ranks import ALONE, Ranks
from unbraid.errors import ConfigError, TextError
from unbraid.evaluation.held_out import HeldOutMetrics, held_out_metrics
from unbraid.files import write_json
from unbraid.training.checkpoint import steps_done
from unbraid.training.loggers import Loggers, check_loggers, open_loggers
from unbraid.training.loop import Trained, TrainingInterrupted, train_saes
from unbraid.training.precision import matrix_products
from unbraid.training.progress import RunProgress
from unbraid.training.run_folder import RunFolder


class Run:
    """A run on disk.

    Args:
        path: a run folder.
    """

    def __init__(self, path: Path | str):
        self.folder = RunFolder(path)

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.folder.path

    @property
    def config(self) -> RunConfig:
        """The settings the run was made with."""
        return self.folder.config

    @property
    def summary(self) -> dict[str, Any]:
        """Contents of `summary.json`.

        Raises:
            TrainingError: the run is not complete.
        """
        return self.folder.read_summary()

    @property
    def saes(self) -> dict[str, Any]:
        """The finished SAEs by name, acting on raw activations."""
        return {path.name: formats.load(path) for path in sorted(self.folder.saes.iterdir())}


def train(config: RunConfig, path: Path | str | None = None, *, console: Console | None = None) -> Run:
    """Run `config` into a new folder.

    Args:
        config: settings, such as `unbraid.recipes.demo()`.
        path: run folder to make; `runs/<recipe>` by default.
        console: where progress is shown; nothing is shown without one.

    Raises:
        UnbraidError: with what was wrong, what was expected and what to change.
    """
    check_steps(config)
    check_loggers(config)
    path = Path(path or Path("runs") / config.name)
    with joined() as everyone:
        if everyone.first and not (restarts() and (path / "config.json").is_file()):
            RunFolder.create(path, config)
        everyone.wait()
        return _run(RunFolder(path), console or Console(quiet=True), everyone)


def resume(path: Path | str, *, console: Console | None = None) -> Run:
    """Go on with an interrupted run from its newest checkpoint; a complete run is left as it is.

    Raises:
        UnbraidError: the folder holds no run, is in use, or its newest checkpoint is damaged.
    """
    with joined() as everyone:
        return _run(RunFolder(path), console or Console(quiet=True), everyone)


def open_activations(
    config: RunConfig, device: torch.device, ranks: Ranks = ALONE
) -> LiveActivations | CachedActivations:
    """The model, its passes shared among `ranks`, or the cache the run trains from."""
    if config.cache is not None:
        return CachedActivations(config, Path(config.cache))
    return LiveActivations(config, device, ranks)


def fill_cache(config: RunConfig, cache: Path | str, *, console: Console | None = None) -> None:
    """Harvest what a run of `config` needs into `cache`, so that `cache=...` trains without the model.

    Raises:
        UnbraidError: with what was wrong, what was expected and what to change.
    """
    check_steps(config)
    console = console or Console(quiet=True)
    with stop_on_signals() as stop, Bar(console=console) as bar:
        tasks = {part: bar.add_task(f"{part} rows", total=wanted_rows(config, part)) for part in PARTS}
        manifest = harvest(
            config,
            Path(cache),
            pick_device(config.training.device),
            on_rows=lambda part, rows, wanted: bar.update(tasks[part], completed=rows),
            should_stop=stop,
        )
    shards = sum(len(manifest["parts"][part]) for part in PARTS)
    console.print(f"done: {shards} shards in {cache}; train with --cache {cache}", highlight=False)


def check_steps(config: RunConfig) -> None:
    """The plan must hold at least one step.

    Raises:
        ConfigError: with the arithmetic.
    """
    if config.steps < 1:
        tokens, batch = config.training.tokens, config.training.batch_tokens
        raise ConfigError(
            f"training.tokens = {tokens:,} // training.batch_tokens = {batch:,} gives {config.steps} steps; expected "
            f"at least 1; raise training.tokens to {batch:,} or more, or lower training.batch_tokens"
        )


def _run(folder: RunFolder, console: Console, everyone: Ranks) -> Run:
    if folder.summary.is_file():
        if everyone.first:
            console.print(f"run {folder.path} is complete; see {folder.summary}", highlight=False)
        return Run(folder.path)
    with _voice(folder, console, everyone) as (console, loggers), stop_on_signals() as stop:
        say = lambda text: console.print(text, highlight=False, markup=False)  # noqa: E731
        config, start = folder.config, steps_done(folder.checkpoints)
        mesh = lay_out(everyone, len(config.sae_names), config.training.feature_shards)
        say(
            f"plan: {config.steps:,} steps of {config.training.batch_tokens:,} tokens "
            f"({config.steps * config.training.batch_tokens:,} tokens) for {len(config.sae_names)} SAEs: "
            f"{', '.join(config.sae_names)}"
        )
        if everyone.size > 1:
            say(f"{everyone.size} ranks: {mesh.cells} cells, each SAE split over {mesh.shards.size} ranks of its cell")
        if config.training.threads is not None:
            torch.set_num_threads(config.training.threads)
        device = pick_device(config.training.device)
        status = console.status("loading the language model (the first time, converting it and the text)")
        with status, everyone.first_ahead():
            source = open_activations(config, device, everyone)
        say(
            f"model: {config.model.name} on {device}, {'/'.join(map(str, dict.fromkeys(source.widths)))} wide, read at "
            f"{', '.join(map(str, config.sites))}"
        )
        if start < config.steps and everyone.first:
            with console.status("counting the text"):
                check_text(config, source)
        if start:
            say(f"going on after step {start:,}")
        with RunProgress(config, console, start, loggers.step) as progress:
            overlap = config.buffer.overlap == "on" or (config.buffer.overlap == "auto" and device.type == "cuda")
            refill = config.buffer.contexts // 2 // config.model.batch_contexts
            # Not among ranks: what a thread exchanges would meet the exchanges of a training step on another rank.
            feed = Ahead(source, refill) if overlap and everyone.size == 1 else source
            with matrix_products(config.training.tf32):
                trained = train_saes(folder, config, feed, device, progress, stop, mesh)
        say(f"measuring on {config.training.held_out_tokens:,} held-out tokens")
        summary = _finish(folder, config, source, trained, device, everyone)
        loggers.summary(summary)
        for warning in warnings_of(summary, config):
            say(f"warning: {warning}")
        say(f"done: results in {folder.path} (summary.json, saes/, figures/figure1.png)")
    return Run(folder.path)


@contextmanager
def _voice(folder: RunFolder, console: Console, everyone: Ranks) -> Iterator[tuple[Console, Loggers]]:
    """The run's console and loggers, behind its lock; among ranks the first one speaks, the others are silent."""
    if not everyone.first:
        yield Console(quiet=True), Loggers([])
        return
    with folder.lock(), open_loggers(folder, folder.config) as loggers:
        yield console, loggers


def check_text(config: RunConfig, source: LiveActivations | CachedActivations) -> None:
    """There must be text enough for every step, where that can be known beforehand (any source but a hub stream).

    Raises:
        TextError: with the arithmetic of how many steps the text yields.
    """
    rows = config.steps * config.training.batch_tokens
    per_context = config.text.context_length - int(config.buffer.drop_first_position)
    needed = -(-rows // per_context)
    found = source.count_contexts(needed)
    if found is None or found >= needed:
        return
    steps = found * per_context // config.training.batch_tokens
    raise TextError(
        f"the text is too small: it gives {found:,} contexts of {config.text.context_length} tokens = "
        f"{found * per_context:,} token rows = at most {steps:,} steps of training.batch_tokens = "
        f"{config.training.batch_tokens:,}; the run needs {needed:,} contexts for {config.steps:,} steps; give more "
        f"text, or lower training.tokens to {steps * config.training.batch_tokens:,}"
    )


def _finish(
    folder: RunFolder,
    config: RunConfig,
    source: LiveActivations | CachedActivations,
    trained: Trained,
    device: torch.device,
    everyone: Ranks,
) -> dict[str, Any]:
    """Held-out metrics, exported SAEs, Figure 1 and, last of all, `summary.json`."""
    from unbraid.reporting.figures import draw_training

    tokens = config.steps * config.training.batch_tokens
    held_out = list(_held_out_rows(config, source, trained.buffer.filter))
    metrics: dict[str, HeldOutMetrics] = {}
    for trainee in trained.trainees:
        rows = (trainee.normalise(batch[trainee.site].to(device, torch.float32)) for batch in held_out)
        metrics[trainee.name] = held_out_metrics(trainee.sae, rows, config.decorrelation.fraction)
    assert trained.buffer.position is not None
    seconds = trained.seconds["buffer"] + trained.seconds["training"]
    measured = {
        trainee.name: metrics[trainee.name].as_dict()
        | {
            "updates_per_second": trainee.updates / seconds if seconds else None,
            "dead_fraction": float(
                (trainee.tokens_since_fired >= trainee.config.sae.dead_after_tokens).double().mean()
            ),
            "steps": {"planned": config.steps, "executed": trainee.updates},
            "scale": trainee.normalise.scale,
        }
        for trainee in trained.trainees
    }
    for trainee in trained.trainees:
        site = config.sites[trainee.site]
        metadata = {
            "model_name": config.model.name,
            "hook_name": site.hook,
            "hook_layer": site.layer or 0,
            "context_size": config.text.context_length,
            "prepend_bos": source.prepends_bos,
            "training_tokens": tokens,
        }
        trainee.sae.fold(trainee.normalise.mean_D, trainee.normalise.scale)
        frequency_N = metrics[trainee.name].frequency_N
        formats.save(trainee.sae, folder.saes / trainee.name, metadata=metadata, frequency_N=frequency_N)
    measured = everyone.united(measured)
    summary: dict[str, Any] = {
        "recipe": config.name,
        "steps": {"planned": config.steps, "executed": min(sae["steps"]["executed"] for sae in measured.values())},
        "tokens": tokens,
        "held_out_tokens": sum(len(batch[0]) for batch in held_out),
        "documents": trained.buffer.position["counts"],
        "rows": {"kept": trained.buffer.filter.kept, "dropped": trained.buffer.filter.dropped},
        "seconds": trained.seconds,
        "saes": {
            name: measured[name] | {"correlation_reduction": _reduction(name, config.twins, measured)}
            for name in config.sae_names
        },
    }
    if everyone.first:
        draw_training(folder.path)
        write_json(folder.summary, summary)
    everyone.wait()
    return summary


def _held_out_rows(
    config: RunConfig, source: LiveActivations | CachedActivations, trained_filter: RowFilter
) -> Iterator[list[Tensor]]:
    """Rows of held-out text, filtered by the norms training was filtered by, `held_out_tokens` in all."""
    rows_filter = RowFilter(config.buffer, config.sites, source.special_ids)
    rows_filter.limits = trained_filter.limits
    left = config.training.held_out_tokens
    for chunk in source.chunks(None, held_out=True):
        rows = [site_rows[:left] for site_rows in rows_filter(chunk)]
        left -= len(rows[0])
        yield rows
        if left == 0:
            return
    if left == config.training.held_out_tokens:
        raise TextError(
            f"no held-out text: text.held_out_fraction = {config.text.held_out_fraction} of the documents gave no full "
            "context; give more text or raise text.held_out_fraction"
        )


def _reduction(name: str, twins: dict[str, str], measured: dict[str, dict[str, Any]]) -> float | None:
    """1 - top correlation / the twin's; None without a twin."""
    if name not in twins:
        return None
    twin = measured[twins[name]]["correlation_top"]
    return 1 - measured[name]["correlation_top"] / twin if twin > 0 else None


def warnings_of(summary: dict[str, Any], config: RunConfig) -> list[str]:
    """What a user should know about the SAEs of a finished run, and which setting to move."""
    found: list[str] = []
    documents = summary["documents"]
    if documents["skipped"]:
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in sorted(documents["skipped"].items()))
        found.append(f"of {documents['seen']:,} documents some were left out: {reasons}")
    settings = {
        config.sae_name(site, variant): config.variant(variant).sae
        for site in config.sites
        for variant in config.variants
    }
    for name, metrics in summary["saes"].items():
        sae = settings[name]
        if not 0 < metrics["l0"] < sae.n_features / 2:
            move = "lower" if sae.has_k == (metrics["l0"] > 0) else "raise"
            setting = f"sae.k (now {sae.k})" if sae.has_k else f"sae.lambda1 (now {sae.lambda1:g})"
            found.append(
                f"{name} ends with L0 = {metrics['l0']:.1f} of {sae.n_features} features; expected more than 0 and "
                f"less than half; {move} {setting}"
            )
        if metrics["dead_fraction"] > 0.5:
            setting = "sae.dead_after_tokens, after which they are revived," if sae.has_k else "sae.lambda1"
            found.append(
                f"{name} ends with {metrics['dead_fraction']:.0%} dead features; lower {setting} or optimiser.lr"
            )
    return found


@contextmanager
def stop_on_signals() -> Iterator[Any]:
    """Turn the first SIGINT or SIGTERM into a polite stop; a second one acts as usual.

    Only the main thread can catch signals; elsewhere the stop is never asked for.
    """
    asked: list[int] = []

    def ask(number: int, _frame: FrameType | None) -> None:
        asked.append(number)
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    previous: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, ask)
    except ValueError:
        pass
    try:
        yield lambda: bool(asked)
    except TrainingInterrupted as interrupted:
        interrupted.exit_code = 128 + (asked[0] if asked else signal.SIGTERM)  # another rank may have been asked
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
