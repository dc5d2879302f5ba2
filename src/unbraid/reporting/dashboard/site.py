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
from unbraid.reporting.dashboard.features import AFTER, BEFORE, Excerpt

ASSETS = ("index.html", "app.css", "core.js", "charts.js", "labels.js", "pages.js", "pairs.js", "lists.js")
FEATURES_PER_CHUNK, PAIRS_PER_CHUNK, TOKENS_PER_CHUNK = 32, 16, 8192
KIND = "dashboard"
LONGEST_TOKEN = 160
"""Characters of one token that are shown; a longer one is cut and says so."""


@dataclass(frozen=True)
class FeaturePage:
    """Everything one feature page shows beyond its row of the table.

    Attributes:
        histogram: counts in equal bins from 0 to the largest code.
        contexts: the strongest excerpts, strongest first.
        quarters: (contexts, lowest, highest largest code, excerpts) of each quarter of the others.
        raised, lowered: (token, logit) pairs of the logit lens.
        neighbours: (feature, decoder cosine).
        partners: (feature, code correlation).
    """

    histogram: list[int]
    contexts: list[Excerpt]
    quarters: list[tuple[int, float, float, list[Excerpt]]]
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

    def write_texts(self) -> dict[str, int]:
        """The tokens of all contexts, in chunks; what a page must know to find them, and the stretch of an excerpt."""
        length = max((len(row) for row in self.texts), default=1)
        size = max(1, TOKENS_PER_CHUNK // length)
        for number, chunk in enumerate(_chunks(self.texts, size)):
            self.write(f"text-{number}", [[clip(text) for text in row] for row in chunk])
        return {"size": size, "contexts": len(self.texts), "length": length, "before": BEFORE, "after": AFTER}

    def write_features(self, index: int, table: dict[str, list[Any]], pages: list[FeaturePage]) -> None:
        """The feature table of SAE number `index`, where each one's excerpts lie, and its feature pages in chunks."""
        self.write(f"{index}/features", table)
        self.write(f"{index}/where", [[[item.context, item.start, item.stop] for item in _all(page)] for page in pages])
        for number, chunk in enumerate(_chunks(pages, FEATURES_PER_CHUNK)):
            self.write(f"{index}/feature-{number}", [self._feature(page) for page in chunk])

    def write_pairs(self, index: int, pairs: list[Pair], contexts: Iterable[dict[str, list[Excerpt]]]) -> None:
        """The pair table of SAE number `index`, and its pair pages in chunks."""
        self.write(f"{index}/pairs", [_pair(pair) for pair in pairs])
        for number, chunk in enumerate(_chunks(contexts, PAIRS_PER_CHUNK)):
            data = [{what: [_excerpt(item) for item in items] for what, items in page.items()} for page in chunk]
            self.write(f"{index}/pair-{number}", data)

    def _feature(self, page: FeaturePage) -> dict[str, Any]:
        return {
            "histogram": page.histogram,
            "contexts": [_excerpt(item) for item in page.contexts],
            "quarters": [
                [contexts, short(low), short(high), [_excerpt(item) for item in items]]
                for contexts, low, high, items in page.quarters
            ],
            "raised": [[clip(token), short(value)] for token, value in page.raised],
            "lowered": [[clip(token), short(value)] for token, value in page.lowered],
            "neighbours": [[feature, short(value)] for feature, value in page.neighbours],
            "partners": [[feature, short(value)] for feature, value in page.partners],
        }


def _excerpt(item: Excerpt) -> dict[str, Any]:
    """The stretch of text by its place, and the codes on the whole context by position, so that it can be widened."""
    fired = [[positions.tolist(), shorts(values)] for positions, values in item.fired]
    return {"at": [item.context, item.start, item.stop], "fired": fired}


def _all(page: FeaturePage) -> list[Excerpt]:
    return [*page.contexts, *(item for *_, items in page.quarters for item in items)]


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
    """In the order of `FIELDS` in pairs.js."""
    optional = lambda value: None if value is None else short(value)  # noqa: E731
    counterparts, match = pair.counterparts or (None, None), pair.match or (None, None)
    return [
        *pair.features,
        short(pair.correlation),
        pair.together,
        *pair.fires,
        short(pair.decoder_cosine),
        *counterparts,
        *map(optional, match),
        *map(optional, (pair.twin_correlation, pair.without_large, pair.twin_without_large)),
        pair.entangled_in,
        pair.lives_on_large_rows,
    ]


def _chunks(items: Iterable[Any], size: int) -> Iterable[list[Any]]:
    chunk: list[Any] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
