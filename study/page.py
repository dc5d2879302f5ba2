"""Write docs/study.md from study/page.md: every number on the page is taken from a file in `study/results`.

    python study/page.py            # rewrites docs/study.md
    python study/page.py --check    # fails when it is out of date

In study/page.md stand `{{ceiling}}`, `{{rung|WORLD|METHOD|RUNG}}`, `{{table|TABLE|WHERE}}`,
`{{mean|TABLE|WHERE/LABEL|METRIC}}` and, for the paired difference to `none` with its interval,
`{{gap|TABLE|WHERE/LABEL|METRIC}}` (to another row: `{{gap|TABLE|WHERE/LABEL|METRIC|LABEL}}`).
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from estimates import BySeed, at_l0, difference, estimate, short

sys.path.append(str(Path(__file__).parents[1] / "docs"))
from generated import write_or_check

HERE = Path(__file__).parent
RESULTS, TEMPLATE = HERE / "results", HERE / "page.md"
Rows = dict[str, dict[str, dict[int, dict[str, Any]]]]
"""Where (an architecture) -> label (a method) -> seed -> metrics."""
L0 = 5.0
"""Where SAEs that have no k are compared: each metric is interpolated between the lambda1 on both sides of it."""
TRUTH = {
    "F1": "f1",
    "MCC": "mcc",
    "unique": "uniqueness",
    "absorption gap": "absorption_gap",
    "hedging": "hedging",
    "R²": "r2",
    "L0": "l0",
    "max cosine": "mean_max_decoder_cosine",
    "top correlation": "correlation_top",
}
MODEL = {
    "R²": "r2",
    "CE score": "ce_score",
    "L0": "l0",
    "top correlation": "correlation_top",
    "max cosine": "mean_max_decoder_cosine",
    "composition": "composition",
    "dead": "dead",
    "probe, 1 feature": "probe_top_1",
    "5 features": "probe_top_5",
    "absorption": "absorption_fraction",
    "full absorption": "full_absorption",
    "seeds agree": "agreement",
}
COST = {"wall time of a step": "wall_ratio", "CPU time": "cpu_ratio"}
NOISE = {
    "pairs in S": "pairs",
    "a feature fired <= 4 times": "low_support",
    "shared with the next S": "shared",
    "in the top 0.1 % of 65,536 other tokens": "true_top",
    "mean C as chosen": "as_selected",
    "mean C on the other tokens": "elsewhere",
    "active features where they meet": "active_where_they_meet",
    "their decoder cosine": "decoder_cosine",
    "features in S": "features",
}


def lines(name: str) -> list[dict[str, Any]]:
    """A file of results."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def rows(table: str) -> Rows:
    """A table of results by where, label and seed."""
    found: Rows = {}
    none = [line for line in lines("grid") if line["trial"]["method"] == "none"] if table == "sweep" else []
    weighted: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for line in none + lines(table):
        where, label, seed = READERS[table](line)
        if line.get("trial", {}).get("lambda1"):
            weighted.setdefault((where, label, seed), []).append(line["metrics"])
        else:
            found.setdefault(where, {}).setdefault(label, {})[seed] = line["metrics"]
    for (where, label, seed), several in weighted.items():
        found.setdefault(where, {}).setdefault(label, {})[seed] = at_l0(several, L0)
    if table == "real":
        for line in lines("real-agreement"):
            first, second = line["pair"].split()
            where, label, seed = of_run(first, line["sae"])
            pair = 10 * seed + int(second[-1])
            found[where][label].setdefault(pair, {}).update(line["metrics"])
    return found


def of_trial(line: dict[str, Any]) -> tuple[str, str, int]:
    """A trial of the grid: its method says everything."""
    trial = line["trial"]
    return trial["architecture"], trial["method"], trial["seed"]


def of_sweep(line: dict[str, Any]) -> tuple[str, str, int]:
    """A trial that differs from others of its method: label and settings."""
    trial = line["trial"]
    own = [(name, trial["decorrelation"].get(name)) for name in ("lambda2", "fraction", "floor")]
    settings = ", ".join(f"{name} {value}" for name, value in own if value is not None)
    label = "none" if trial["method"] == "none" else f"{trial['method']}: {settings}"
    length = f"{trial['architecture']}, {trial['steps']} steps"
    return length, label, trial["seed"]


def of_run(run: str, sae: str) -> tuple[str, str, int]:
    """An SAE or control of a run on the real model."""
    where, seed = run.rsplit("-s", 1)
    control = sae.partition(": ")[2]
    return where, f"control: {control}" if control else sae.rsplit("_", 1)[1], int(seed)


def of_noise(line: dict[str, Any]) -> tuple[str, str, int]:
    """How many tokens S is chosen on, and the least support."""
    label = f"{line['tokens']:,} tokens, min_support {line['min_support']}"
    return "noise", label, int(line["run"].rsplit("-s", 1)[1])


def of_full(line: dict[str, Any]) -> tuple[str, str, int]:
    """How far a training on the full world is."""
    trial = line["trial"]
    seen, planned = trial["samples"], trial["planned"]
    on_the_way = f" of {planned / 1e6:.0f} M" if seen < planned and planned > FULL_LENGTH else ""
    return f"{seen / 1e6:.1f} M{on_the_way}", trial["method"], trial["seed"]


