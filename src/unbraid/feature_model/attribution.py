"""How much each feature of a prompt contributes to a metric of the logits, and what that leaves unexplained.

Three methods. `gradient`: code times the metric's derivative by it, for all sites from one forward and one backward
pass. `ig`: the same averaged along the path from the features' baseline to their codes, by the midpoint rule, with as
many steps as the gap needs. `ablate`: exact, one pass per active feature. A positive contribution means that the metric
falls when the feature is taken away. Reconstruction error and bias are held in all three.

`gap` compares the sum with what taking all features of a site away together really does. Contributions of features that
interact need not add up, and those of a first-order method may be far off: the gap says how far.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unbraid.errors import FeatureError
from unbraid.feature_model.dictionaries import Dictionary, split_address
from unbraid.feature_model.logit_metric import bound_metric
from unbraid.feature_model.passes import TOKENS_AT_ONCE, Recorded
from unbraid.feature_model.prompts import Prompt
from unbraid.feature_model.reading import ReadingHook
from unbraid.feature_model.tables import Result, Table, require_rows

ENTRIES_AT_ONCE = 4096
FIRST_STEPS, MOST_STEPS, CLOSE = 8, 256, 0.01


@dataclass(frozen=True, eq=False)
class SiteAttribution:
    """Contributions of one dictionary's features.

    Attributes:
        positions: `[n]` of each contribution; None where a feature is taken as a whole.
        features, codes, values: `[n]` features, their codes (the largest, where taken as a whole) and contributions.
        error: `[T]` contribution of what is not reconstructed at each token.
        bias: of the decoder's bias.
        without: the metric with all features at their baseline.
    """

    positions: Tensor | None
    features: Tensor
    codes: Tensor
    values: Tensor
    error: Tensor
    bias: float
    without: float

    @property
    def total(self) -> float:
        """Sum of the features' contributions."""
        return float(self.values.double().sum())


