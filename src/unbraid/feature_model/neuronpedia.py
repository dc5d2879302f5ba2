"""Features of a run in the JSON that SAEDashboard writes and Neuronpedia takes.

A dictionary becomes a folder of `batch-K.json` with 128 features each, `skipped_indexes.json` with those that never
fired on the held-out text, and `run_settings.json`. Field by field this follows sae-dashboard 0.8.0
(`neuronpedia/neuronpedia_dashboard.py`, `neuronpedia_converter.py`), its counts and roundings included; it draws the
contexts of each interval at random, and here they are spread evenly over it, so that the same run gives the same bytes.
Correlations with neurons need the activations themselves, which are not kept, and stay empty.
"""

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from unbraid.errors import FormatError, UnbraidError
from unbraid.feature_model.dictionaries import Dictionary
from unbraid.feature_model.model import FeatureModel
from unbraid.feature_model.opening import TOKENS, features
from unbraid.formats import path_or_name
from unbraid.offline import is_hub_id
from unbraid.owned_folders import check_replaceable, written_folder
from unbraid.progress import Progress, default_console
from unbraid.reporting.dashboard.features import Firing, firing, logit_effects
from unbraid.reporting.dashboard.passes import single_token_text, token_texts
from unbraid.sites import ARROW, Site
from unbraid.training.run_folder import RunFolder, is_run

KIND = "Neuronpedia"
FEATURES_PER_BATCH = 128
TOP_CONTEXTS, INTERVALS, CONTEXTS_PER_INTERVAL = 20, 5, 5
LOGITS, BARS, ROWS = 10, 50, 3
"""Tokens raised and lowered, bars of a histogram, and rows of the tables of neurons and features."""
SPELLINGS = ("neuronpedia", "saedashboard")


class _Place(NamedTuple):
    """Where Neuronpedia files a dictionary: model, layer, set, and what tells apart several of one set."""

    model_id: str
    layer: int
    sae_set: str
    sae_id_suffix: str | None


def is_neuronpedia(layout: str) -> bool:
    """Whether `layout` names this one.

    Example:
        >>> is_neuronpedia("SAE-Dashboard")
        True
    """
    return "".join(character for character in layout.lower() if character.isalnum()) in SPELLINGS


def export_neuronpedia(
    source: Path | str | FeatureModel,
    out: Path | str,
    *,
    set_name: str | None = None,
    tokens: int = TOKENS,
    overwrite: bool = False,
    console: Console | None = None,
    trust_remote_code: bool = False,
) -> list[Path]:
    """Write every dictionary of a run (or one dictionary) into `out/NAME`; all of them or none.

    Args:
        source: a run folder, an SAE folder that says its model and site, a published name, or an open model with its
            dictionaries, whose own held-out text counts.
        out: folder for the folders.
        set_name: what the set is called on Neuronpedia; made from the dictionary's NAME by default.
        tokens: held-out token rows that contexts, histograms and correlations are taken from.
        overwrite: replace earlier exports of the same names there.
        console: where progress is shown; a terminal or notebook by default.
        trust_remote_code: allow a run's settings to run code that comes with the model.

    Returns:
        The folders written.

    Raises:
        UnbraidError: there is no dictionary, its model, site or held-out text is not there, its site is in no layer,
            or a place cannot be written.
    """
    if tokens < 1:
        raise FormatError(f"tokens is {tokens}; expected at least 1")
    if set_name is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", set_name):
        raise FormatError(f"set name {set_name!r}; expected letters, digits, '-', '_' and '.', such as res-16k")
    console = console or default_console()
    fm = source
    if not isinstance(fm, FeatureModel):
        fm = features(fm, tokens=tokens, console=console, trust_remote_code=trust_remote_code)
    dataset = "" if isinstance(source, FeatureModel) else _dataset(source)
    places = {name: _place(one, set_name) for name, one in fm.dictionaries.items()}
    if len(set(places.values())) < len(places):
        raise FormatError(f"several of {', '.join(places)} would have one id on Neuronpedia; export them one by one")
    for name in places:
        check_replaceable(Path(out) / name, KIND, error=FormatError, overwrite=overwrite)
    written = []
    for name, place in places.items():
        folder = Path(out) / name
        with written_folder(folder, KIND, error=FormatError) as unfinished:
            _write(unfinished, _Described(fm, fm.dictionaries[name], dataset), place, console)
        written.append(folder)
    return written