READERS = {
    "grid": of_trial,
    "sweep": of_sweep,
    "budget": of_sweep,
    "hybrids": of_trial,
    "recipe": lambda line: (line["trial"]["world"], line["trial"]["method"], line["trial"]["seed"]),
    "revival": of_trial,
    "full": of_full,
    "real": lambda line: of_run(line["run"], line["sae"]),
    "noise": of_noise,
    "real-cost": lambda line: (line["architecture"], line["method"], 0),
}
FULL_LENGTH = 5_000_000
"""Samples of the full world's shorter trainings."""
FULL = {
    "F1": "f1",
    "MCC": "mcc",
    "R²": "r2",
    "L0": "l0",
    "unique": "uniqueness",
    "hedging": "hedging",
    "max cosine": "mean_max_decoder_cosine",
    "dead": "dead_fraction",
}
COLUMNS = {"real": MODEL, "noise": NOISE, "real-cost": COST, "full": FULL}


def by_seed(metrics: dict[int, dict[str, Any]], metric: str) -> BySeed:
    """One metric of each seed that has it."""
    return {seed: found[metric] for seed, found in metrics.items() if found.get(metric) is not None}


def table(name: str, where: str) -> str:
    """Means (standard deviations over seeds); arrows where the paired difference to `none` is outside the noise."""
    here = rows(name)[where]
    here |= {f"control: {label}": found for label, found in rows(name).get("control", {}).items()}
    known = {metric for found in here.values() for metrics in found.values() for metric in metrics}
    columns = {title: metric for title, metric in COLUMNS.get(name, TRUTH).items() if metric in known}
    out = [f"| | {' | '.join(columns)} | seeds |", f"|---|{'---|' * len(columns)}---|"]
    for label, found in here.items():
        none = here.get("none", {})
        cells = [cell(by_seed(found, metric), by_seed(none, metric), label) for metric in columns.values()]
        seeds = len([seed for seed in found if seed < 10 or name in ("budget", "hybrids", "recipe", "revival")])
        out.append(f"| {label} | {' | '.join(cells)} | {seeds} |")
    return "\n".join(out)


def cell(own: BySeed, none: BySeed, label: str) -> str:
    """One cell."""
    if not own:
        return "-"
    mark = ""
    if label != "none" and not label.startswith("control") and own.keys() & none.keys():
        gap = difference(own, none)
        mark = "" if gap.noise else (" ▲" if gap.mean > 0 else " ▼")
    return f"{estimate(own.values())}{mark}"


def look_up(name: str, place: str, metric: str) -> BySeed:
    """`WHERE/LABEL` of a table."""
    where, label = place.split("/")
    return by_seed(rows(name)[where][label], metric)


def again(cell_name: str) -> str:
    """A cell that was trained once more: how far its numbers are from the first ones, and how many are the same."""
    (line,) = [line for line in lines("again") if "/".join(of_trial(line)[:2]) == cell_name]
    (first,) = [other for other in lines("grid") if other["trial"] == line["trial"]]
    trial, own, other = line["trial"], line["metrics"], first["metrics"]
    same = sum(own[name] == other[name] for name in other)
    pairs = ", ".join(f"{title} {short(other[name])} and {short(own[name])}" for title, name in list(TRUTH.items())[:2])
    which = f"{trial['architecture']}/{trial['method']}, seed {trial['seed']}"
    return f"{which}: {pairs}; {same} of {len(other)} numbers are the same to six decimals"


RUNGS = ["as trained", "own codes, least squares", "true codes, least squares", "true codes, robust"]
STRONGEST = "the N strongest features"
LOST = {"parents": "lost_to_parents", "leaves": "lost_to_leaves", "cosines below .5": "lost_to_unmatched"}


def ceilings() -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """World -> method -> rung -> metrics."""
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for line in lines("ceiling"):
        trial = line["trial"]
        found.setdefault(trial["world"], {}).setdefault(trial["method"], {})[trial["rung"]] = line["metrics"]
    return found


def ceiling() -> str:
    """MCC of each rung, and what of 1 - MCC is lost where."""
    out = [f"| world | | {' | '.join(RUNGS)} | {' | '.join(f'lost: {name}' for name in LOST)} |"]
    out.append("|---|---|" + "---|" * (len(RUNGS) + len(LOST)))
    for world, methods in ceilings().items():
        best = methods[STRONGEST]
        cells = ["-", "-", short(best["least squares"]["mcc"]), short(best["robust"]["mcc"]), *["-"] * len(LOST)]
        out.append(f"| {world} | {STRONGEST} | {' | '.join(cells)} |")
        for method, rungs in methods.items():
            if method == STRONGEST:
                continue
            cells = [short(rungs[rung]["mcc"]) for rung in RUNGS]
            cells += [short(rungs["as trained"][key]) for key in LOST.values()]
            out.append(f"| {world} | {method} | {' | '.join(cells)} |")
    return "\n".join(out)


def fill(directive: str) -> str:
    """What a directive stands for."""
    if directive == "ceiling":
        return ceiling()
    if directive.startswith("rung|"):
        _, world, method, rung = directive.split("|")
        return short(ceilings()[world][method][rung]["mcc"])
    kind, name, *rest = directive.split("|")
    if kind == "again":
        return again(name)
    if kind == "table":
        return table(name, *rest)
    place, metric, *other = rest
    own = look_up(name, place, metric)
    if kind == "mean":
        return short(estimate(own.values()).mean)
    against = look_up(name, f"{place.split('/')[0]}/{other[0] if other else 'none'}", metric)
    return str(difference(own, against))


def page() -> str:
    """The page."""
    return re.sub(r"\{\{(.+?)\}\}", lambda match: fill(match[1]), TEMPLATE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    write_or_check("study.md", page())
