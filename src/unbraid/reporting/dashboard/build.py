"""`unbraid dashboard RUN`: from a run folder to `report/index.html`."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from unbraid.activations.rows import ChunkSource
from unbraid.config import RunConfig
from unbraid.formats.export import open_source
from unbraid.owned_folders import check_replaceable, written_folder
from unbraid.progress import Stages, default_console
from unbraid.reporting.dashboard.entangled import entangled_pairs, pair_contexts
from unbraid.reporting.dashboard.features import (
    excerpt,
    firing,
    histogram,
    logit_lens,
    neighbours,
    partners,
    strongest_contexts,
)
from unbraid.reporting.dashboard.passes import HeldOutPass, held_out_pass, token_texts
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
from unbraid.reporting.training_log import TrainingLog, split_name
from unbraid.sae import SAE
from unbraid.training.run_folder import RunFolder

CURVES = ("tau", "correlation_mean", "correlation_std", "updates", "loss")
CURVE_POINTS = 200


def write_dashboard(
    run: Path | str,
    out: Path | str | None = None,
    tokens: int = 16_384,
    *,
    console: Console | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """Write the dashboard of a finished run; returns its `index.html`, which opens in any browser.

    Args:
        run: a run folder.
        out: where to; `report/` in the run folder by default, where an earlier dashboard is replaced.
        tokens: held-out token rows to look at.
        console: where progress is shown; a terminal or notebook by default.
        overwrite: replace an earlier dashboard in `out`.
        trust_remote_code: allow the run's settings to run code that comes with the model.

    Raises:
        UnbraidError: the run has no finished SAE, its model or text is not there, or `out` cannot be written.
    """
    from unbraid.activations.live import LiveActivations

    folder = RunFolder(run, trust_remote_code)
    final = Path(out) if out is not None else folder.path / "report"
    replacing = {"overwrite": overwrite or out is None, "recognise": is_of_version_0_1}
    check_replaceable(final, KIND, **replacing)
    config = folder.config
    saes = {name: found.sae for name, found in open_source(folder.path).items()}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    summary = folder.read_summary()
    log = TrainingLog.read(folder.metrics)
    console = console or default_console()
    with console.status(f"loading {config.model.name}"):
        source = LiveActivations(config, device)
    with written_folder(final, KIND, **replacing) as unfinished, Stages(console) as stages:
        fill_site(unfinished, config, source, saes, summary, log, tokens, device, stages)
    return final / "index.html"


def fill_site(
    folder: Path,
    config: RunConfig,
    source: ChunkSource,
    saes: dict[str, SAE],
    summary: dict[str, Any],
    log: TrainingLog,
    tokens: int,
    device: torch.device,
    stages: Stages,
) -> None:
    """Everything of a dashboard, into the empty folder `folder`."""
    sites = {str(site): index for index, site in enumerate(config.sites)}
    names = [name for name in log.names if name in saes and split_name(name)[0] in sites]
    located = {name: (sites[split_name(name)[0]], saes[name].to(device)) for name in names}
    reading = stages.add_task("held-out text", tokens, "rows")
    held_out = held_out_pass(config, source, located, tokens, device, lambda done, _: stages.update(reading, done))
    model = getattr(source, "model", None)
    tokenizer = model.tokenizer if model is not None else None
    texts = [
        token_texts(tokenizer, row) if tokenizer is not None else [f"<{token}>" for token in row]
        for row in held_out.tokens_CT.tolist()
    ]
    site = Site(folder, texts)
    described, twins = [], config.twins
    for index, name in enumerate(names):
        writing = stages.add_task(name, saes[name].n_features, "features")
        twin = twins.get(name)
        twin = twin if twin in saes else None
        language_model = model.model if model is not None else None
        written = partial(stages.advance, writing)
        pairs = _write_sae(site, index, name, twin, saes, held_out, language_model, tokenizer, written)
        described.append(
            {
                "name": name,
                "site": split_name(name)[0],
                "variant": split_name(name)[1],
                "architecture": saes[name].architecture,
                "features": saes[name].n_features,
                "twin": names.index(twin) if twin is not None else None,
                "pairs": pairs,
                "metrics": {
                    key: value if value is None else short(value)
                    for key, value in summary.get("saes", {}).get(name, {}).items()
                    if value is None or isinstance(value, int | float)
                },
            }
        )
    site.write("run", _overview(config, summary, log, held_out, described))


def _write_sae(
    site: Site,
    index: int,
    name: str,
    twin: str | None,
    saes: dict[str, SAE],
    held_out: HeldOutPass,
    model: Any,
    tokenizer: Any,
    written: Callable[[], None],
) -> int:
    """Feature and pair data of one SAE; the number of its pairs. `written` is called for each feature."""
    sae, codes = saes[name], held_out.codes[name]
    W_dec = sae.W_dec.detach().cpu()
    near_ids, near = neighbours(W_dec)
    with_ids, correlation = partners(codes)
    lens = logit_lens(W_dec, model) if model is not None and tokenizer is not None else None
    words = _Words(tokenizer)
    peaks: list[str] = []

    def pages() -> Iterator[FeaturePage]:
        for feature in range(sae.n_features):
            fires = firing(codes, feature)
            rows = strongest_contexts(held_out, fires.rows, fires.values)
            at_peaks = [site.texts[held_out.context_R[row]][held_out.position_R[row]] for row in rows[:6]]
            peaks.append(" ".join(dict.fromkeys(clip(text.strip())[:24] for text in at_peaks if text.strip())))
            raised, lowered = ([], []) if lens is None else _lens_words(lens, feature, words)
            yield FeaturePage(
                histogram(fires.values),
                [excerpt(held_out, row, [fires]) for row in rows],
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
        "raises": [" ".join(token.strip() for token, _ in page.raised[:5]) for page in finished],
    }
    site.write_features(index, table, finished)
    twin_codes = held_out.codes[twin] if twin is not None else None
    twin_W_dec = saes[twin].W_dec.detach().cpu() if twin is not None else None
    pairs = entangled_pairs(codes, W_dec, twin_codes, twin_W_dec)
    site.write_pairs(index, pairs, (pair_contexts(held_out, codes, pair) for pair in pairs))
    return len(pairs)


class _Words:
    """Texts of single tokens, decoded once each."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.known = tokenizer, {}

    def __getitem__(self, token: int) -> str:
        if token not in self.known:
            self.known[token] = clip(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))
        return self.known[token]


