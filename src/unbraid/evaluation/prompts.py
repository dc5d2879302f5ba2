"""What a language model holds at the end of a prompt, for evaluations that read one position of many short texts.

Activations cost a model pass and are the same for every SAE of a site, so they are kept in unbraid's cache.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from unbraid.errors import EvaluationError
from unbraid.text.cache_folder import cache_root, publish

BATCH_PROMPTS = 16


def cached_activations(
    model: Any, prompts: Sequence[Sequence[int]], on_prompts: Callable[[int], None] = lambda done: None
) -> list[Tensor]:
    """`last_token_activations`, from unbraid's cache once they have been computed for this model, sites and prompts."""
    digest = hashlib.blake2b(digest_size=12)
    digest.update(json.dumps([model.identity, [str(site) for site in model.sites], list(map(list, prompts))]).encode())

    def write(path: Path) -> None:
        found = last_token_activations(model, prompts, on_prompts)
        save_file({str(site): x.contiguous() for site, x in enumerate(found)}, path)

    path = publish(cache_root() / "prompts" / f"{digest.hexdigest()}.safetensors", write, EvaluationError)
    stored = load_file(path)
    return [stored[str(site)] for site in range(len(model.sites))]


def last_token_activations(
    model: Any, prompts: Sequence[Sequence[int]], on_prompts: Callable[[int], None] = lambda done: None
) -> list[Tensor]:
    """Activations `[prompts, D]` at the last token of each prompt (token ids), one tensor a site, in float32.

    Args:
        model: anything with `activations(tokens)`.
        prompts: token ids.
        on_prompts: called with the number of prompts read so far.
    """
    found: list[Tensor] = []
    done = 0
    for batch, tokens_CT, last_C in prompt_batches(prompts, BATCH_PROMPTS):
        captured = model.activations(tokens_CT)
        found = found or [torch.zeros(len(prompts), x_CTD.shape[2]) for x_CTD in captured]
        for kept, x_CTD in zip(found, captured, strict=True):
            kept[batch] = x_CTD[torch.arange(len(batch)), last_C].float().cpu()
        done += len(batch)
        on_prompts(done)
    return found


def prompt_batches(prompts: Sequence[Sequence[int]], size: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Prompts of similar length together: which ones, their tokens `[C, T]`, and the place of the last one `[C]`.

    What pads the shorter ones comes after their last token, where a causal model does not look.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for first in range(0, len(order), size):
        batch = order[first : first + size]
        lengths = torch.tensor([len(prompts[i]) for i in batch])
        tokens_CT = torch.zeros(len(batch), int(lengths.max()), dtype=torch.int64)
        for row, i in enumerate(batch):
            tokens_CT[row, : len(prompts[i])] = torch.tensor(prompts[i])
        yield batch, tokens_CT, lengths - 1
