"""The end of a run: held-out metrics, exported SAEs, Figure 1, `summary.json`, and what a user should know of it.

Whatever is made here can be made again from the last checkpoint, so a run killed while it finishes loses nothing.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from unbraid import formats
from unbraid.activations.language_model import LanguageModel
from unbraid.activations.rows import ChunkSource, RowFilter
from unbraid.activations.source import ActivationSource
from unbraid.config import RunConfig
from unbraid.distributed.ranks import Ranks
from unbraid.errors import TextError
from unbraid.evaluation.geometry import max_cosines
from unbraid.evaluation.held_out import HeldOutMetrics, held_out_metrics
from unbraid.evaluation.splice import preservation
from unbraid.files import write_json
from unbraid.json_files import finite
from unbraid.sae.crosscoder import by_site, exclusive_features
from unbraid.sites import Route, Site, hooks
from unbraid.training.loop import Trained
from unbraid.training.run_folder import RunFolder
from unbraid.training.sae_trainer import SAETrainer

SPLICED_CONTEXTS = 8
"""Held-out contexts on which the language model goes on from reconstructions; each costs two passes and one per SAE."""


def finish(
    folder: RunFolder,
    config: RunConfig,
    source: ActivationSource,
    trained: Trained,
    device: torch.device,
    everyone: Ranks,
) -> dict[str, Any]:
    """Measure and export every SAE, draw Figure 1 and, last of all, write `summary.json`, which is returned."""
    from unbraid.reporting.figures import draw_training

    held_out = list(held_out_rows(config, source, trained.buffer.filter))
    measured = {
        trainer.name: _measure_and_export(folder, config, source, trained, trainer, held_out, device)
        for trainer in trained.trainers
    }
    for name, score in ce_scores(config, source, trained).items():
        measured[name]["ce_loss_score"] = score
    measured = everyone.united(measured)
    assert trained.buffer.position is not None
    summary: dict[str, Any] = {
        "recipe": config.name,
        "steps": {"planned": config.steps, "executed": trained.steps},
        "tokens": trained.steps * config.training.batch_tokens,
        "held_out_tokens": sum(len(batch[0]) for batch in held_out),
        "documents": trained.buffer.position.get("counts", {"seen": 0, "used": 0, "skipped": {}}),
        "source": {part: _checksum(identity) for part, identity in source.identity.items()},
        "rows": {"kept": trained.buffer.filter.kept, "dropped": trained.buffer.filter.dropped},
        "seconds": trained.seconds,
        "saes": {
            name: measured[name] | {"correlation_reduction": _reduction(name, config.twins, measured)}
            for name in config.sae_names
        },
    }
    summary = finite(summary)
    if everyone.first:
        draw_training(folder.path)
        write_json(folder.summary, summary)
    everyone.wait()
    return summary


def _measure_and_export(
    folder: RunFolder,
    config: RunConfig,
    source: ActivationSource,
    trained: Trained,
    trainer: SAETrainer,
    held_out: list[list[Tensor]],
    device: torch.device,
) -> dict[str, Any]:
    """One SAE's entry of the summary; its folder is written. Measured in training units, exported for raw ones."""
    pairs = (trainer.rows([x_RD.to(device, torch.float32) for x_RD in batch]) for batch in held_out)
    rows = (x_RD if y_RM is None else (x_RD, y_RM) for x_RD, y_RM in pairs)
    route, _ = config.dictionaries[trainer.name]
    widths_in, widths_out = ([source.widths[config.sites.index(site)] for site in end] for end in route)
    units = trainer.normalise if trainer.target is None else trainer.target.normalise
    scales_in, scales_out = trainer.normalise.scales(widths_in), units.scales(widths_out)
    metrics: HeldOutMetrics = held_out_metrics(trainer.sae, rows, config.decorrelation.fraction, widths_out)
    seconds = trained.seconds["buffer"] + trained.seconds["training"]
    dead_N = trainer.tokens_since_fired >= trainer.dead_after
    metadata = {
        "model_name": source.model_name,
        **_placed(route),
        **by_site(widths_out, scales_out),
        "context_size": config.text.context_length,
        "prepend_bos": source.prepends_bos,
        "norm_limit": config.buffer.norm_limit,
        "training_tokens": trainer.updates * config.training.batch_tokens,
    }
    trainer.fold()
    formats.save(trainer.sae, folder.saes / trainer.name, metadata=metadata, frequency_N=metrics.frequency_N)
    exclusive: dict[str, int] = {}
    if len(route.outputs) > 1:
        trainer.sae.metadata |= by_site(widths_out, scales_out)
        fires_N = metrics.frequency_N > 0
        counts = [int(fires_N[one.cpu()].sum()) for one in exclusive_features(trainer.sae)]
        exclusive = dict(zip(map(str, route.outputs), counts, strict=True))
    return metrics.as_dict() | {
        "updates_per_second": trainer.updates / seconds if seconds else None,
        "dead_fraction": float(dead_N.double().mean()),
        "max_decoder_cosine": max_cosines(trainer.sae.W_dec.detach()).double().mean().item(),
        "steps": {"planned": config.steps, "executed": trainer.updates},
        **({"r2_by_site": _by_site(route.outputs, metrics.r2_by_site)} if len(route.outputs) > 1 else {}),
        **({"exclusive_features": exclusive} if exclusive else {}),
        "scale": _by_site(route.inputs, scales_in),
        **({"scale_out": _by_site(route.outputs, scales_out)} if trainer.target else {}),
    }


