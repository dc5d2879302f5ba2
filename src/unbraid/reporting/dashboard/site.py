"""Writes the dashboard: static pages that work from a file:// address, their data cut into small scripts.

A page opened from a file may not fetch, but it may load scripts; so every piece of data is a script that hands one JSON
value to `unbraid.provide`, loaded when a page first needs it. The first page needs only `data/run.js`. Text from data
sets lies in these files as JSON strings and is only ever shown through `textContent`.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from unbraid.reporting.dashboard.entangled import Pair
from unbraid.reporting.dashboard.features import Excerpt

ASSETS = ("index.html", "app.css", "core.js", "charts.js", "pages.js", "pairs.js")
FEATURES_PER_CHUNK, PAIRS_PER_CHUNK = 32, 16
KIND = "dashboard"
LONGEST_TOKEN = 160
"""Characters of one token that are shown; a longer one is cut and says so."""


@dataclass(frozen=True)
class FeaturePage:
    """Everything one feature page shows beyond its row of the table.

    Attributes:
        histogram: counts in equal bins from 0 to the largest code.
        contexts: excerpts, strongest first.
        raised, lowered: (token, logit) pairs of the logit lens.
        neighbours: (feature, decoder cosine).
        partners: (feature, code correlation).
    """

    histogram: list[int]
    contexts: list[Excerpt]
    raised: list[tuple[str, float]]
    lowered: list[tuple[str, float]]
    neighbours: list[tuple[int, float]]
    partners: list[tuple[int, float]]


class Site:
    """A dashboard being written into `folder`.

    Args:
        folder: an empty folder.
        texts: token texts of every context.
    """

    def __init__(self, folder: Path, texts: list[list[str]]):
        self.folder, self.texts = folder, texts
        assets = resources.files("unbraid.reporting.dashboard") / "assets"
        for name in ASSETS:
            (folder / name).write_text((assets / name).read_text(encoding="utf-8"), encoding="utf-8")

    def write(self, key: str, data: Any) -> None:
        """One piece of data, as `data/<key>.js`."""
        path = self.folder / "data" / f"{key}.js"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(data, allow_nan=False, separators=(",", ":"))
        path.write_text(f"unbraid.provide({json.dumps(key)},{text});\n", encoding="ascii")

    def write_features(self, index: int, table: dict[str, list[Any]], pages: Iterable[FeaturePage]) -> None:
        """The feature table of SAE number `index`, and its feature pages in chunks."""
        self.write(f"{index}/features", table)
        for number, chunk in enumerate(_chunks(pages, FEATURES_PER_CHUNK)):
            self.write(f"{index}/feature-{number}", [self._feature(page) for page in chunk])

    def write_pairs(self, index: int, pairs: list[Pair], contexts: Iterable[dict[str, list[Excerpt]]]) -> None:
        """The pair table of SAE number `index`, and its pair pages in chunks."""
        self.write(f"{index}/pairs", [_pair(pair) for pair in pairs])
        for number, chunk in enumerate(_chunks(contexts, PAIRS_PER_CHUNK)):
            data = [{what: [self._excerpt(item) for item in items] for what, items in page.items()} for page in chunk]
            self.write(f"{index}/pair-{number}", data)

    def _feature(self, page: FeaturePage) -> dict[str, Any]:
        return {
            "histogram": page.histogram,
            "contexts": [self._excerpt(item) for item in page.contexts],
            "raised": [[clip(token), short(value)] for token, value in page.raised],
            "lowered": [[clip(token), short(value)] for token, value in page.lowered],
            "neighbours": [[feature, short(value)] for feature, value in page.neighbours],
            "partners": [[feature, short(value)] for feature, value in page.partners],
        }

    def _excerpt(self, item: Excerpt) -> dict[str, Any]:
        texts = self.texts[item.context][item.start : item.stop]
        codes = [shorts(values) for values in item.activations]
        return {"at": [item.context, item.start], "tokens": [clip(text) for text in texts], "codes": codes}


def is_of_version_0_1(folder: Path) -> bool:
    """Whether unbraid 0.1, which left no marker, wrote this dashboard: only its files, and its first data file."""
    names = re.compile(
        r"index\.html|app\.css|(core|charts|pages|pairs)\.js|data/(run|\d+/(features|pairs|(feature|pair)-\d+))\.js"
    )
    files = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    if any(path.is_symlink() or not names.fullmatch(path.relative_to(folder).as_posix()) for path in files):
        return False
    first = folder / "data" / "run.js"
    return first.is_file() and first.read_bytes().startswith(b'unbraid.provide("run",')


def short(value: float | int) -> float | int:
    """Four significant digits, as few characters as they need."""
    number = float(f"{float(value):.4g}")
    return int(number) if number == int(number) else number


def shorts(values: np.ndarray) -> list[float | int]:
    """`short` of every element; whole numbers, most of all the many zeros, as integers."""
    values = np.asarray(values, dtype=np.float64)
    size = 10.0 ** (3 - np.floor(np.log10(np.abs(np.where(values == 0, 1.0, values)))))
    rounded = (np.round(values * size) / size).tolist()
    return [int(number) if number.is_integer() else number for number in rounded]


def clip(text: str) -> str:
    """A token's text, cut where it is longer than anyone reads."""
    return text if len(text) <= LONGEST_TOKEN else f"{text[:LONGEST_TOKEN]}… ({len(text):,} characters)"


def _pair(pair: Pair) -> list[Any]:
    twin = [None] * 5
    if pair.counterparts is not None and pair.match is not None and pair.twin_correlation is not None:
        twin = [*pair.counterparts, *map(short, pair.match), short(pair.twin_correlation)]
    return [*pair.features, short(pair.correlation), pair.together, *pair.fires, short(pair.decoder_cosine), *twin]


def _chunks(items: Iterable[Any], size: int) -> Iterable[list[Any]]:
    chunk: list[Any] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
