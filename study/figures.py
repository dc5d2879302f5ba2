"""The study's figures, from the files in `study/results`, into docs/img/.

python study/figures.py
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from estimates import difference, estimate
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from page import RESULTS, RUNGS, STRONGEST, by_seed, ceilings, lines, rows

from unbraid.reporting.figures import COLOURS, DASHES, MARKERS, STYLE, WIDTH_INCHES, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

IMAGES = Path(__file__).parents[1] / "docs" / "img"
METHODS = ["none", "codes", "decoder", "rarer", "ortsae", "co-active"]
"""Those drawn; a method has one colour in every figure."""
ARCHITECTURES = {
    "relu": "ReLU",
    "topk": "TopK",
    "batch_topk": "BatchTopK",
    "jumprelu": "JumpReLU",
    "matryoshka": "Matryoshka",
}


def look(method: str) -> dict[str, Any]:
    """Colour and marker of a method."""
    at = METHODS.index(method)
    return {"color": COLOURS[at], "marker": MARKERS[at], "markersize": 4.2, "capsize": 1.5, "linewidth": 0.8}


def frontier() -> Figure:
    """Quality of the features against reconstruction: a point a method and architecture, with its spread over seeds."""
    found = rows("grid")
    figure = Figure(figsize=(WIDTH_INCHES, 3.0))
    panels = figure.subplots(1, 2)
    drawn = ["none", "codes", "decoder", "rarer", "ortsae"]
    for axes, (metric, title) in zip(panels, (("f1", "F1"), ("mcc", "MCC")), strict=True):
        for marker, (where, name) in zip("osD^P", ARCHITECTURES.items(), strict=True):
            for method in [method for method in drawn if method in found[where]]:
                x, y = (estimate(by_seed(found[where][method], key).values()) for key in ("r2", metric))
                style = look(method) | {"marker": marker}
                axes.errorbar(x.mean, y.mean, xerr=x.sd, yerr=y.sd, **style)
            axes.plot([], [], marker, color="0.35", markersize=4.2, label=name)
            method = drawn[list(ARCHITECTURES).index(where)]
            axes.plot([], [], color=look(method)["color"], linewidth=3, label=method)  # a column of the legend each
        axes.set_xlabel("$R^2$")
        axes.set_title(title)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncol=5, columnspacing=1.6, handletextpad=0.5, handlelength=1.0)
    figure.subplots_adjust(left=0.07, right=0.985, bottom=0.15, top=0.8, wspace=0.17)
    return figure


def effects() -> Figure:
    """Paired differences to no penalty in F1 and MCC, with their 95 % intervals, by architecture."""
    found = rows("grid")
    figure = Figure(figsize=(WIDTH_INCHES, 2.9))
    panels = figure.subplots(1, 2, sharey=True)
    drawn = ["codes", "co-active", "decoder", "rarer", "ortsae"]
    for axes, (metric, title) in zip(panels, (("f1", "F1"), ("mcc", "MCC")), strict=True):
        axes.axvline(0, color="0.6", linewidth=0.8)
        for row, where in enumerate(ARCHITECTURES):
            none = by_seed(found[where]["none"], metric)
            for place, method in enumerate(drawn):
                if method not in found[where]:
                    continue
                gap = difference(by_seed(found[where][method], metric), none)
                at = row + (place - 2) * 0.15
                name = method if where == "batch_topk" else None
                axes.errorbar(gap.mean, at, xerr=gap.reach, **look(method), linestyle="", label=name)
        axes.set_title(f"{title}, difference to no penalty")
    panels[0].set_yticks(range(len(ARCHITECTURES)), list(ARCHITECTURES.values()))
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=5)
    figure.subplots_adjust(left=0.12, right=0.985, bottom=0.18, top=0.91, wspace=0.06)
    return figure


def distributions() -> Figure:
    """Share of live pairs above each correlation, real model: with and without each penalty."""
    found = json.loads((RESULTS / "pairs.json").read_text())
    figure = Figure(figsize=(WIDTH_INCHES * 0.7, 2.5))
    axes = figure.subplots()
    for label in [label for label in METHODS if label in found["share_above"]]:
        shares = np.array(found["share_above"][label])
        line = {"color": look(label)["color"], "linestyle": DASHES[METHODS.index(label) % len(DASHES)]}
        axes.plot(np.array(found["levels"])[shares > 0], shares[shares > 0], **line, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("correlation C of two features' codes")
    axes.set_ylabel("share of live pairs above C")
    axes.legend()
    figure.subplots_adjust(left=0.14, right=0.98, bottom=0.17, top=0.97)
    return figure


def weights() -> Figure:
    """Absorption gap, F1 and top correlation against lambda2, one line a space; the band is no penalty."""
    figure = Figure(figsize=(WIDTH_INCHES, 2.3))
    panels = figure.subplots(1, 3)
    trials = [line for line in lines("grid") + lines("sweep") if line["trial"]["architecture"] == "batch_topk"]
    shown = (("absorption_gap", "absorption gap"), ("f1", "F1"), ("correlation_top", "top correlation"))
    for axes, (metric, title) in zip(panels, shown, strict=True):
        none = estimate(t["metrics"][metric] for t in trials if t["trial"]["method"] == "none")
        axes.axhspan(none.mean - (none.sd or 0), none.mean + (none.sd or 0), color="0.85", linewidth=0)
        axes.axhline(none.mean, color="0.5", linewidth=0.8, linestyle="--", label="none")
        for method, fraction in (("codes", 1e-3), ("decoder", 1e-2)):
            draw_weights(axes, trials, method, fraction, metric)
        axes.set_xscale("log")
        axes.set_xlabel(r"$\lambda_2$")
        axes.set_title(title)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncol=3)
    figure.subplots_adjust(left=0.08, right=0.985, bottom=0.18, top=0.8, wspace=0.3)
    return figure


def draw_weights(axes: "Axes", trials: list[dict[str, Any]], method: str, fraction: float, metric: str) -> None:
    """One method's line with its spread over seeds."""
    by_weight: dict[float, list[float]] = {}
    for line in trials:
        settings = line["trial"]["decorrelation"]
        if line["trial"]["method"] == method and settings.get("fraction", 1e-3) == fraction:
            by_weight.setdefault(settings["lambda2"], []).append(line["metrics"][metric])
    points = {weight: estimate(values) for weight, values in sorted(by_weight.items())}
    means, spreads = [point.mean for point in points.values()], [point.sd or 0 for point in points.values()]
    axes.errorbar(list(points), means, yerr=spreads, **look(method), label=method)


