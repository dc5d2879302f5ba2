"""Fine-tune a finished dictionary for what the language model makes of its reconstructions.

Training minimises ||x - x_hat||^2, and what the model does next depends on few directions of x. Here the loss is taken
at the end of the model: the KL divergence between its next-token distributions with and without the reconstruction, or
the cross-entropy of the spliced model. A share of the reconstruction error, brought to the size of that loss, keeps
features what they were (Karvonen, arXiv 2503.17272). Codes are those of inference, as sparse as the architecture makes
them.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from unbraid import formats
from unbraid.activations.live import LiveActivations
from unbraid.activations.rows import RowFilter
from unbraid.config import EvaluationConfig, RunConfig, overridden
from unbraid.device import pick_device
from unbraid.errors import ConfigError, EvaluationError, TrainingError
from unbraid.evaluation.explained import ExplainedVariance
from unbraid.evaluation.intervals import bootstrap_interval
from unbraid.evaluation.protocols import predicted
from unbraid.evaluation.said import said_by_hand
from unbraid.evaluation.splice import SUMS, spliced_sums, summary
from unbraid.evaluation.subjects import EvaluatedSAE, open_subjects
from unbraid.formats.folder import check_sae_folder
from unbraid.progress import Progress, default_console
from unbraid.sae import SAE
from unbraid.sites import Route

WARM_UP = 0.05
"""Share of the steps over which the learning rate rises; from then on it falls to nothing."""
LEARNED = {"all": None, "decoder": ("W_dec", "b_dec", "W_skip"), "biases": ("b_enc", "b_gate", "b_mag", "b_dec")}
"""What `learned` may be -> names of parameters; none for every one."""


SHOWN = {
    "ce_loss": ("CE", ".4f"),
    "ce_loss_score": ("CE score", ".4f"),
    "kl_div_score": ("KL score", ".4f"),
    "r2": ("R²", ".4f"),
    "l0": ("L0", ".1f"),
}


class Scores(NamedTuple):
    """What a dictionary keeps of its model, on held-out contexts.

    Attributes:
        ce_loss: cross-entropy of the spliced model, in nats.
        ce_loss_score: 1 where the spliced model predicts as well as the intact one, 0 as badly as with the site zeroed.
        kl_div_score: the same of the divergence from the intact model.
        r2: share of the variance of what is predicted that is explained.
        l0: active features per token.
    """

    ce_loss: float
    ce_loss_score: float
    kl_div_score: float
    r2: float
    l0: float


@dataclass(frozen=True)
class Finetuned:
    """What came of it.

    Attributes:
        sae: the dictionary, on raw activations.
        path: its folder.
        before, after: measured on the same held-out contexts.
        ce_change: of the cross-entropy of the spliced model, in nats a token; below 0 it predicts better.
        ce_change_interval: its 95 % interval over contexts, before and after paired; None of one context.
        tokens: of training text.
    """

    sae: SAE
    path: Path
    before: Scores
    after: Scores
    ce_change: float
    ce_change_interval: tuple[float, float] | None
    tokens: int


def finetune(
    source: Path | str,
    out: Path | str,
    *,
    tokens: int = 131_072,
    loss: Literal["kl", "ce"] = "kl",
    mse: float = 1.0,
    lr: float = 1e-4,
    learned: Literal["all", "decoder", "biases"] = "all",
    batch_contexts: int = 4,
    held_out_contexts: int = 32,
    model: str | None = None,
    site: str | None = None,
    text: str | list[str] | None = None,
    device: str = "auto",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    console: Console | None = None,
) -> Finetuned:
    """Fine-tune the dictionary at `source` end to end and write it to `out`.

    Args:
        source: the folder of one dictionary, in a run or in any layout, or a name that `unbraid.load` takes.
        out: folder to write, in SAELens' layout.
        tokens: of training text, in whole contexts.
        loss: at the end of the model: kl, the divergence from its own next-token distribution, or ce, cross-entropy.
        mse: how large the share of the reconstruction error is, relative to that loss; 0 leaves it out.
        lr: Adam's learning rate at its highest.
        learned: all weights, the decoder with its bias, or biases alone.
        batch_contexts: contexts a step.
        held_out_contexts: contexts on which the dictionary is measured before and after.
        model, site, text: where the folder does not say; a dictionary in a run belongs to the run's.
        device: auto, cpu, cuda, ...
        overwrite: replace an SAE folder that unbraid wrote.
        trust_remote_code: allow code that comes with the model.
        console: where progress is shown.

    Raises:
        UnbraidError: with what was wrong, what was expected and what to change.

    Example:
        >>> tuned = finetune("runs/tiny/saes/resid_post.1_twin", "runs/tuned", tokens=2048, held_out_contexts=4)
        >>> tuned.after.ce_loss_score is not None
        True
    """
    counts = {"tokens": tokens, "batch_contexts": batch_contexts, "held_out_contexts": held_out_contexts}
    for name, value in counts.items():
        if value < 1:
            raise ConfigError(f"{name} = {value}; expected at least 1")
    if not (math.isfinite(mse) and mse >= 0 and math.isfinite(lr) and lr > 0):
        raise ConfigError(f"mse = {mse}, lr = {lr}; expected mse of at least 0 and lr above 0")
    if loss not in ("kl", "ce") or learned not in LEARNED:
        raise ConfigError(f"loss = {loss!r}, learned = {learned!r}; expected kl or ce, and all, decoder or biases")
    check_sae_folder(Path(out), overwrite)
    place = pick_device(device)
    subject, config = _subject(source, model, site, text, place, trust_remote_code)
    activations = LiveActivations(config, place)
    if not activations.model.predicts:
        raise ConfigError(f"{activations.model_name} predicts no tokens; expected a model with a language-model head")
    work = _Work(subject, config, activations, loss, mse)
    steps = max(1, tokens // (batch_contexts * config.text.context_length))
    console = console or default_console()
    contexts = work.held_out(held_out_contexts)
    before, sums_before = work.scores(contexts)
    work.learn(LEARNED[learned])
    done = 0
    optimiser = torch.optim.Adam(work.parameters, lr=lr)
    with Progress(console, "fine-tuning", steps, "steps") as progress:
        for batch in work.batches(batch_contexts):
            rate = min((done + 1) / max(1.0, WARM_UP * steps), (steps - done) / steps)
            work.step(optimiser, lr * rate, batch, done + 1)
            done += 1
            progress.update(done)
            if done == steps:
                break
    if done == 0:
        raise TrainingError(f"the text gave no {batch_contexts} contexts; give more text or lower batch_contexts")
    if done < steps:
        console.print(f"the text was used up after {done:,} of {steps:,} steps", highlight=False)
    sae = work.sae.requires_grad_(False)
    after, sums_after = work.scores(contexts)
    change, interval = _ce_change(sums_before, sums_after, config.seed)
    used = done * batch_contexts * config.text.context_length
    note = {"finetuned": {"loss": loss, "mse": mse, "lr": lr, "learned": learned, "tokens": used}}
    path = formats.save(sae.cpu(), Path(out), metadata=sae.metadata | note)
    return Finetuned(sae, path, before, after, change, interval, used)


def _ce_change(before: np.ndarray, after: np.ndarray, seed: int) -> tuple[float, tuple[float, float] | None]:
    """Cross-entropy after less that before, a token, and its interval over contexts."""
    targets, change = before[:, SUMS.index("targets")], (after - before)[:, SUMS.index("ce_sae")]
    interval = bootstrap_interval(lambda counts: (counts @ change) / (counts @ targets), len(targets), seed)
    return float(change.sum() / targets.sum()), interval


def score_table(tuned: Finetuned) -> Table:
    """Before and after, for a terminal."""
    table = Table("", *(name for name, _ in SHOWN.values()))
    for when, scores in (("before", tuned.before), ("after", tuned.after)):
        table.add_row(when, *(format(getattr(scores, key), form) for key, (_, form) in SHOWN.items()))
    between = "" if tuned.ce_change_interval is None else " (95 % {:+.4f} to {:+.4f})".format(*tuned.ce_change_interval)
    table.caption = f"CE changed by {tuned.ce_change:+.4f}{between}, paired by context"
    return table


def _subject(
    source: Path | str,
    model: str | None,
    site: str | None,
    text: str | list[str] | None,
    device: torch.device,
    trust_remote_code: bool,
) -> tuple[EvaluatedSAE, RunConfig]:
    settings = overridden(EvaluationConfig(), said_by_hand(model, site, text), "finetune")[0]
    subjects, config = open_subjects(source, settings, device, trust_remote_code, transcoders=True)
    if len(subjects) != 1:
        names = ", ".join(subject.name for subject in subjects)
        raise ConfigError(f"{str(source)!r} holds {names}; expected one dictionary; name {source}/saes/NAME")
    subject = subjects[0]
    if config is None or subject.centred:
        why = subject.unknown or "it was made for activations without their mean, which its own model does not give"
        raise EvaluationError(f"{str(source)!r} cannot be placed in a model: {why}")
    subject.require_one_site()
    return subject, config


class _Work:
    """The dictionary in its model."""

    def __init__(self, subject: EvaluatedSAE, config: RunConfig, source: LiveActivations, loss: str, mse: float):
        self.sae = copy.deepcopy(subject.sae).float()
        self.source, self.loss, self.mse = source, loss, mse
        self.reads = config.sites[subject.sites[0]]
        self.writes = subject.outputs[0] if subject.outputs else self.reads
        self.filter = RowFilter(config.buffer, source.sites, source.special_ids)
        self.seed = config.seed
        self.norm_N1 = self.sae.W_dec.detach().norm(dim=1, keepdim=True)

    def learn(self, names: tuple[str, ...] | None) -> None:
        """Let these parameters be changed; all of them without names."""
        for name, parameter in self.sae.named_parameters():
            parameter.requires_grad_(names is None or name in names)
        self.parameters = [parameter for parameter in self.sae.parameters() if parameter.requires_grad]

    def held_out(self, contexts: int) -> list[tuple[Tensor, ...]]:
        """Token ids, which positions count, and positions where documents are kept apart; one context each."""
        found: list[tuple[Tensor, ...]] = []
        for chunk in self.source.chunks(None, held_out=True):
            tables = [chunk.tokens_BT, self.filter.mask(chunk)]
            tables += [] if chunk.positions_BT is None else [chunk.positions_BT]
            found += zip(*(table.split(1) for table in tables), strict=True)
            if len(found) >= contexts:
                break
        if not found:
            raise EvaluationError("no held-out text to measure on; give more text or raise text.held_out_fraction")
        return found[:contexts]

    def batches(self, contexts: int) -> Iterator[tuple[Tensor, ...]]:
        """The same of training text, full batches of it."""
        for chunk in self.source.chunks(None):
            tables = [chunk.tokens_BT, self.filter.mask(chunk)]
            tables += [] if chunk.positions_BT is None else [chunk.positions_BT]
            for batch in zip(*(table.split(contexts) for table in tables), strict=True):
                if len(batch[0]) == contexts and batch[1].any():
                    yield batch

    def scores(self, contexts: list[tuple[Tensor, ...]]) -> tuple[Scores, np.ndarray]:
        """On held-out contexts, by what `unbraid eval` measures, and the sums of each context."""
        with torch.no_grad():
            route = Route((self.reads,), (self.writes,))
            sums = spliced_sums(self.source.model, {route: {"it": self.sae}}, contexts)["it"]
            found = summary(sums, self.seed)
            explained, active, rows = ExplainedVariance(), 0.0, 0
            for tokens_1T, keep_1T, *apart in contexts:
                seen: dict[str, Tensor] = {}
                with self.visiting(seen, None):
                    self.source.model.logits(tokens_1T, positions=apart[0] if apart else None)
                keep = keep_1T.to(seen["x"].device)
                x_RD, y_RM = seen["x"][keep].float(), seen["y"][keep].float()
                f_RN = self.sae.encode(x_RD)
                explained.add(y_RM, predicted(self.sae, x_RD, f_RN))
                active, rows = active + float((f_RN != 0).sum()), rows + len(x_RD)
        scores = Scores(
            found["model_performance_preservation"]["ce_loss_with_sae"],
            found["model_performance_preservation"]["ce_loss_score"],
            found["model_behavior_preservation"]["kl_div_score"],
            explained.r2,
            active / rows,
        )
        return scores, sums

    def visiting(self, seen: dict[str, Tensor], keep_CT: Tensor | None) -> Any:
        """Note what passes at both ends and, where `keep_CT`, put the prediction in its place."""

        def read(x_CTD: Tensor) -> None:
            seen["x"] = x_CTD.clone()

        def write(y_CTM: Tensor) -> Tensor | None:
            seen["y"] = y_CTM.clone()
            if keep_CT is None:
                return None
            if "x" not in seen:
                raise ConfigError(
                    f"the dictionary reads {self.reads}, which the model reaches after {self.writes}, what it "
                    "predicts; expected one that reads first"
                )
            x_RD = seen["x"][keep_CT].float()
            seen["y_hat"] = predicted(self.sae, x_RD, self.sae.encode(x_RD))
            return y_CTM.clone().index_put((keep_CT,), seen["y_hat"].to(y_CTM.dtype))

        return self.source.model.visiting(
            {self.writes: lambda y: (read(y), write(y))[1]}
            if self.reads == self.writes
            else {self.reads: read, self.writes: write}
        )

    def step(self, optimiser: torch.optim.Optimizer, lr: float, batch: tuple[Tensor, ...], number: int) -> None:
        """One update, counted from 1, on a few contexts, as `batches` gives them."""
        tokens_CT, keep_CT, *apart = batch
        model, positions = self.source.model, apart[0] if apart else None
        tokens_CT, keep_CT = tokens_CT.to(model.device), keep_CT.to(model.device)
        intact = model.logits(tokens_CT, positions=positions).float().log_softmax(-1) if self.loss == "kl" else None
        seen: dict[str, Tensor] = {}
        with torch.enable_grad():
            with self.visiting(seen, keep_CT):
                log_q = model.differentiable_logits(tokens_CT, positions=positions).float().log_softmax(-1)
            if intact is not None:
                value = (intact.exp() * (intact - log_q)).sum(-1)[keep_CT].mean()
            else:
                counts = keep_CT[:, :-1]
                value = -log_q[:, :-1].gather(2, tokens_CT[:, 1:, None]).squeeze(2)[counts].mean()
            total = value
            if self.mse:
                error = (seen["y"][keep_CT].float() - seen["y_hat"]).square().sum(1).mean()
                total = value + self.mse * (value / error.clamp(min=1e-30)).detach() * error
        optimiser.zero_grad()
        total.backward()
        if not all(p.grad is None or bool(p.grad.isfinite().all()) for p in self.parameters):
            raise TrainingError(f"the gradient is not finite at step {number}; expected a finite one; lower lr")
        for group in optimiser.param_groups:
            group["lr"] = lr
        optimiser.step()
        with torch.no_grad():  # rows keep the norms they came with
            W_dec = self.sae.W_dec
            W_dec.mul_(self.norm_N1 / W_dec.norm(dim=1, keepdim=True).clamp(min=1e-30))
