"""`unbraid dashboard`: from a run or an SAE to a folder with `index.html`."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn

from unbraid.activations.rows import ChunkSource
from unbraid.errors import ConfigError
from unbraid.formats import path_or_name
from unbraid.owned_folders import check_replaceable, written_folder
from unbraid.progress import Stages, default_console
from unbraid.reporting.dashboard.entangled import counterparts, pair_contexts, pairs_here_or_in_twin
from unbraid.reporting.dashboard.features import (
    excerpt,
    firing,
    histogram,
    logit_lens,
    neighbours,
    partners,
    strongest_contexts,
)
from unbraid.reporting.dashboard.opening import Shown, default_place, describe_text, is_a_run, open_shown
from unbraid.reporting.dashboard.passes import HeldOutPass, held_out_pass, single_token_text, token_texts
from unbraid.reporting.dashboard.site import (
    FEATURES_PER_CHUNK,
    KIND,
    PAIRS_PER_CHUNK,
    FeaturePage,
    Site,
    clip,
    is_of_version_0_1,
    short,
    shorts,
)
from unbraid.reporting.training_log import TrainingLog

CURVES = ("tau", "correlation_mean", "correlation_std", "updates", "loss")
CURVE_POINTS = 200


def write_dashboard(
    source: Path | str,
    out: Path | str | None = None,
    tokens: int = 16_384,
    *,
    model: str | None = None,
    site: str | None = None,
    text: str | list[str] | None = None,
    console: Console | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """Write the dashboard of a finished run or of one SAE; returns its `index.html`, which opens in any browser.

    Args:
        source: a run folder, an SAE folder in any known layout, or a published SAE's name.
        out: where to; `report/` in a run folder, else `dashboards/NAME`. An earlier dashboard of a run is replaced.
        tokens: held-out token rows to look at.
        model, site: what an SAE folder does not say of itself.
        text: what contexts are read from: "packaged", files or folders, or "hub:NAME"; a run's own held-out text, or
            the packaged text, by default.
        console: where progress is shown; a terminal or notebook by default.
        overwrite: replace an earlier dashboard in `out`.
        trust_remote_code: allow the run's settings to run code that comes with the model.

    Raises:
        UnbraidError: there is no finished SAE, its model, site or text is not known or not there, something was given
            that a run says itself, or `out` cannot be written.
    """
    from unbraid.activations.live import LiveActivations

    if tokens < 1:
        raise ConfigError(f"tokens = {tokens}; expected at least 1")
    source = path_or_name(source)
    final = Path(out) if out is not None else default_place(source)
    replacing = {"overwrite": overwrite or (out is None and is_a_run(source)), "recognise": is_of_version_0_1}
    check_replaceable(final, KIND, **replacing)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shown = open_shown(source, final, device, model=model, site=site, text=text, trust_remote_code=trust_remote_code)
    console = console or default_console()
    with console.status(f"loading {shown.config.model.name}"):
        activations = LiveActivations(shown.config, device)
    shown.centre(activations.model.model)
    with written_folder(final, KIND, **replacing) as unfinished, Stages(console) as stages:
        fill_site(unfinished, shown, activations, tokens, device, stages)
    return final / "index.html"


def fill_site(
    folder: Path, shown: Shown, source: ChunkSource, tokens: int, device: torch.device, stages: Stages
) -> None:
    """Everything of a dashboard, into the empty folder `folder`."""
    names = list(shown.saes)
    reading = stages.add_task("held-out text", tokens, "rows")
    held_out = held_out_pass(
        shown.config, source, shown.saes, tokens, device, lambda done, _: stages.update(reading, done)
    )
    model = getattr(source, "model", None)
    tokenizer = model.tokenizer if model is not None else None
    texts = [
        token_texts(tokenizer, row) if tokenizer is not None else [f"<{token}>" for token in row]
        for row in held_out.tokens_CT.tolist()
    ]
    site = Site(folder, texts)
    described = []
    for index, name in enumerate(names):
        sae = shown.saes[name][1]
        writing = stages.add_task(name, sae.n_features, "features")
        twin = shown.twins.get(name)
        language_model = model.model if model is not None else None
        written = partial(stages.advance, writing)
        pairs = _write_sae(site, index, name, twin, shown, held_out, language_model, tokenizer, written)
        place, variant = shown.labels_of(name)
        described.append(
            {
                "name": name,
                "site": place,
                "variant": variant,
                "architecture": getattr(sae, "architecture", ""),
                "features": sae.n_features,
                "twin": names.index(twin) if twin is not None else None,
                "pairs": pairs,
                "large": int(held_out.large_rows(name).sum()),
                "metrics": {
                    key: value if value is None else short(value)
                    for key, value in shown.summary.get("saes", {}).get(name, {}).items()
                    if value is None or isinstance(value, int | float)
                },
            }
        )
    site.write("labels", shown.labels.to_dict())
    site.write("run", _overview(shown, held_out, described) | {"text_chunks": site.write_texts()})


def _write_sae(
    site: Site,
    index: int,
    name: str,
    twin: str | None,
    shown: Shown,
    held_out: HeldOutPass,
    model: Any,
    tokenizer: Any,
    written: Callable[[], None],
) -> int:
    """Feature and pair data of one SAE; the number of its pairs. `written` is called for each feature."""
    sae, codes = shown.saes[name][1], held_out.codes[name]
    W_dec = sae.W_dec.detach().cpu()
    near_ids, near = neighbours(W_dec)
    with_ids, correlation = partners(codes)
    lens = logit_lens(W_dec, model) if model is not None and tokenizer is not None else None
    words = _Words(tokenizer)
    peaks: list[str] = []

    def pages() -> Iterator[FeaturePage]:
        for feature in range(sae.n_features):
            fires = firing(codes, feature)
            rows, quarters = strongest_contexts(held_out, fires.rows, fires.values)
            at_peaks = [site.texts[held_out.context_R[row]][held_out.position_R[row]] for row in rows[:6]]
            peaks.append(" ".join(dict.fromkeys(clip(_bare(text))[:24] for text in at_peaks if text)))
            raised, lowered = ([], []) if lens is None else _lens_words(lens, feature, words)
            yield FeaturePage(
                histogram(fires.values),
                [excerpt(held_out, row, [fires]) for row in rows],
                [
                    (q.contexts, q.lowest, q.highest, [excerpt(held_out, row, [fires]) for row in q.rows])
                    for q in quarters
                ],
                raised,
                lowered,
                list(zip(near_ids[feature].tolist(), near[feature].tolist(), strict=True)),
                [
                    (i, c)
                    for i, c in zip(with_ids[feature].tolist(), correlation[feature].tolist(), strict=True)
                    if c > 0
                ],
            )
            written()

    counts = np.diff(codes.indptr)
    largest = np.array(
        [codes.data[a:b].max() if b > a else 0.0 for a, b in zip(codes.indptr, codes.indptr[1:], strict=False)]
    )
    sums = np.asarray(codes.sum(axis=0)).ravel()
    finished = list(pages())
    table = {
        "fires": counts.tolist(),
        "largest": shorts(largest),
        "mean": shorts(sums / np.maximum(counts, 1)),
        "neighbour": shorts(near[:, 0]),
        "partner": shorts(correlation[:, 0]),
        "peaks": peaks,
        "raises": [" ".join(_bare(token) for token, _ in page.raised[:5]) for page in finished],
    }
    twin_codes = held_out.codes[twin] if twin is not None else None
    twin_W_dec = shown.saes[twin][1].W_dec.detach().cpu() if twin is not None else None
    counterpart_N, match_N = counterparts(nn.functional.normalize(W_dec.float(), dim=1), twin_W_dec)
    if counterpart_N is not None and match_N is not None:
        table |= {"counterpart": counterpart_N.tolist(), "match": shorts(match_N.numpy())}
    site.write_features(index, table, finished)
    pairs = pairs_here_or_in_twin(codes, W_dec, twin_codes, twin_W_dec, held_out.large_rows(name))
    site.write_pairs(index, pairs, (pair_contexts(held_out, codes, pair) for pair in pairs))
    return len(pairs)


def _bare(text: str) -> str:
    """A token without spaces around it; one of nothing but spaces shows them."""
    return text.strip() or text.replace(" ", "␣")


class _Words:
    """Texts of single tokens, decoded once each."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.known = tokenizer, {}

    def __getitem__(self, token: int) -> str:
        if token not in self.known:
            self.known[token] = clip(single_token_text(self.tokenizer, token))
        return self.known[token]