def heat_map() -> Figure:
    """Correlations of the most entangled features without a penalty, and of their counterparts with one."""
    heat = json.loads((RESULTS / "pairs.json").read_text())["heat"]
    found = {label: heat[label] for label in METHODS if label in heat}
    ramp = LinearSegmentedColormap.from_list("ramp", ["#ffffff", "#6fb7e9", "#1f2a6b"])
    figure = Figure(figsize=(WIDTH_INCHES, 1.35))
    panels = figure.subplots(1, len(found))
    for axes, (label, matrix) in zip(panels, found.items(), strict=True):
        shown = np.array(matrix)
        np.fill_diagonal(shown, np.nan)
        image = axes.imshow(shown, cmap=ramp, vmin=0, vmax=1)
        axes.set_title(label)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.subplots_adjust(left=0.01, right=0.9, bottom=0.04, top=0.84, wspace=0.1)
    bar = figure.colorbar(image, cax=figure.add_axes((0.915, 0.06, 0.012, 0.74)))
    bar.set_label("C")
    return figure


def ladder() -> Figure:
    """MCC of each SAE as trained, and of decoders fitted to its own codes and to the true ones, in each world."""
    found = ceilings()
    figure = Figure(figsize=(WIDTH_INCHES, 2.4))
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, (world, methods) in zip(panels, found.items(), strict=True):
        named = [method for method in methods if method != STRONGEST]
        for place, method in enumerate(named):
            marks = {"color": COLOURS[place], "marker": MARKERS[place], "markersize": 4.2, "linewidth": 1.0}
            axes.plot(range(len(RUNGS)), [methods[method][rung]["mcc"] for rung in RUNGS], **marks, label=method)
        limits = [methods[STRONGEST][fit]["mcc"] for fit in ("least squares", "robust")]
        axes.plot([2, 3], limits, linestyle="--", color="0.4", linewidth=1.0, label=STRONGEST)
        axes.set_title(f"{world} world")
        axes.set_xticks(range(len(RUNGS)), ["trained", "own codes,\nLS", "true codes,\nLS", "true codes,\nrobust"])
    panels[0].set_ylabel("MCC")
    shown: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        shown |= dict(zip(labels, handles, strict=True))
    figure.legend(list(shown.values()), list(shown), loc="upper center", ncol=len(shown))
    figure.subplots_adjust(left=0.1, right=0.97, bottom=0.2, top=0.78, wspace=0.08)
    return figure


def warm_start() -> Figure:
    """What is left of the variance after several lengths of training, drawn and begun as the layer below's SAE."""
    found = [(line["settings"], line["fvu"]) for line in lines("sites") if line["settings"]["what"] == "warm"]
    layers = list(dict.fromkeys(settings["route"] for settings, _ in found))
    figure = Figure(figsize=(WIDTH_INCHES, 2.2))
    panels = figure.subplots(1, len(layers), sharey=True)
    for axes, layer in zip(panels, layers, strict=True):
        for place, drawn in enumerate((True, False)):
            here = {s["steps"]: fvu for s, fvu in found if s["route"] == layer and (s["start"] == "drawn") == drawn}
            label = "drawn at random" if drawn else "the SAE of the layer below"
            marks = {"color": COLOURS[place], "marker": MARKERS[place], "markersize": 4.2, "linewidth": 1.0}
            axes.plot(list(here), list(here.values()), **marks, label=label)
        axes.set_title(layer)
        axes.set_xlabel("training steps")
        axes.set_ylim(0, 0.5)
    panels[0].set_ylabel("unexplained, held out")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncol=2)
    figure.subplots_adjust(left=0.09, right=0.985, bottom=0.2, top=0.78, wspace=0.08)
    return figure


FIGURES = {
    "study-frontier": frontier,
    "study-effects": effects,
    "study-distributions": distributions,
    "study-weights": weights,
    "study-pairs": heat_map,
    "study-ceiling": ladder,
    "warm-start": warm_start,
}


def main() -> None:
    """Draw them all."""
    with matplotlib.rc_context(STYLE):
        for name, draw in FIGURES.items():
            save_figure(draw(), IMAGES / name)


if __name__ == "__main__":
    main()
