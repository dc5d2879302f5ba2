"""Passes that begin at one place of the model with other activations there, many at a time, with gradients if wanted.

Blocks before the place are not run again: what the last of them gave in the first pass is kept.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from unbraid.activations.hooks import Place
from unbraid.errors import FeatureError
from unbraid.feature_model.hooks import StopPass, block_of, hooked, restarted
from unbraid.feature_model.prompts import Prompt

TOKENS_AT_ONCE = 1024
"""Tokens of repeated prompts in one pass."""


class Recorded:
    """One pass over one prompt, with the activations at some places as parts of a graph, and what restarts need.

    Attributes:
        logits: `[1, T, V]`.
        activations: place -> `[1, T, D]`, in the order the model reaches them; the first is a leaf.
    """

    def __init__(self, fm: Any, batch: Prompt, places: Sequence[Place], *, graph: bool):
        self.fm, self.batch = fm, batch
        self.activations: dict[Place, Tensor] = {}
        self.before: dict[int, Any] = {}
        hooks = [(place, self._tap(place, graph)) for place in dict.fromkeys(places)]
        self.layers = {place: block_of(fm.blocks, place) for place in places}
        layers = sorted(set(self.layers.values()) - {0})
        handles = [fm.blocks[layer - 1].register_forward_hook(self._keep(layer)) for layer in layers]
        try:
            with hooked(hooks), torch.set_grad_enabled(graph):
                self.logits: Tensor = fm.forward(batch)
        finally:
            for handle in handles:
                handle.remove()
        silent = [place.name for place in places if place not in self.activations]
        if silent:
            raise FeatureError(f"{', '.join(silent)} never fired in a pass; expected sites whose modules run")

    def _tap(self, place: Place, graph: bool) -> Callable[[Tensor], Tensor | None]:
        def tap(x_1TD: Tensor) -> Tensor | None:
            if graph and not any(one.requires_grad for one in self.activations.values()):
                x_1TD = x_1TD.detach()
            leaf = graph and not x_1TD.requires_grad
            self.activations[place] = x_1TD.requires_grad_() if leaf else x_1TD
            return x_1TD if leaf else None

        return tap

    def _keep(self, layer: int) -> Callable[..., None]:
        def keep(module: Any, inputs: Any, output: Any) -> None:
            self.before[layer] = _mapped(output, lambda x: x.detach())

        return keep

    def passes(self, start: Place, x_KTD: Tensor, *, seen: Place | None = None) -> list[tuple[Tensor, Tensor]]:
        """Passes with `x_KTD` at `start`, in parts: the activations used (leaves if gradients are on) and the logits.

        Args:
            start: where the pass begins.
            x_KTD: one set of activations for each of K passes.
            seen: end at this place and give its activations in place of logits.
        """
        parts = []
        for x_kTD in x_KTD.split(max(1, TOKENS_AT_ONCE // x_KTD.shape[1])):
            x_kTD = x_kTD.to(self.activations[start].dtype).detach().requires_grad_(torch.is_grad_enabled())
            parts.append((x_kTD, self._passed(start, x_kTD, seen)))
        return parts

    def _passed(self, start: Place, x_kTD: Tensor, seen: Place | None) -> Tensor:
        rows = len(x_kTD)
        found: list[Tensor] = []

        def stop(y_kTD: Tensor) -> None:
            found.append(y_kTD)
            raise StopPass

        hooks = [(start, lambda _: x_kTD), *([(seen, stop)] if seen is not None else [])]
        repeated = Prompt(
            self.batch.tokens_BT.expand(rows, -1), self.batch.real_BT.expand(rows, -1), self.batch.span, True
        )
        before = _mapped(self.before.get(self.layers[start]), lambda x: x.expand(rows, *x.shape[1:]))
        with restarted(self.fm.blocks, self.layers[start], before), hooked(hooks), suppress(StopPass):
            found.append(self.fm.forward(repeated))
        return found[0]


def _mapped(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A block's output with every tensor changed."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, tuple | list):
        return type(output)(_mapped(one, change) for one in output)
    return output