def _place(dictionary: Dictionary, set_name: str | None) -> _Place:
    """What the dictionary's metadata says; else from the model's name, the site and NAME."""
    known = getattr(dictionary.sae, "metadata", None) or {}
    published = re.fullmatch(r"([^/]+)/(\d+)-(.+)", known.get("neuronpedia_id") or "")
    if published and set_name is None:
        return _Place(published[1], int(published[2]), published[3], None)
    try:
        site = Site.parse(dictionary.site.partition(ARROW)[0])
    except UnbraidError:
        site = None
    if site is None or site.layer is None:
        raise FormatError(
            f"{dictionary.name} stands at {dictionary.site}, which is in no layer; expected a site such as "
            "resid_post.6, because Neuronpedia files features by layer; export another dictionary"
        )
    model = re.split(r"[/:\\]", (known.get("model_name") or "model").rstrip("/\\"))[-1].lower()
    label = dictionary.name.removeprefix(str(site)).strip("._- ")
    if set_name is not None:
        return _Place(model, site.layer, set_name, _plain(label) or None)
    return _Place(model, site.layer, "-".join(filter(None, [_plain(site.kind), _plain(label)])), None)


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def _dataset(source: Path | str) -> str:
    """The hub's data set that a run's text comes from, also for one of its SAEs; empty for other texts."""
    path = path_or_name(source)
    places = [path, path.resolve().parent.parent] if isinstance(path, Path) else []
    run = next((place for place in places if is_run(place)), None)
    text = None if run is None else RunFolder(run).recorded_config.text
    return text.dataset if text is not None and text.source == "hub" and is_hub_id(text.dataset) else ""


def _write(folder: Path, described: "_Described", place: _Place, console: Console) -> None:
    """All files of one dictionary."""
    dictionary = described.dictionary
    n = dictionary.n_features
    shown = np.flatnonzero(np.diff(described.codes.indptr)).tolist()
    head = place._asdict()
    with Progress(console, dictionary.name, len(shown), "features") as progress:
        effects = described.logit_rows(shown)
        for number, start in enumerate(range(0, len(shown), FEATURES_PER_BATCH)):
            batch = shown[start : start + FEATURES_PER_BATCH]
            found = [described.feature(index, next(effects)) for index in batch]
            _write_json(folder / f"batch-{number}.json", head | {"features": found})
            progress.update(start + len(batch))
    never = sorted(set(range(n)) - set(shown))
    skipped = {"model_id": place.model_id, "layer": str(place.layer), "sae_set": place.sae_set}
    skipped |= {"log_sparsity": _rounded(-np.log10(described.rows)), "skipped_indexes": never}
    _write_json(folder / "skipped_indexes.json", skipped)
    settings = {
        "sae_set": place.sae_set,
        "sae_path": dictionary.name,
        "np_set_name": place.sae_set,
        "np_sae_id_suffix": place.sae_id_suffix,
        "model_id": place.model_id,
        "layer": place.layer,
        "huggingface_dataset_path": described.dataset,
        "n_prompts_total": described.contexts,
        "n_tokens_in_prompt": described.length,
        "n_features_at_a_time": FEATURES_PER_BATCH,
        "n_quantiles": INTERVALS,
        "top_acts_group_size": TOP_CONTEXTS,
        "quantile_group_size": CONTEXTS_PER_INTERVAL,
        "hook_name": described.known.get("hook_name"),
        "prepend_bos": described.known.get("prepend_bos"),
    }
    _write_json(folder / "run_settings.json", settings)


def _write_json(path: Path, data: Any) -> None:
    """Plain ASCII: any other character is escaped, so whatever a text held, every reader takes it."""
    path.write_text(json.dumps(data, ensure_ascii=True, allow_nan=False) + "\n", encoding="ascii")


