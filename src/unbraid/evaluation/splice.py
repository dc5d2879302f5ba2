"""What a language model loses when an SAE's reconstruction takes the place of its activations.

Cross-entropy and KL divergence of the spliced model beside those of the intact model and of one whose site is zeroed
everywhere, under SAEBench's names. Positions that do not count (special tokens) keep their original activations and are
left out of the means, by input token. Log-probabilities come from one log-softmax; SAEBench's log of a softmax turns to
NaN where a probability underflows. Intact and ablated passes are shared by all SAEs of a site.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from unbraid.errors import EvaluationError
from unbraid.evaluation.faces import Autoencoder
from unbraid.evaluation.intervals import bootstrap_interval

KeepRule = Callable[[Tensor, Tensor], Tensor]
"""Which positions count `[C, T]`, from their token ids `[C, T]` and activations `[C, T, D]`."""


@runtime_checkable
class Spliceable(Protocol):
    """A language model whose activations at a site can be replaced."""

    def logits(self, tokens: Any, site: Any = None, replace: Any = None) -> Tensor:
        """Next-token logits `[C, T, V]`; with `replace`, computed on what it returns for the site's activations."""
        ...


@torch.no_grad()
def preservation(
    model: Spliceable,
    site: Any,
    saes: Mapping[str, Autoencoder],
    contexts: Iterable[Tensor],
    keep: KeepRule,
    seed: int = 0,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Cross-entropy and KL of every SAE at one site.

    Args:
        model: anything with `logits(tokens, site, replace)`.
        site: handed to the model.
        saes: by name; they act on raw activations of the site.
        contexts: token ids `[C, T]`, any number of contexts at a time.
        keep: which positions count and are replaced.
        seed: of the bootstrap over contexts.

    Returns:
        SAE name -> `model_behavior_preservation` (kl_div_*) and `model_performance_preservation` (ce_loss_*), each with
        the 95 % interval of its score over contexts, and `token_stats`.

    Raises:
        EvaluationError: no position counts, or the model split a pass it was given.
    """
    rows: dict[str, list[np.ndarray]] = {name: [] for name in saes}
    for tokens_CT in contexts:
        for part_CT in tokens_CT.split(1):  # a context is the unit of the bootstrap, and its logits fit any memory
            for name, sums in _one_context(model, site, saes, part_CT, keep).items():
                rows[name].append(sums)
    return {name: _summary(np.array(table), seed) for name, table in rows.items()}


SUMS = ("positions", "kept", "targets", "kl_sae", "kl_ablation", "ce_sae", "ce_model", "ce_ablation")


def _one_context(
    model: Spliceable, site: Any, saes: Mapping[str, Autoencoder], tokens_1T: Tensor, keep: KeepRule
) -> dict[str, np.ndarray]:
    kept: list[Tensor] = []

    def with_mask(replacement: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def replace(x_CTD: Tensor) -> Tensor:
            if x_CTD.shape[:2] != tokens_1T.shape:
                raise EvaluationError(
                    f"the model passed {tuple(x_CTD.shape)} activations for tokens {tuple(tokens_1T.shape)}; expected "
                    "one position each; free memory or shorten the contexts"
                )
            kept[:] = [keep(tokens_1T.to(x_CTD.device), x_CTD)]
            return torch.where(kept[0].unsqueeze(2), replacement(x_CTD).to(x_CTD.dtype), x_CTD)

        return replace

    intact = model.logits(tokens_1T).float().log_softmax(-1)
    ablated = model.logits(tokens_1T, site, torch.zeros_like).float().log_softmax(-1)
    targets = tokens_1T.to(intact.device)[:, 1:, None]
    result = {}
    for name, sae in saes.items():
        spliced = model.logits(tokens_1T, site, with_mask(lambda x, sae=sae: sae.decode(sae.encode(x))))
        spliced = spliced.float().log_softmax(-1)
        counts = kept[0].to(intact.device)
        values = [counts.numel(), counts.sum(), counts[:, :-1].sum()]
        values += [_kl(intact, other)[counts].double().sum() for other in (spliced, ablated)]
        values += [_ce(other, targets)[counts[:, :-1]].double().sum() for other in (spliced, intact, ablated)]
        result[name] = np.array([float(value) for value in values])
    return result


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _ce(log_p: Tensor, targets: Tensor) -> Tensor:
    return -log_p[:, :-1].gather(2, targets).squeeze(2)


def _summary(table: np.ndarray, seed: int) -> dict[str, dict[str, Any]]:
    total = table.sum(0) if len(table) else np.zeros(len(SUMS))
    positions, kept, targets = (int(count) for count in total[:3])
    if targets == 0:
        raise EvaluationError("no position is left to measure on; expected contexts with tokens that are not special")
    kl_sae, kl_ablation = total[3:5] / kept
    ce_sae, ce_model, ce_ablation = total[5:] / targets

    def interval(score: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float] | None:
        return bootstrap_interval(lambda counts: score((counts @ table).T), len(table), seed)

    def kl_score(s: np.ndarray) -> np.ndarray:
        return 1 - s[3] / s[4]

    def ce_score(s: np.ndarray) -> np.ndarray:
        return (s[7] - s[5]) / (s[7] - s[6])

    return {
        "model_behavior_preservation": {
            "kl_div_score": float(kl_score(total[:, None])[0]),
            "kl_div_score_interval": interval(kl_score),
            "kl_div_with_sae": float(kl_sae),
            "kl_div_with_ablation": float(kl_ablation),
        },
        "model_performance_preservation": {
            "ce_loss_score": float(ce_score(total[:, None])[0]),
            "ce_loss_score_interval": interval(ce_score),
            "ce_loss_with_sae": float(ce_sae),
            "ce_loss_with_ablation": float(ce_ablation),
            "ce_loss_without_sae": float(ce_model),
        },
        "token_stats": {"total_tokens_eval_reconstruction": positions, "kept_tokens_reconstruction": kept},
    }