def _lens_words(lens: Any, feature: int, words: _Words) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    raised_ids, raised, lowered_ids, lowered = (part[feature].tolist() for part in lens)
    return (
        [(words[token], value) for token, value in zip(raised_ids, raised, strict=True)],
        [(words[token], value) for token, value in zip(lowered_ids, lowered, strict=True)],
    )


def _overview(shown: Shown, held_out: HeldOutPass, saes: list[dict[str, Any]]) -> dict[str, Any]:
    """What the first page shows: the run, its SAEs with their metrics, and the curves of Figure 1."""
    config = shown.config
    return {
        "name": shown.title,
        "of_a_run": shown.log is not None,
        "model": config.model.name,
        "text": describe_text(config.text),
        "steps": shown.steps,
        "rows": len(held_out.context_R),
        "contexts": len(held_out.tokens_CT),
        "norm_limit": config.buffer.norm_limit,
        "fraction": config.decorrelation.fraction,
        "chunk": {"features": FEATURES_PER_CHUNK, "pairs": PAIRS_PER_CHUNK},
        "commands": shown.commands,
        "labels_file": str(shown.labels_file),
        "saes": saes,
        "figure": None if shown.log is None else _figure(shown.log, [sae["name"] for sae in saes]),
    }


def _figure(log: TrainingLog, names: list[str]) -> dict[str, Any]:
    thin = {key: {name: log.curve(name, key).thinned(CURVE_POINTS) for name in names} for key in CURVES}
    first = next(iter(thin["loss"].values()))
    return {
        "step": shorts(first.step),
        "curves": {
            key: {name: [short(v) if np.isfinite(v) else None for v in curve.value] for name, curve in curves.items()}
            for key, curves in thin.items()
        },
    }