class _Described:
    """A dictionary's features one by one.

    SAEDashboard scales decoder rows to length 1 and codes with what that takes, so codes here are multiplied with the
    row's norm.
    """

    def __init__(self, fm: FeatureModel, dictionary: Dictionary, dataset: str):
        held_out = fm.held_out
        self.dictionary = dictionary
        self.fm, self.seen, self.length_C = fm, held_out.seen, held_out.length_C
        self.codes = held_out.seen.codes[dictionary.name]
        self.known: dict[str, Any] = getattr(dictionary.sae, "metadata", None) or {}
        self.dataset = dataset or str(self.known.get("dataset_path") or "")
        self.norm_N = dictionary.W_dec.norm(dim=1).cpu().double().numpy()
        self.unit_ND = torch.nn.functional.normalize(dictionary.W_dec, dim=1)
        self.rows = len(self.seen.context_R)
        self.contexts, self.length = self.seen.tokens_CT.shape
        self.total_N = np.asarray(self.codes.sum(axis=0), dtype=np.float64).ravel()
        self.square_N = np.asarray(self.codes.multiply(self.codes).sum(axis=0), dtype=np.float64).ravel()
        self._texts: dict[int, list[str]] = {}

    def logit_rows(self, indices: list[int]) -> Iterator[Tensor | None]:
        """What each of the features adds to the logits [V]; None for each where the unembedding does not read it."""
        effects = logit_effects(self.unit_ND[indices], self.fm.hf_model)
        for tile in effects or [[None]] * len(indices):
            yield from tile

    def feature(self, index: int, logit_V: Tensor | None) -> dict[str, Any]:
        """One entry of a batch."""
        row_D = self.unit_ND[index].cpu()
        neurons = row_D.topk(min(ROWS, len(row_D)))
        fires = firing(self.codes, index)
        values = fires.values.astype(np.float64) * self.norm_N[index]
        heights, middles = _histogram(values)
        partners, pearson, cosine = self._correlated(index)
        return {
            "feature_index": index,
            "neuron_alignment_indices": neurons.indices.tolist(),
            "neuron_alignment_values": _list(neurons.values),
            "neuron_alignment_l1": _list(neurons.values.abs() / row_D.abs().sum().clamp_min(1e-30)),
            "correlated_neurons_indices": [],
            "correlated_neurons_l1": [],
            "correlated_neurons_pearson": [],
            "correlated_features_indices": partners,
            "correlated_features_l1": cosine,
            "correlated_features_pearson": pearson,
            **self._logits(logit_V),
            "frac_nonzero": round(len(values) / self.rows, 5),
            "freq_hist_data_bar_values": middles,
            "freq_hist_data_bar_heights": heights,
            "n_prompts_total": self.contexts,
            "n_tokens_in_prompt": self.length,
            "dataset": self.dataset,
            "decoder_weights_dist": [],
            "activations": self._activations(Firing(fires.rows, values)),
            "vector": [],
        }

    def _correlated(self, index: int) -> tuple[list[int], list[float], list[float]]:
        """The other features with the largest Pearson correlation over all rows: ids, correlations, cosines."""
        product_N = np.asarray((self.codes[:, [index]].T @ self.codes).todense(), dtype=np.float64).ravel()
        size_N = np.sqrt(self.square_N)
        cosine_N = product_N / np.maximum(size_N * size_N[index], 1e-30)
        spread_N = np.sqrt(np.maximum(self.square_N - self.total_N**2 / self.rows, 0.0))
        pearson_N = product_N - self.total_N * self.total_N[index] / self.rows
        pearson_N = pearson_N / np.maximum(spread_N * spread_N[index], 1e-30)
        pearson_N[index] = -np.inf
        best = np.argsort(-pearson_N, kind="stable")[: min(ROWS, len(pearson_N) - 1)]
        return best.tolist(), _list(pearson_N[best]), _list(cosine_N[best])

    def _logits(self, logit_V: Tensor | None) -> dict[str, Any]:
        if logit_V is None:
            lists = ("neg_str", "neg_values", "pos_str", "pos_values")
            return {name: [] for name in (*lists, "logits_hist_data_bar_heights", "logits_hist_data_bar_values")}
        logit_V = logit_V.cpu()
        count = min(LOGITS, len(logit_V))
        raised, lowered = logit_V.topk(count), logit_V.topk(count, largest=False)
        heights, middles = _histogram(logit_V.double().numpy())
        return {
            "neg_str": [self._word(token) for token in lowered.indices.tolist()],
            "neg_values": _list(lowered.values),
            "pos_str": [self._word(token) for token in raised.indices.tolist()],
            "pos_values": _list(raised.values),
            "logits_hist_data_bar_heights": heights,
            "logits_hist_data_bar_values": middles,
        }

    def _word(self, token: int) -> str:
        return f"<{token}>" if self.fm.tokenizer is None else single_token_text(self.fm.tokenizer, token)

    def _activations(self, fires: Firing) -> list[dict[str, Any]]:
        """The strongest contexts, then some of each fifth of the range of codes, from the highest down."""
        largest = float(fires.values.max())
        order = np.argsort(-fires.values, kind="stable")
        top = self._one_per_context(fires, order)[:TOP_CONTEXTS]
        strongest = {"bin_min": -1, "bin_max": _rounded(largest), "bin_contains": -1}
        found = [strongest | self._activation(fires, at) for at in top]
        edges = np.linspace(0.0, largest, INTERVALS + 1)
        for low, high in reversed(list(pairwise(edges))):
            inside = order[(fires.values[order] >= low) & (fires.values[order] <= high)]
            silent = self.rows - len(order) if low == 0 else 0
            interval = {"bin_min": _rounded(low), "bin_max": _rounded(high)}
            interval["bin_contains"] = round((len(inside) + silent) / self.rows, 5)
            chosen = self._one_per_context(fires, inside)
            spread = np.linspace(0, len(chosen) - 1, min(CONTEXTS_PER_INTERVAL, len(chosen))).round().astype(int)
            found += [interval | self._activation(fires, chosen[place]) for place in spread]
        return found

    def _one_per_context(self, fires: Firing, order: np.ndarray) -> list[int]:
        """The first of `order`, places in `fires`, in each context."""
        _, first = np.unique(self.seen.context_R[fires.rows[order]], return_index=True)
        return order[np.sort(first)].tolist()

    def _activation(self, fires: Firing, at: int) -> dict[str, Any]:
        """A whole context, its codes, and the token it was chosen for; without BOS, as SAEDashboard leaves it out."""
        context = int(self.seen.context_R[fires.rows[at]])
        ids = self.seen.tokens_CT[context][: int(self.length_C[context])].tolist()
        low, high = np.searchsorted(self.seen.context_R[fires.rows], [context, context + 1])
        values = np.zeros(len(ids))
        values[self.seen.position_R[fires.rows[low:high]]] = fires.values[low:high]
        bos = getattr(self.fm.tokenizer, "bos_token_id", None)
        start = int(bos is not None and len(ids) > 1 and ids[0] == bos and values[0] == 0)
        return {
            "tokens": self._words(context, ids)[start:],
            "values": _list(values[start:]),
            "qualifying_token_index": int(self.seen.position_R[fires.rows[at]]) - start,
        }

    def _words(self, context: int, ids: list[int]) -> list[str]:
        if context not in self._texts:
            tokenizer = self.fm.tokenizer
            self._texts[context] = [f"<{one}>" for one in ids] if tokenizer is None else token_texts(tokenizer, ids)
        return self._texts[context]


def _histogram(values: np.ndarray) -> tuple[list[int], list[float]]:
    """Heights and middles of equal bins from the smallest to the largest value."""
    heights, edges = np.histogram(values, bins=BARS)
    return heights.tolist(), _list((edges[:-1] + edges[1:]) / 2)


def _rounded(value: float) -> float:
    return _list(np.asarray(value))


def _list(values: Any) -> Any:
    """Numbers rounded to 3 decimals, without negative zeros."""
    return (np.round(np.asarray(values, dtype=np.float64), 3) + 0.0).tolist()
