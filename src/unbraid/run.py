"""A whole run: plan -> fit -> finish.

This is what `unbraid train` and `unbraid.train` do, and the only module that connects training with evaluation, formats
and reporting. Every part that can be redone from the last checkpoint is, so a run killed at any moment, even while it
exports, is finished by `resume`. Under `torchrun` every process runs this; each trains, measures and exports the SAEs
of its cell, and the first one writes what belongs to the whole run.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from unbraid import formats
from unbraid.activations.ahead import Ahead
from unbraid.activations.cache import harvest, wanted_rows
from unbraid.activations.cache_manifest import PARTS
from unbraid.activations.repeated import Repeated
from unbraid.activations.source import ActivationSource
from unbraid.config import RunConfig
from unbraid.device import pick_device
from unbraid.distributed.mesh import joined, lay_out, restarts
from unbraid.distributed.ranks import ALONE, Ranks
from unbraid.errors import TrainingError
from unbraid.finish import finish, warnings_of
from unbraid.inputs import NOTHING, Inputs
from unbraid.plan import Plan, check_machine, check_settings, make_plan
from unbraid.progress import Progress, default_console, quiet_console
from unbraid.training.changes import changed, record_changes
from unbraid.training.checkpoint import steps_done
from unbraid.training.loggers import Loggers, check_loggers, open_loggers
from unbraid.training.loop import train_saes
from unbraid.training.precision import matrix_products
from unbraid.training.progress import Callback, RunProgress
from unbraid.training.run_folder import RunFolder, default_run_folder
from unbraid.training.stopping import process_as_found, stop_on_signals


class Run:
    """A run on disk.

    Args:
        path: a run folder.

    Raises:
        TrainingError: the folder holds no run.

    Example:
        >>> run = Run("runs/tiny")
        >>> run.config.sae_names[0], run.summary["steps"]
        ('resid_post.0_decorrelated', {'planned': 100, 'executed': 100})
        >>> run.saes["resid_post.1_twin"]
        ReLUSAE(relu, N=128, D=64, site=blocks.1.hook_resid_post, model=random:llama, trained_tokens=25600)
    """

    def __init__(self, path: Path | str):
        self.folder = RunFolder(path)

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.folder.path

    @property
    def config(self) -> RunConfig:
        """The settings the run was made with, changes made while resuming included."""
        return self.folder.recorded_config

    @property
    def summary(self) -> dict[str, Any]:
        """Contents of `summary.json`.

        Raises:
            TrainingError: the run is not complete.
        """
        return self.folder.read_summary()

    @property
    def saes(self) -> dict[str, Any]:
        """The finished SAEs by name, acting on raw activations.

        Raises:
            TrainingError: the run is not complete.
        """
        names, folders = self.summary["saes"], self.folder.finished_saes()
        return {name: formats.load(folders[name]) for name in names if name in folders}


def train(
    config: RunConfig,
    path: Path | str | None = None,
    *,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    text: Any = None,
    activations: Any = None,
    penalty: nn.Module | Callable[..., Any] | None = None,
    callbacks: Sequence[Callback] = (),
    console: Console | None = None,
    dropped: Sequence[str] = (),
) -> Run:
    """Run `config` into a new folder, which appears once the plan has passed every check.

    What is handed in is not written into the folder, and `resume` needs it again.

    Args:
        config: settings, such as `unbraid.recipes.demo()`.
        path: run folder to make; `runs/<recipe>` by default.
        model: a transformers model in the place of the one the settings name, on the device it is on.
        tokenizer: beside it, or in the place of the settings' model's own.
        text: an iterable of strings, of rows of token ids, or of lists of chat messages, that can be iterated again (or
            a function that starts it anew), in the place of the settings' text. With `state_dict` and
            `load_state_dict` a resumed run goes on where it stood; without, it reads from the start and skips.
        activations: rows of your own in the place of model, text and sites: a tensor or array [rows, D], a folder of
            .npy or .safetensors files, a column of a `datasets` table, or an iterable of [rows, D] batches; one, which
            is called `activations`, or several by name, row by row alike; `{"x -> y": (x, y)}` for a transcoder, which
            reads x and predicts y, and `{"a + b": (a, b)}` for a crosscoder. A seeded share,
            `text.held_out_fraction`, is held out.
        penalty: a module or function in the place of the settings' penalty, weighted by `decorrelation.lambda2`. It is
            called on every step as `penalty(f, codes=codes, decoder=W_dec)`, with the codes either dense, `f` [B, N],
            or sparse, `codes` (CSR `offsets`, `indices`, `values`, `n_features`), the other None; and returns a scalar
            and anything: the numbers of a dict are logged. Every SAE has a copy, whose state checkpoints keep.
        callbacks: called after every step with the steps done, and the line of metrics on logged ones (else None).
        console: where progress is shown; a terminal or notebook by default, `Console(quiet=True)` for nowhere.
        dropped: values of a recipe that no longer apply, for the plan to list.

    Raises:
        UnbraidError: with what was wrong, what was expected and what to change.

    Example:
        >>> from unbraid import recipes
        >>> run = train(recipes.tiny(), "runs/tiny", console=Console(quiet=True))
        >>> sorted(path.name for path in run.path.glob("*.json*") if not path.name.startswith("."))
        ['config.json', 'metrics.jsonl', 'summary.json', 'timing.jsonl']
    """
    console = console or default_console()
    inputs = Inputs(model, tokenizer, text, activations, penalty)
    config, unread = inputs.settings(config)
    dropped = [*dropped, *unread]
    check_settings(config)
    path = Path(path) if path is not None else default_run_folder(config)
    trusted = config.model.trust_remote_code
    with joined() as everyone, process_as_found(config.training.threads):
        if restarts() and (path / "config.json").is_file():
            return _go_on(RunFolder(path, trusted), inputs, console, everyone, callbacks)
        check_machine(config, pick_device(config.training.device), everyone.size)
        if everyone.first:  # The others may come when the first one has made it.
            RunFolder.require_free(path)
            check_loggers(config)
        source, device = _opened(config, inputs, everyone, console)
        plan = make_plan(config, source, device, path, dropped=dropped, first=everyone.first)
        if everyone.first:
            _say(console, str(plan))
            RunFolder.create(path, config)
        everyone.wait()
        folder = RunFolder(path, trusted)
        return _fit_and_finish(folder, config, source, inputs, device, console, everyone, callbacks)


def plan(
    config: RunConfig, path: Path | str | None = None, *, inputs: Inputs = NOTHING, dropped: Sequence[str] = ()
) -> Plan:
    """What `train` would do, after all of its checks and with an estimate of the time; nothing is written.

    Raises:
        UnbraidError: what `train` would raise before its first step.
    """
    config, unread = inputs.settings(config)
    dropped = [*dropped, *unread]
    check_settings(config)
    if path is None:
        path = default_run_folder(config)
    else:
        RunFolder.require_free(Path(path))
    check_loggers(config)
    check_machine(config, pick_device(config.training.device), ALONE.size)
    with process_as_found(config.training.threads):
        source, device = _opened(config, inputs, ALONE, quiet_console())
        return make_plan(config, source, device, Path(path), dropped=dropped, timed=True)


def resume(
    path: Path | str,
    *,
    changes: Mapping[str, Any] | None = None,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    text: Any = None,
    activations: Any = None,
    penalty: nn.Module | Callable[..., Any] | None = None,
    trust_remote_code: bool = False,
    callbacks: Sequence[Callback] = (),
    console: Console | None = None,
) -> Run:
    """Go on with an interrupted run from its newest checkpoint; a complete run is left as it is.

    Args:
        path: the run folder.
        changes: settings that are different from here on, as in `{"training.tokens": 2_000_000}`; see
            `unbraid.training.changes.MAY_CHANGE`. They are recorded in the run folder.
        model, tokenizer, text, activations, penalty: what was handed to `train`, again.
        trust_remote_code: allow the run's settings to run code that comes with the model.
        callbacks, console: as for `train`.

    Raises:
        UnbraidError: the folder holds no run, is in use, its newest checkpoint is damaged or of another run, or a
            setting may not change.

    Example:
        >>> run = resume("runs/tiny", changes={"training.tokens": 26_000}, console=Console(quiet=True))
        >>> run.summary["tokens"]
        25856
    """
    console = console or default_console()
    folder = RunFolder(path, trust_remote_code)
    with joined() as everyone:
        if changes:
            _change(folder, changes, everyone)
        if _is_complete(folder):
            if everyone.first:
                _say(console, f"run {folder.path} is complete; see {folder.summary}")
            return Run(folder.path)
        with process_as_found(folder.config.training.threads):
            inputs = Inputs(model, tokenizer, text, activations, penalty)
            return _go_on(folder, inputs, console, everyone, callbacks)


def _change(folder: RunFolder, changes: Mapping[str, Any], everyone: Ranks) -> None:
    config, done = changed(folder.recorded_config, changes), steps_done(folder.checkpoints)
    check_settings(config)
    if config.steps < done:
        raise TrainingError(
            f"training.tokens = {config.training.tokens:,} gives {config.steps:,} steps and the run has made {done:,}; "
            f"expected at least {done * config.training.batch_tokens:,} tokens; raise training.tokens"
        )
    if everyone.first:
        with folder.lock():
            record_changes(folder.path, done, changes)
    everyone.wait()


def _is_complete(folder: RunFolder) -> bool:
    """Whether the run ended as its settings ask; more tokens since make it incomplete again."""
    return (
        folder.summary.is_file()
        and folder.read_summary().get("steps", {}).get("planned") == folder.recorded_config.steps
    )


def open_activations(
    config: RunConfig, device: torch.device, ranks: Ranks = ALONE, inputs: Inputs = NOTHING
) -> ActivationSource:
    """What was handed in, the model, its passes shared among `ranks`, or the cache the run trains from."""
    return inputs.open(config, device, ranks)


def _opened(
    config: RunConfig, inputs: Inputs, everyone: Ranks, console: Console
) -> tuple[ActivationSource, torch.device]:
    device = pick_device(config.training.device)
    status = console.status("loading the language model (the first time, converting it and the text)")
    with status, everyone.first_ahead():
        return open_activations(config, device, everyone, inputs), device


def _go_on(folder: RunFolder, inputs: Inputs, console: Console, everyone: Ranks, callbacks: Sequence[Callback]) -> Run:
    config = folder.config
    if everyone.first:
        check_loggers(config)
    source, device = _opened(config, inputs, everyone, console)
    done = steps_done(folder.checkpoints)
    if done == 0:
        plan = make_plan(config, source, device, folder.path, first=everyone.first)
        if everyone.first:
            _say(console, f"{str(folder.path)!r} was stopped before its first checkpoint: starting again")
            _say(console, str(plan))
    elif everyone.first:
        _say(console, f"going on after step {done:,} of {config.steps:,}")
    return _fit_and_finish(folder, config, source, inputs, device, console, everyone, callbacks)


def _fit_and_finish(
    folder: RunFolder,
    config: RunConfig,
    source: ActivationSource,
    inputs: Inputs,
    device: torch.device,
    console: Console,
    everyone: Ranks,
    callbacks: Sequence[Callback],
) -> Run:
    with _voice(folder, config, console, everyone) as (console, loggers):
        mesh = lay_out(everyone, len(config.sae_names), config.training.feature_shards)
        if everyone.size > 1:
            cells = f"{mesh.cells} cells, each SAE split over {mesh.shards.size} ranks of its cell"
            _say(console, f"{everyone.size} ranks: {cells}")
        overlap = config.buffer.overlap == "on" or (config.buffer.overlap == "auto" and device.type == "cuda")
        refill = config.buffer.contexts // 2 // config.model.batch_contexts
        # Not among ranks: what a thread exchanges would meet the exchanges of a training step on another rank.
        text = source if config.training.epochs == 1 else Repeated(source, config.training.epochs)
        feed = Ahead(text, refill) if overlap and everyone.size == 1 else text
        start = steps_done(folder.checkpoints)
        with (
            RunProgress(config, console, start, [loggers.step, *callbacks]) as progress,
            stop_on_signals() as stop,
            matrix_products(config.training.tf32),
        ):
            trained = train_saes(folder, config, feed, device, progress, stop, mesh, inputs.penalty_module)
        if trained.steps < config.steps:
            _say(console, f"the text is used up: ending after step {trained.steps:,} of {config.steps:,}")
        _say(console, f"measuring on {config.training.held_out_tokens:,} held-out tokens")
        summary = finish(folder, config, source, trained, device, everyone)
        loggers.summary(summary)
        for warning in warnings_of(summary, config):
            _say(console, f"warning: {warning}")
        if everyone.size == 1 and not console.quiet:
            from unbraid.reporting.ending import ending

            for part in ending(folder, config, source, summary, device):
                console.print(part, highlight=False, markup=False)
        _say(console, f"done: results in {folder.path} (summary.json, saes/, figures/figure1.png)")
    return Run(folder.path)


@contextmanager
def _voice(
    folder: RunFolder, config: RunConfig, console: Console, everyone: Ranks
) -> Iterator[tuple[Console, Loggers]]:
    """The run's console and loggers, behind its lock; among ranks only the first one prints and logs."""
    if not everyone.first:
        yield quiet_console(), Loggers([])
        return
    with folder.lock(), open_loggers(folder, config) as loggers:
        yield console, loggers


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False)


def fill_cache(config: RunConfig, cache: Path | str, *, console: Console | None = None) -> None:
    """Harvest what a run of `config` needs into `cache`, so that `cache=...` trains without the model.

    Raises:
        UnbraidError: with what was wrong, what was expected and what to change.
    """
    check_settings(config)
    console = console or default_console()
    wanted = sum(wanted_rows(config, part) for part in PARTS)
    before = {part: sum(wanted_rows(config, earlier) for earlier in PARTS[:place]) for place, part in enumerate(PARTS)}
    with stop_on_signals() as stop, Progress(console, "harvesting", wanted, "rows") as progress:
        manifest = harvest(
            config,
            Path(cache),
            pick_device(config.training.device),
            on_rows=lambda part, rows, _: progress.update(before[part] + rows, f"{part} rows"),
            should_stop=stop,
        )
    shards = sum(len(manifest["parts"][part]) for part in PARTS)
    _say(console, f"done: {shards} shards in {cache}; train with --cache {cache}")
