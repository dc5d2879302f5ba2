"""What a language model holds at chosen places of short texts, for evaluations that read a position or a few of each.

Activations cost a model pass and are the same for every SAE of a site, so they are kept in unbraid's cache.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unbraid.errors import EvaluationError
from unbraid.text.cache_folder import cache_root, read_published

BATCH_PROMPTS = 16
Rows = Sequence[Sequence[int]]


def cached_activations(
    model: Any, prompts: Rows, places: Rows, on_prompts: Callable[[int], None] = lambda done: None
) -> list[Tensor]:
    """`activations_at`, from unbraid's cache once they have been computed for this model, sites, prompts and places."""
    asked = [
        "masked",
        model.identity,
        [str(site) for site in model.sites],
        list(map(list, prompts)),
        list(map(list, places)),
    ]
    digest = hashlib.blake2b(json.dumps(asked).encode(), digest_size=12)

    def write(path: Path) -> None:
        found = activations_at(model, prompts, places, on_prompts)
        save_file({str(site): x.contiguous() for site, x in enumerate(found)}, path)

    def read(path: Path) -> list[Tensor]:
        stored = load_file(path)
        return [stored[str(site)] for site in range(len(model.sites))]

    target = cache_root() / "prompts" / f"{digest.hexdigest()}.safetensors"
    return read_published(target, write, read, (SafetensorError, KeyError), EvaluationError)


def activations_at(
    model: Any, prompts: Rows, places: Rows, on_prompts: Callable[[int], None] = lambda done: None
) -> list[Tensor]:
    """Activations `[all places, D]`, prompt after prompt, one tensor a site, in float32.

    Args:
        model: anything with `activations(tokens, mask)`.
        prompts: token ids.
        places: for each prompt the positions that are wanted.
        on_prompts: called with the number of prompts read so far.
    """
    ends = np.cumsum([0, *map(len, places)])
    found: list[Tensor] = []
    done = 0
    for batch, tokens_CT, mask_CT in prompt_batches(prompts, BATCH_PROMPTS):
        captured = model.activations(tokens_CT, mask_CT)
        found = found or [torch.zeros(int(ends[-1]), x_CTD.shape[2]) for x_CTD in captured]
        for kept, x_CTD in zip(found, captured, strict=True):
            for row, i in enumerate(batch):
                kept[ends[i] : ends[i + 1]] = x_CTD[row, list(places[i])].float().cpu()
        done += len(batch)
        on_prompts(done)
    return found


def prompt_batches(prompts: Rows, size: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Prompts of similar length together: which ones, their tokens `[C, T]` and where there is a token, `[C, T]`.

    Shorter ones are filled up at the end; the mask keeps a model that looks ahead from reading the filling.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for first in range(0, len(order), size):
        batch = order[first : first + size]
        tokens_CT = torch.zeros(len(batch), len(prompts[batch[-1]]), dtype=torch.int64)
        mask_CT = torch.zeros_like(tokens_CT)
        for row, i in enumerate(batch):
            tokens_CT[row, : len(prompts[i])] = torch.tensor(prompts[i])
            mask_CT[row, : len(prompts[i])] = 1
        yield batch, tokens_CT, mask_CT
