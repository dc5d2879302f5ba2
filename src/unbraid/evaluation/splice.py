"""What a language model loses when an SAE's reconstruction takes the place of its activations.

Cross-entropy and KL divergence of the spliced model beside those of the intact model and of one whose site is zeroed
everywhere, under SAEBench's names. A transcoder's prediction takes the place of the site it predicts, made from what
the same pass had at the site it reads; a dictionary of several sites is given those of the intact model, and all sites
it predicts are replaced in one pass. Dictionaries replaced `Together`, at a site each, read what the model has there
with the others in place. Positions that do not count (special tokens) keep their original activations and are left out
of the means, by input token. Log-probabilities come from one log-softmax; SAEBench's log of a softmax turns to NaN
where a probability underflows. The intact pass is shared by all SAEs, the ablated one by those of a site.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from unbraid.errors import EvaluationError
from unbraid.evaluation.intervals import bootstrap_interval
from unbraid.evaluation.protocols import Autoencoder, predicted
from unbraid.sites import Route, Site


@runtime_checkable
class Spliceable(Protocol):
    """A language model whose activations at a site can be replaced."""

    def logits(self, tokens: Any, site: Any = None, replace: Any = None) -> Tensor:
        """Next-token logits `[C, T, V]`; with `replace`, computed on what it returns for the site's activations."""
        ...


class Together(NamedTuple):
    """Routes of dictionaries that are replaced in one pass; with them stand tuples of dictionaries."""

    routes: tuple[Route, ...]