def _lens_words(lens: Any, feature: int, words: _Words) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    raised_ids, raised, lowered_ids, lowered = (part[feature].tolist() for part in lens)
    return (
        [(words[token], value) for token, value in zip(raised_ids, raised, strict=True)],
        [(words[token], value) for token, value in zip(lowered_ids, lowered, strict=True)],
    )


def _overview(
    config: RunConfig, summary: dict[str, Any], log: TrainingLog, held_out: HeldOutPass, saes: list[dict[str, Any]]
) -> dict[str, Any]:
    """What the first page shows: the run, its SAEs with their metrics, and the curves of Figure 1."""
    thin = {key: {sae["name"]: log.curve(sae["name"], key).thinned(CURVE_POINTS) for sae in saes} for key in CURVES}
    first = next(iter(thin["loss"].values()))
    return {
        "name": config.name,
        "model": config.model.name,
        "text": config.text.source,
        "steps": summary.get("steps", {"planned": config.steps, "executed": int(log.step[-1])}),
        "rows": len(held_out.context_R),
        "contexts": len(held_out.tokens_CT),
        "fraction": config.decorrelation.fraction,
        "chunk": {"features": FEATURES_PER_CHUNK, "pairs": PAIRS_PER_CHUNK},
        "saes": saes,
        "figure": {
            "step": shorts(first.step),
            "curves": {
                key: {
                    name: [short(v) if np.isfinite(v) else None for v in curve.value] for name, curve in curves.items()
                }
                for key, curves in thin.items()
            },
        },
    }
