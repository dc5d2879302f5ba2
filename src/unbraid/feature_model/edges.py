"""How features of one site feed features of a later one, and the graph that this makes for a metric.

An edge is a source code times the derivative of the target's code by it, through everything between the two sites:
attention patterns and norms move with the activations, so these are local derivatives, not the weights of a linear
graph. What the source's error and bias contribute stands beside the edges of every target.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from unbraid.errors import FeatureError
from unbraid.feature_model.attribution import (
    attribute,
    gradients_at,
    one_prompt,
    parts_of,
)
from unbraid.feature_model.dictionaries import Dictionary
from unbraid.feature_model.logit_metric import bound_metric
from unbraid.feature_model.passes import Recorded
from unbraid.feature_model.positions import check_positions
from unbraid.feature_model.tables import Result, Table, needed, require_rows

Target = tuple[int, int]
"""Position and feature."""


@dataclass(frozen=True, eq=False, repr=False)
class Edges(Result):
    """Edges from one dictionary's features to some of another's.

    Attributes:
        source, target: NAMEs.
        targets: (position, feature) of each target, K in all.
        values: sparse `[K, T, N]`: contribution of each source code to each target's code, or, with a metric, to the
            metric through that target.
        error: `[K, T]` of what the source does not reconstruct; bias: `[K]`.
        total: `[K]` vjp . x, the sum of all three.
    """

    fm: Any
    tokens: list[str | None]
    source: str
    target: str
    targets: list[Target]
    values: Tensor
    error: Tensor
    bias: Tensor
    total: Tensor

    def to_table(self) -> Table:
        """The twenty strongest."""
        return self.top()

    def top(self, k: int = 20) -> Table:
        """The strongest edges of either sign."""
        require_rows(k)
        which, positions, features = self.values.indices()
        values = self.values.values()
        rows = []
        for place in values.abs().argsort(descending=True, stable=True)[:k].tolist():
            at, index = self.targets[int(which[place])]
            position = int(positions[place])
            rows.append(
                {
                    "source": f"{self.source}/{int(features[place])}",
                    "position": position,
                    "token": self.tokens[position],
                    "target": f"{self.target}/{index}",
                    "target position": at,
                    "value": float(values[place]),
                }
            )
        columns = ["source", "position", "token", "target", "target position", "value"]
        note = "first order, through attention and norms as they are on this prompt"
        return Table(columns, rows, f"edges from {self.source} to {self.target}", (note,))

    def to_dict(self) -> dict[str, Any]:
        """Edges, errors and biases as plain values."""
        return {
            "targets": [{"position": at, "feature": f"{self.target}/{index}"} for at, index in self.targets],
            "edges": self.top(len(self.values.values())).rows,
            "error": self.error.tolist(),
            "bias": self.bias.tolist(),
        }

    def to_pandas(self) -> Any:
        """All edges as a DataFrame."""
        return self.top(len(self.values.values())).to_pandas()

    def _repr_html_(self) -> str:
        return self.top(50)._repr_html_()


@dataclass(frozen=True, repr=False)
class Graph(Result):
    """The strongest features of several sites for a metric, with edges between neighbouring sites.

    Attributes:
        nodes: address@position -> feature, position, token, code and contribution.
        edges: (source node, target node, contribution to the metric through both).
        metric: its value.
        gap: of the attribution the nodes come from.
    """

    nodes: dict[str, dict[str, Any]]
    edges: list[tuple[str, str, float]]
    metric: float
    gap: float

    def to_networkx(self) -> Any:
        """A networkx DiGraph with these nodes and edges.

        Raises:
            FeatureError: networkx is not installed.
        """
        graph = needed("networkx").DiGraph(metric=self.metric, gap=self.gap)
        graph.add_nodes_from(self.nodes.items())
        graph.add_weighted_edges_from(self.edges)
        return graph

    def to_table(self) -> Table:
        """The edges, strongest first."""
        rows = [{"source": a, "target": b, "value": value} for a, b, value in self.edges]
        note = f"metric {self.metric:.4g}; gap of the attribution {self.gap:.1%}; first order"
        return Table(["source", "target", "value"], sorted(rows, key=lambda row: -abs(row["value"])), "trace", (note,))

    def to_dict(self) -> dict[str, Any]:
        """Nodes and edges as plain values; an infinite gap is None."""
        edges = [{"source": a, "target": b, "value": value} for a, b, value in self.edges]
        gap = self.gap if self.gap < float("inf") else None
        return {"nodes": self.nodes, "edges": edges, "metric": self.metric, "gap": gap}


def edges(fm: Any, prompt: Any, source: str, target: str, at: Any, top: int, metric: Any) -> Edges:
    """See `FeatureModel.edges`."""
    if top < 1:
        raise FeatureError(f"top={top}; expected at least 1")
    batch = one_prompt(fm, prompt)
    one, other = fm.dictionaries[source], fm.dictionaries[target]
    mask_T = check_positions(at, batch.span)[0].cpu()
    places = [one.reads, one.writes, other.reads, other.writes]
    recorded = Recorded(fm, batch, places, graph=metric is not None)
    parts = parts_of(other, recorded)
    rows, features = parts.codes.indices()
    strength = parts.codes.values()
    if metric is not None:
        value = bound_metric(fm, batch, metric)(recorded.logits)
        strength = parts.times(gradients_at(value, recorded, [other.writes])[other.writes][0])
    kept = mask_T[rows]
    rows, features, strength = rows[kept], features[kept], strength[kept]
    order = strength.abs().argsort(descending=True, stable=True)[:top]
    targets = [(int(rows[place]), int(features[place])) for place in order]
    if not targets:
        raise FeatureError(f"no feature of {other.name} is active at {at!r}; expected a position where one is")
    weights = None
    if metric is not None:
        weights = strength[order] / parts.codes.to_dense()[rows[order], features[order]]
    return edges_between(fm, recorded, one, other, targets, weights)


def edges_between(
    fm: Any,
    recorded: Recorded,
    source: Dictionary,
    target: Dictionary,
    targets: Sequence[Target],
    weights: Tensor | None = None,
) -> Edges:
    """Edges to given targets, each times its weight (the metric's derivative by the target's code)."""
    reached = list(recorded.activations)
    if reached.index(source.writes) >= reached.index(target.reads):
        raise FeatureError(f"{source.name} does not come before {target.name}; expected the earlier site as source")
    parts = parts_of(source, recorded)
    g_KTM = _vjp(recorded, source, target, targets)
    if weights is not None:
        g_KTM = g_KTM * weights[:, None, None].to(g_KTM)
    rows, features = parts.codes.indices()
    values = torch.cat([parts.times(g_TM) for g_TM in g_KTM])
    which = torch.arange(len(targets)).repeat_interleave(len(rows))
    where = torch.stack([which, rows.repeat(len(targets)), features.repeat(len(targets))])
    sparse = torch.sparse_coo_tensor(where, values, (len(targets), *parts.codes.shape), is_coalesced=True)
    error_KT, bias_K = (g_KTM * parts.error_TM).sum(2).cpu(), (g_KTM * parts.bias_TM).sum((1, 2)).cpu()
    total_K = (g_KTM * parts.y_TM).sum((1, 2)).cpu()
    tokens = fm.texts(recorded.batch, 0)
    return Edges(fm, tokens, source.name, target.name, list(targets), sparse, error_KT, bias_K, total_K)


def _vjp(recorded: Recorded, source: Dictionary, target: Dictionary, targets: Sequence[Target]) -> Tensor:
    """`[K, T, M]` derivative of each target's code by the activations the source writes.

    One row a target: rows of a batch do not see each other, so one backward pass gives all of them.
    """
    positions, features = (torch.tensor(part) for part in zip(*targets, strict=True))
    x_KD = recorded.activations[target.reads].detach()[0][positions].float().requires_grad_()
    with torch.enable_grad():
        f_KN = target.encode(x_KD)
        (cotangent_KD,) = torch.autograd.grad(f_KN[torch.arange(len(targets)), features].sum(), x_KD)
    y_1TM = recorded.activations[source.writes].detach()
    found: list[Tensor] = []
    first = 0
    with torch.enable_grad():
        for y_kTM, seen_kTD in recorded.passes(source.writes, y_1TM.expand(len(targets), -1, -1), seen=target.reads):
            cotangent_kTD = torch.zeros_like(seen_kTD)
            here = torch.arange(len(y_kTM))
            last = first + len(y_kTM)
            cotangent_kTD[here, positions[first:last]] = cotangent_KD[first:last].to(seen_kTD.dtype)
            found.append(torch.autograd.grad(seen_kTD, y_kTM, cotangent_kTD)[0].float())
            first = last
    return torch.cat(found)


def trace(fm: Any, prompt: Any, metric: Any, sites: Sequence[str], top: int) -> Graph:
    """See `FeatureModel.trace`."""
    if top < 1 or not sites:
        raise FeatureError(f"sites={sites!r} and top={top}; expected at least one of each")
    batch = one_prompt(fm, prompt)
    ordered = [fm.dictionaries[name] for name in sites]
    recorded = Recorded(fm, batch, [place for one in ordered for place in (one.reads, one.writes)], graph=False)
    ordered.sort(key=lambda one: list(recorded.activations).index(one.writes))
    found = attribute(fm, batch, metric, "gradient", None, [one.name for one in ordered])
    nodes: dict[str, dict[str, Any]] = {}
    chosen: dict[str, list[tuple[Target, float]]] = {}
    for one in ordered:
        site = found.sites[one.name]
        assert site.positions is not None
        chosen[one.name] = []
        for place in site.values.abs().argsort(descending=True, stable=True)[:top].tolist():
            at, index, code = int(site.positions[place]), int(site.features[place]), float(site.codes[place])
            contribution = float(site.values[place])
            chosen[one.name].append(((at, index), contribution / code if code else 0.0))
            nodes[f"{one.name}/{index}@{at}"] = {
                "feature": f"{one.name}/{index}",
                "position": at,
                "token": found.tokens[at],
                "code": code,
                "contribution": contribution,
            }
    links: list[tuple[str, str, float]] = []
    for source, target in pairwise(ordered):
        if not chosen[target.name] or not chosen[source.name]:
            continue
        targets = [node for node, _ in chosen[target.name]]
        weights = torch.tensor([weight for _, weight in chosen[target.name]])
        made = edges_between(fm, recorded, source, target, targets, weights)
        dense = made.values
        kept = {node for node, _ in chosen[source.name]}
        for (which, at, index), value in zip(dense.indices().T.tolist(), dense.values().tolist(), strict=True):
            if (at, index) in kept:
                to_at, to_index = targets[which]
                links.append((f"{source.name}/{index}@{at}", f"{target.name}/{to_index}@{to_at}", value))
    return Graph(nodes, links, found.metric, found.gap)