@torch.no_grad()
def preservation(
    model: Spliceable,
    saes: Mapping[Any, Mapping[str, Any]],
    contexts: Iterable[tuple[Tensor, ...]],
    seed: int = 0,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Cross-entropy and KL of every SAE.

    Args:
        model: anything with `logits(tokens, site, replace)`.
        saes: site, as the model takes it -> name -> SAE acting on raw activations of the site; no name twice. A `Route`
            says that what is read and what is replaced differ, `Together` that several are; the model then has
            `visiting` as well.
        contexts: token ids `[C, T]` and which positions count and are replaced `[C, T]`; any number of contexts at a
            time. A third table `[C, T]` has positions that start anew with each document of a context; the model then
            takes `positions=`.
        seed: of the bootstrap over contexts.

    Where a transcoder reads a site that the model reaches after the one it predicts, its numbers are NaN.

    Returns:
        SAE name -> `model_behavior_preservation` (kl_div_*) and `model_performance_preservation` (ce_loss_*), each with
        the 95 % interval of its score over contexts, and `token_stats`.

    Raises:
        EvaluationError: no position counts.
    """
    tables = spliced_sums(model, saes, contexts)
    return {name: summary(table, seed) for name, table in tables.items()}


SUMS = ("positions", "kept", "targets", "kl_sae", "kl_ablation", "ce_sae", "ce_model", "ce_ablation")


@torch.no_grad()
def spliced_sums(
    model: Spliceable, saes: Mapping[Any, Mapping[str, Any]], contexts: Iterable[tuple[Tensor, ...]]
) -> dict[str, np.ndarray]:
    """Of every SAE `[contexts, SUMS]`: counts of positions, and KL and cross-entropy summed over them.

    Arguments are those of `preservation`. Of two SAEs at the same site on the same contexts the rows are paired.
    """
    rows: dict[str, list[np.ndarray]] = {name: [] for here in saes.values() for name in here}
    for tables in contexts:
        # One context at a time: it is the unit of the bootstrap, and its logits fit any memory.
        for tokens_1T, keep_1T, *apart in zip(*(table_CT.split(1) for table_CT in tables), strict=True):
            logits: Callable[..., Tensor] = model.logits
            logits = partial(logits, positions=apart[0]) if apart else logits
            for name, sums in _one_context(model, logits, saes, tokens_1T, keep_1T):
                rows[name].append(sums)
    return {name: np.array(table) for name, table in rows.items()}


def _one_context(
    model: Any,
    logits: Callable[..., Tensor],
    saes: Mapping[Any, Mapping[str, Any]],
    tokens_1T: Tensor,
    keep_1T: Tensor,
) -> Iterator[tuple[str, np.ndarray]]:
    intact = logits(tokens_1T).float().log_softmax(-1)
    probability = intact.exp()
    targets, keep_1T = tokens_1T.to(intact.device)[:, 1:, None], keep_1T.to(intact.device)
    counts = keep_1T.numel(), keep_1T.sum(), keep_1T[:, :-1].sum()

    def losses(found: Tensor) -> tuple[Tensor, Tensor]:
        """(KL divergence from the intact model, cross-entropy) of log-probabilities, summed over what counts."""
        kl = (probability * (intact - found)).sum(-1)[keep_1T]
        ce = -found[:, :-1].gather(2, targets).squeeze(2)[keep_1T[:, :-1]]
        return kl.double().sum(), ce.double().sum()

    def spliced(site: Any, replace: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        return losses(logits(tokens_1T, site, replace).float().log_softmax(-1))

    def all_spliced(replace: Mapping[Site, Callable[[Tensor], Tensor]]) -> tuple[Tensor, Tensor]:
        with model.visiting(replace):
            return losses(logits(tokens_1T).float().log_softmax(-1))

    def where_kept(y_hat_1TM: Tensor, y_1TM: Tensor) -> Tensor:
        return torch.where(keep_1T.to(y_1TM.device).unsqueeze(2), y_hat_1TM.to(y_1TM.dtype), y_1TM)

    def reconstruction(sae: Autoencoder, seen: list[Tensor] | None) -> Callable[[Tensor], Tensor]:
        def replace(y_1TM: Tensor) -> Tensor:
            if seen is not None and not seen:
                return torch.full_like(y_1TM, torch.nan)
            x_1TD = y_1TM if seen is None else seen.pop()
            return where_kept(predicted(sae, x_1TD, sae.encode(x_1TD)), y_1TM)

        return replace

    def reconstructions(route: Route, sae: Autoencoder, seen: dict[Site, Tensor]) -> dict[Site, Any]:
        x_1TD = torch.cat([seen[site] for site in route.inputs], dim=-1)
        y_hat_1TM = predicted(sae, x_1TD, sae.encode(x_1TD))
        parts = y_hat_1TM.split([seen[site].shape[-1] for site in route.outputs], dim=-1)
        return {site: partial(where_kept, part) for site, part in zip(route.outputs, parts, strict=True)}

    def together(routes: tuple[Route, ...], saes: tuple[Autoencoder, ...]) -> dict[Site, Any]:
        seen: dict[Site, Tensor] = {}
        predicting = {route.writes: (route, sae) for route, sae in zip(routes, saes, strict=True)}

        def visit(site: Site, y_1TM: Tensor) -> Tensor:
            if site in predicting:
                route, sae = predicting[site]
                x_1TD = seen.get(route.reads) if route.is_transcoder else y_1TM
                missing = torch.full_like(y_1TM, torch.nan)
                y_1TM = where_kept(missing if x_1TD is None else predicted(sae, x_1TD, sae.encode(x_1TD)), y_1TM)
            seen[site] = y_1TM.clone()
            return y_1TM

        return {site: partial(visit, site) for route in routes for site in route.ends}

    _, ce_model = losses(intact)
    for place, here in saes.items():
        several, site = isinstance(place, Route) and place.has_several_sites, place
        if isinstance(place, Together):
            whole: dict[Site, Tensor] = {}
            kl_ablation, ce_ablation = all_spliced({route.writes: torch.zeros_like for route in place.routes})
        elif several:
            whole = {}
            with model.visiting({site: partial(_keep, whole, site) for site in place.ends}):
                logits(tokens_1T)
            kl_ablation, ce_ablation = all_spliced(dict.fromkeys(place.outputs, torch.zeros_like))
        else:
            whole, site = {}, place.writes if isinstance(place, Route) else site
            kl_ablation, ce_ablation = spliced(site, torch.zeros_like)
        for name, sae in here.items():
            if isinstance(place, Together):
                kl, ce = all_spliced(together(place.routes, sae))
            elif several:
                kl, ce = all_spliced(reconstructions(place, sae, whole))
            else:
                with _seen_at(model, place) as seen:
                    kl, ce = spliced(site, reconstruction(sae, seen))
            sums = (*counts, kl, kl_ablation, ce, ce_model, ce_ablation)
            yield name, np.array([float(value) for value in sums])


def _keep(found: dict[Site, Tensor], site: Site, x_1TD: Tensor) -> None:
    found[site] = x_1TD.clone()


@contextmanager
def _seen_at(model: Any, place: Any) -> Iterator[list[Tensor] | None]:
    """What a pass has at the site that a transcoder reads; None for an SAE, which reads what it replaces."""
    if not isinstance(place, Route) or not place.is_transcoder:
        yield None
        return
    seen: list[Tensor] = []
    with model.visiting({place.reads: lambda x_1TD: seen.append(x_1TD.clone())}):
        yield seen


def summary(table: np.ndarray, seed: int) -> dict[str, dict[str, Any]]:
    """What `preservation` says of one SAE, from its sums."""
    total = table.sum(0) if len(table) else np.zeros(len(SUMS))
    positions, kept, targets = (int(count) for count in total[:3])
    if targets == 0:
        raise EvaluationError("no position is left to measure on; expected contexts with tokens that are not special")
    kl_sae, kl_ablation = total[3:5] / kept
    ce_sae, ce_model, ce_ablation = total[5:] / targets

    def interval(score: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float] | None:
        if np.isnan(table).any():
            return None
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