@dataclass(frozen=True, eq=False, repr=False)
class Attribution(Result):
    """Contributions to a metric.

    Attributes:
        metric: its value on the prompt.
        method: how it was found.
        sites: NAME -> contributions.
        steps: passes of the path, for `ig`.
    """

    fm: Any
    tokens: list[str | None]
    metric: float
    method: str
    sites: dict[str, SiteAttribution]
    steps: int | None = None

    @property
    def error(self) -> dict[str, Tensor]:
        """NAME -> `[T]` contribution of what is not reconstructed."""
        return {name: site.error for name, site in self.sites.items()}

    @property
    def bias(self) -> dict[str, float]:
        """NAME -> contribution of the decoder's bias."""
        return {name: site.bias for name, site in self.sites.items()}

    @property
    def gaps(self) -> dict[str, float]:
        """NAME -> share of the features' true joint effect that their contributions miss; 0 where both are nothing."""
        found = {}
        for name, site in self.sites.items():
            effect = self.metric - site.without
            missed = abs(effect - site.total)
            found[name] = missed / abs(effect) if effect else (0.0 if missed == 0 else float("inf"))
        return found

    @property
    def gap(self) -> float:
        """The largest of `gaps`."""
        return max(self.gaps.values())

    def top(self, k: int = 10) -> Table:
        """The largest contributions, of either sign."""
        require_rows(k)
        table = self._largest(k)
        rows = [row | {"words": self.fm.words(*split_address(row["feature"]))} for row in table.rows]
        return Table([*table.columns, "words"], rows, table.caption, table.notes)

    def to_table(self) -> Table:
        """The ten largest."""
        return self.top()

    def _largest(self, k: int) -> Table:
        rows = []
        for name, site in self.sites.items():
            for place in site.values.abs().argsort(descending=True, stable=True)[:k].tolist():
                index = int(site.features[place])
                line = {"feature": f"{name}/{index}", "position": None, "token": None}
                if site.positions is not None:
                    line["position"] = int(site.positions[place])
                    line["token"] = self.tokens[int(site.positions[place])]
                line |= {"code": float(site.codes[place]), "contribution": float(site.values[place])}
                rows.append(line)
        rows.sort(key=lambda row: (-abs(row["contribution"]), row["feature"], row["position"] or 0))
        whole = all(site.positions is None for site in self.sites.values())
        columns = ["feature", *([] if whole else ["position", "token"]), "code", "contribution"]
        return Table(columns, rows[:k], f"contributions to the metric ({self.method})", self.notes)

    @property
    def notes(self) -> tuple[str, ...]:
        """One line per dictionary: sum, error, bias and gap."""
        lines = []
        for name, site in self.sites.items():
            gap = self.gaps[name]
            said = f"{gap:.1%}" if gap < 10 else f"{gap:.0f}x"
            lines.append(
                f"{name}: metric {self.metric:.4g}, without its features {site.without:.4g}; features "
                f"{site.total:.4g}, error {float(site.error.sum()):.4g}, bias {site.bias:.4g}; gap {said}"
            )
        return tuple(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values; an infinite gap is None."""
        sites = {
            name: {
                "features": site.total,
                "error": site.error.tolist(),
                "bias": site.bias,
                "without": site.without,
                "gap": self.gaps[name] if self.gaps[name] < float("inf") else None,
            }
            for name, site in self.sites.items()
        }
        return {"metric": self.metric, "method": self.method, "sites": sites, "contributions": self._all().rows}

    def _all(self) -> Table:
        return self._largest(sum(len(site.values) for site in self.sites.values()))

    def to_pandas(self) -> Any:
        """All contributions as a DataFrame."""
        return self._all().to_pandas()

    def _repr_html_(self) -> str:
        return self.top(50)._repr_html_()


@dataclass(eq=False)
class Parts:
    """A site's activations in parts: codes, what they write, what the reconstruction misses, and the bias.

    Attributes:
        codes: sparse `[T, N]`; change: the same less the baseline.
        scale_T1: what a unit of code writes at each token.
        error_TM, bias_TM: the rest, all that is there at tokens without codes being error.
        y_TM: the activations.
    """

    dictionary: Dictionary
    codes: Tensor
    change: Tensor
    scale_T1: Tensor
    error_TM: Tensor
    bias_TM: Tensor
    y_TM: Tensor

    def written(self, rows: Tensor, features: Tensor, values: Tensor) -> Tensor:
        """What some codes write, `[T, M]`."""
        out_TM = torch.zeros_like(self.y_TM)
        for part in torch.arange(len(rows)).split(ENTRIES_AT_ONCE):
            own = values[part, None].to(out_TM) * self.dictionary.W_dec[features[part]]
            out_TM.index_add_(0, rows[part].to(out_TM.device), own * self.scale_T1[rows[part]])
        return out_TM

    def times(self, g_TM: Tensor) -> Tensor:
        """Every change of a code times the gradient by that code."""
        rows, features = self.change.indices()
        found = [
            ((g_TM[rows[part]] * self.dictionary.W_dec[features[part]]).sum(1) * self.scale_T1[rows[part], 0]).cpu()
            for part in torch.arange(len(rows)).split(ENTRIES_AT_ONCE)
        ]
        return self.change.values() * (torch.cat(found) if found else torch.zeros(0))


@torch.no_grad()
def parts_of(dictionary: Dictionary, recorded: Recorded, to: Any = None) -> Parts:
    """The activations of a dictionary's site in a recorded pass, in parts.

    Args:
        dictionary: standing there.
        recorded: the pass.
        to: a reading of as many tokens, whose codes are the baseline; zero without it.
    """
    x_1TD, y_1TM = recorded.activations[dictionary.reads].detach(), recorded.activations[dictionary.writes].detach()
    mask_1T = recorded.batch.span.content_BT
    hook = ReadingHook(dictionary, mask_1T)
    hook.read(x_1TD)
    if dictionary.reads != dictionary.writes:
        hook.write(y_1TM)
    assert hook.codes is not None
    _, rows, features = hook.codes.indices()
    shape = tuple(hook.codes.shape[1:])
    codes = torch.sparse_coo_tensor(torch.stack([rows, features]), hook.codes.values(), shape).coalesce()
    change = codes
    if to is not None:
        base = to.codes.get(dictionary.name)
        if base is None or tuple(base.shape) != (1, *shape):
            raise FeatureError(
                f"the baseline has {tuple(base.shape[:2]) if base is not None else 'no'} tokens read by "
                f"{dictionary.name}; expected one prompt of {shape[0]} tokens"
            )
        _, other_rows, other_features = base.indices()
        base = torch.sparse_coo_tensor(torch.stack([other_rows, other_features]), base.values(), shape)
        change = (codes - base).coalesce()
    y_TM, mask_T = y_1TM[0].float(), mask_1T[0]
    x_RD = x_1TD[0][mask_T].float()
    scale_T1 = torch.ones(len(y_TM), 1, device=y_TM.device)
    error_TM, bias_TM = y_TM.clone(), torch.zeros_like(y_TM)
    if len(x_RD):
        scale_R1 = dictionary.token_scale(x_RD)
        if scale_R1 is not None:
            scale_T1[mask_T] = scale_R1
        f_RN = dictionary.encode(x_RD)
        error_TM[mask_T] = y_TM[mask_T] - dictionary.predict(x_RD, f_RN)
        bias_TM[mask_T] = dictionary.predict(x_RD, torch.zeros_like(f_RN))
    return Parts(dictionary, codes, change, scale_T1, error_TM, bias_TM, y_TM)


def attribute(fm: Any, prompt: Any, metric: Any, method: str, to: Any, sites: Sequence[str] | None) -> Attribution:
    """See `FeatureModel.attribute`."""
    if method not in METHODS:
        raise FeatureError(f"method {method!r} is unknown; expected one of {', '.join(METHODS)}")
    batch = one_prompt(fm, prompt)
    dictionaries = [fm.dictionaries[name] for name in (sites if sites is not None else fm.dictionaries)]
    if not dictionaries:
        raise FeatureError("sites is empty; expected at least one NAME")
    if to is not None and not hasattr(to, "codes"):
        to = fm.read(to)
    places = [place for one in dictionaries for place in (one.reads, one.writes)]
    recorded = Recorded(fm, batch, places, graph=method == "gradient")
    function = bound_metric(fm, batch, metric)
    value = function(recorded.logits)
    metric_value = float(value.detach())
    gradients: dict[Any, Tensor] = {}
    if method == "gradient":
        gradients = gradients_at(value, recorded, [one.writes for one in dictionaries])
    found: dict[str, SiteAttribution] = {}
    steps = None
    with torch.no_grad():
        for one in dictionaries:
            parts = parts_of(one, recorded, to)
            rows, features = parts.change.indices()
            base_TM = parts.y_TM - parts.written(rows, features, parts.change.values())
            without = float(metrics(recorded, one, base_TM[None], function)[0])
            if method == "gradient":
                site = _first_order(parts, gradients[one.writes][0], without)
            elif method == "ig":
                site, used = _along_the_path(parts, recorded, base_TM, function, metric_value, without)
                steps = max(steps or 0, used)
            else:
                site = _one_by_one(parts, recorded, function, metric_value, without)
            found[one.name] = site
    return Attribution(fm, fm.texts(batch, 0), metric_value, method, found, steps)


METHODS = ("gradient", "ig", "ablate")


def one_prompt(fm: Any, prompt: Any) -> Prompt:
    """A batch of exactly one prompt.

    Raises:
        FeatureError: there are several.
    """
    batch = fm.prompt(prompt)
    if len(batch.tokens_BT) != 1:
        raise FeatureError(f"{len(batch.tokens_BT)} prompts; expected one; call it for each")
    return batch


def gradients_at(value: Tensor, recorded: Recorded, places: Sequence[Any]) -> dict[Any, Tensor]:
    """Place -> gradient `[1, T, M]` in float32 of a metric of a recorded pass; zero where it does not depend."""
    if not value.requires_grad:
        raise FeatureError("the metric does not depend on the logits; expected a differentiable function of them")
    places = list(dict.fromkeys(places))
    taken = [recorded.activations[place] for place in places]
    found = torch.autograd.grad(value, taken, allow_unused=True)
    return {
        place: (torch.zeros_like(x) if g is None else g).float()
        for place, x, g in zip(places, taken, found, strict=True)
    }


def metrics(recorded: Recorded, dictionary: Dictionary, y_KTM: Tensor, metric: Callable[[Tensor], Tensor]) -> Tensor:
    """`[K]` metrics with other activations at a dictionary's site."""
    parts = recorded.passes(dictionary.writes, y_KTM)
    return torch.stack([metric(row[None]).detach().double() for _, logits in parts for row in logits]).cpu()


def _site(parts: Parts, values: Tensor, g_TM: Tensor, without: float) -> SiteAttribution:
    rows, features = parts.change.indices()
    codes = parts.codes.to_dense()[rows, features]
    error_T, bias_T = (g_TM * parts.error_TM).sum(1).cpu(), (g_TM * parts.bias_TM).sum(1)
    return SiteAttribution(rows, features, codes, values, error_T, float(bias_T.double().sum()), without)


def _first_order(parts: Parts, g_TM: Tensor, without: float) -> SiteAttribution:
    return _site(parts, parts.times(g_TM), g_TM, without)


def _along_the_path(
    parts: Parts, recorded: Recorded, base_TM: Tensor, metric: Callable[[Tensor], Tensor], value: float, without: float
) -> tuple[SiteAttribution, int]:
    """Gradients at the midpoints of equal steps from the baseline, steps doubling until the sum is close."""
    steps = FIRST_STEPS
    while True:
        alphas = (torch.arange(steps, device=base_TM.device) + 0.5) / steps
        mean_TM = torch.zeros_like(base_TM)
        rows_at_once = max(1, TOKENS_AT_ONCE // len(base_TM))
        for alpha_K in alphas.split(rows_at_once):
            y_KTM = base_TM + alpha_K[:, None, None] * (parts.y_TM - base_TM)
            with torch.enable_grad():
                for y_kTM, logits in recorded.passes(parts.dictionary.writes, y_KTM):
                    total = torch.stack([metric(row[None]) for row in logits]).sum()
                    mean_TM += torch.autograd.grad(total, y_kTM)[0].float().sum(0) / steps
        values = parts.times(mean_TM)
        effect = value - without
        if abs(effect - float(values.double().sum())) <= CLOSE * abs(effect) or steps >= MOST_STEPS:
            return _site(parts, values, mean_TM, without), steps
        steps *= 2


def _one_by_one(
    parts: Parts, recorded: Recorded, metric: Callable[[Tensor], Tensor], value: float, without: float
) -> SiteAttribution:
    """Clean minus ablated, feature by feature; then error token by token, and the bias."""
    rows, features = parts.change.indices()
    rows_at_once = max(1, TOKENS_AT_ONCE // len(parts.y_TM))
    values, codes, distinct = [], [], features.unique()
    for few in distinct.split(rows_at_once):
        changed = []
        for index in few.tolist():
            own = features == index
            codes.append(float(parts.change.values()[own].abs().max()))
            changed.append(parts.y_TM - parts.written(rows[own], features[own], parts.change.values()[own]))
        values.append(value - metrics(recorded, parts.dictionary, torch.stack(changed), metric))
    errors_T = []
    for token_K in torch.arange(len(parts.y_TM), device=parts.y_TM.device).split(rows_at_once):
        y_KTM = parts.y_TM.expand(len(token_K), -1, -1).clone()
        y_KTM[torch.arange(len(token_K)), token_K] -= parts.error_TM[token_K]
        errors_T.append(value - metrics(recorded, parts.dictionary, y_KTM, metric))
    bias = value - float(metrics(recorded, parts.dictionary, (parts.y_TM - parts.bias_TM)[None], metric)[0])
    return SiteAttribution(
        None,
        distinct,
        torch.tensor(codes),
        torch.cat(values) if values else torch.zeros(0),
        torch.cat(errors_T),
        bias,
        without,
    )