def _by_site(sites: Sequence[Site], numbers: Sequence[float]) -> float | dict[str, float]:
    """One number for one site; for several a number each, by name."""
    return numbers[0] if len(sites) == 1 else dict(zip(map(str, sites), numbers, strict=True))


def _placed(route: Route) -> dict[str, Any]:
    """Where an SAE stands, under SAELens' names; of several sites all hooks as one name."""
    placed: dict[str, Any] = {"hook_name": hooks(route.inputs), "hook_layer": route.inputs[0].layer or 0}
    if route.is_transcoder:
        placed |= {"hook_name_out": hooks(route.outputs), "hook_layer_out": route.outputs[0].layer or 0}
    return placed


def ce_scores(config: RunConfig, source: ActivationSource, trained: Trained) -> dict[str, float | None]:
    """Cross-entropy score of every exported SAE on a few held-out contexts; None where no language model predicts."""
    scores: dict[str, float | None] = dict.fromkeys(trainer.name for trainer in trained.trainers)
    model = getattr(source, "model", None)
    if not isinstance(model, LanguageModel) or not model.predicts:
        return scores
    chunk = next(iter(source.chunks(None, held_out=True)))  # All ranks share this pass, also those without an SAE.
    rows_filter = RowFilter(config.buffer, config.sites, source.special_ids)
    rows_filter.limits = trained.buffer.filter.limits
    keep_CT = rows_filter.mask(chunk)[:SPLICED_CONTEXTS]
    if not scores or not keep_CT[:, :-1].any():
        return scores
    saes: dict[Any, dict[str, Any]] = {}
    for trainer in trained.trainers:
        saes.setdefault(config.dictionaries[trainer.name][0], {})[trainer.name] = trainer.sae
    chunk = chunk.of_first(SPLICED_CONTEXTS)
    apart = () if chunk.positions_BT is None else (chunk.positions_BT,)
    found = preservation(model, saes, [(chunk.tokens_BT, keep_CT, *apart)], config.seed)
    return {name: found[name]["model_performance_preservation"]["ce_loss_score"] for name in scores}


def held_out_rows(config: RunConfig, source: ChunkSource, trained_filter: RowFilter) -> Iterator[list[Tensor]]:
    """Rows of held-out text, filtered by the norms training was filtered by, `held_out_tokens` in all."""
    rows_filter = RowFilter(config.buffer, config.sites, source.special_ids)
    rows_filter.limits = trained_filter.limits
    left = config.training.held_out_tokens
    for chunk in source.chunks(None, held_out=True):
        rows = [site_rows[:left] for site_rows in rows_filter(chunk)]
        left -= len(rows[0])
        if len(rows[0]):
            yield rows
        if left == 0:
            return
    if left == config.training.held_out_tokens:
        raise TextError(
            "no held-out row is left to measure on, although the plan found some; expected the text to be as it was; "
            "put it back and resume"
        )


def _checksum(identity: Any) -> str:
    """Of what says which model, text or activations a run read."""
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=8).hexdigest()


def _reduction(name: str, twins: dict[str, str], measured: dict[str, dict[str, Any]]) -> float | None:
    """1 - top correlation / the twin's; None without a twin."""
    if name not in twins:
        return None
    twin = measured[twins[name]]["correlation_top"]
    return 1 - measured[name]["correlation_top"] / twin if twin > 0 else None


def warnings_of(summary: dict[str, Any], config: RunConfig) -> list[str]:
    """What a user should know about the SAEs of a finished run, and which setting to move."""
    found: list[str] = []
    documents, steps = summary["documents"], summary.get("steps", {"planned": 0, "executed": 0})
    if steps["executed"] < steps["planned"]:
        found.append(
            f"the text was used up after {steps['executed']:,} of {steps['planned']:,} steps: the SAEs are those of "
            f"{steps['executed'] * config.training.batch_tokens:,} tokens; give more text, or lower training.tokens to "
            "that for a learning rate that falls to its end"
        )
    if documents["skipped"]:
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in sorted(documents["skipped"].items()))
        found.append(f"of {documents['seen']:,} documents some were left out: {reasons}")
    settings = {name: config.variant(variant) for name, (_, variant) in config.dictionaries.items()}
    for name, metrics in summary["saes"].items():
        sae, lr = settings[name].sae, settings[name].optimiser.lr
        r2 = metrics.get("r2", 1.0)
        if r2 is None or r2 < 0:
            found.append(
                f"{name} ends with R² = {'nothing that is finite' if r2 is None else f'{r2:.3g}'}, worse than the mean "
                f"activation: its training diverged; lower optimiser.lr (now {lr:g})"
            )
            continue
        if not 0 < metrics["l0"] < sae.n_features / 2:
            move = "lower" if sae.has_k == (metrics["l0"] > 0) else "raise"
            setting = "{} (now {:g})".format(*sae.sparsity_setting)
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
