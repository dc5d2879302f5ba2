"""Controls that were trained, with half of the SAE left as it was drawn (arXiv 2602.14111).

Of a frozen decoder only the encoder learns, of a frozen encoder only the decoder, and a soft-frozen decoder's rows stay
within a cosine of 0.8 of where they began. Such SAEs come close to whole ones in probing and editing, so a number that
is no better than theirs says nothing about what an SAE has learned. They are of the width and sparsity of the SAE they
stand beside, trained on fewer tokens (`control_tokens`), once: they are kept in unbraid's cache.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unbraid import formats
from unbraid.config import DecorrelationConfig, OptimiserConfig, SAEConfig, VariantConfig
from unbraid.errors import EvaluationError
from unbraid.fitting import fit
from unbraid.text.cache_folder import cache_root, publish

VERSION = 1
FROZEN = {"frozen-decoder": "decoder", "soft-frozen-decoder": "near", "frozen-encoder": "encoder"}
"""Control -> `sae.frozen`."""
BATCH_TOKENS = 512
"""Small, so that few tokens are many steps."""
LR, WARMUP_STEPS = 2e-3, 20
WIDEST = 1 << 15
"""Features; wider ones would take longer to train than all suites together."""


class ControlSite(NamedTuple):
    """What the controls of one site depend on.

    Attributes:
        width: features.
        k: active ones per token.
        seed: of weights and of the order of rows.
        source: which activations: model, text, site and row filter, as JSON data.
        tokens: rows to train on.
    """

    width: int
    k: int
    seed: int
    source: dict[str, Any]
    tokens: int

    @property
    def folder(self) -> Path:
        """Where they are kept."""
        told = json.dumps([VERSION, BATCH_TOKENS, LR, WARMUP_STEPS, *self], sort_keys=True, default=str)
        return cache_root() / "controls" / hashlib.blake2b(told.encode(), digest_size=16).hexdigest()


def trained_controls(
    site: ControlSite,
    rows: Callable[[], Tensor],
    device: torch.device,
    on_step: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """The three controls by name, from the cache where they are kept.

    Args:
        site: which.
        rows: gives the activations to train on, `[rows, D]`; called only where nothing is kept.
        device: where they are trained and put.
        on_step: called after every step.

    Raises:
        EvaluationError: there are too few rows for one step, or the cache cannot be written.
    """
    folder = publish(site.folder, lambda place: _train(site, rows(), place, device, on_step), EvaluationError)
    return {name: formats.load(folder / name).to(device) for name in FROZEN}


def steps_on(rows: int) -> int:
    """Training steps that so many rows are good for."""
    return rows // BATCH_TOKENS


def _train(site: ControlSite, x_RD: Tensor, folder: Path, device: torch.device, on_step: Callable[[], None]) -> None:
    steps = steps_on(len(x_RD))
    if steps < 1:
        raise EvaluationError(
            f"the text gives {len(x_RD)} rows to train controls on; expected at least {BATCH_TOKENS}; give more text, "
            "or set control_tokens to 0"
        )
    settings = {
        name: VariantConfig(
            seed=site.seed,
            sae=SAEConfig(architecture="batch_topk", n_features=site.width, k=min(site.k, site.width), frozen=frozen),
            optimiser=OptimiserConfig(lr=LR, warmup_steps=WARMUP_STEPS),
            decorrelation=DecorrelationConfig(method="none"),
        )
        for name, frozen in FROZEN.items()
    }
    tokens = steps * BATCH_TOKENS
    saes = fit(
        settings,
        x_RD,
        tokens=tokens,
        batch_tokens=BATCH_TOKENS,
        seed=site.seed,
        callback=lambda _step, _metrics: on_step(),
        device=str(device),
    )
    folder.mkdir()
    for name, sae in saes.items():
        formats.save(sae, folder / name, metadata={"training_tokens": tokens})
