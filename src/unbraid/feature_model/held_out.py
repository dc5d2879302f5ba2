"""Where features fire on held-out text: largest codes, contexts, and what partners are computed from."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sparse

from unbraid.errors import FeatureError
from unbraid.feature_model.dictionaries import Feature
from unbraid.feature_model.tables import Result, Table, limited
from unbraid.reporting.dashboard.entangled import alone
from unbraid.reporting.dashboard.features import Firing, excerpt, firing
from unbraid.reporting.dashboard.passes import HeldOutPass, single_token_text, token_texts

PROMPTS_AT_ONCE = 8
STRONGEST = 32
"""Tokens that `HeldOut.peaks` looks at."""


@dataclass(frozen=True)
class Context:
    """A stretch of text around a token where a feature fires.

    Attributes:
        tokens: texts.
        codes: `[n]` the feature's code at each; others: of the feature it was asked to be alone from.
        peak: index of the strongest token.
    """

    tokens: list[str]
    codes: np.ndarray
    peak: int
    others: np.ndarray | None = None


@dataclass(frozen=True, repr=False)
class Contexts(Result):
    """The strongest contexts of a feature, at most one per row of a document.

    Attributes:
        feature: its address; alone_from: the feature that is silent where this one fires.
        items: strongest first.
        fires, rows: on how many held-out tokens it fires, out of how many.
        largest: its largest code.
    """

    feature: str
    items: list[Context]
    fires: int
    rows: int
    largest: float
    alone_from: str | None = None
    alone: int | None = None

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Context:
        return self.items[index]

    @property
    def caption(self) -> str:
        """One line."""
        apart = f"; on {self.alone:,} of them without {self.alone_from}" if self.alone_from else ""
        return f"{self.feature}: fires on {self.fires:,} of {self.rows:,} tokens, at most {self.largest:.4g}{apart}"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        items = [{"tokens": one.tokens, "codes": one.codes.tolist(), "peak": one.peak} for one in self.items]
        return {"feature": self.feature, "alone_from": self.alone_from, "fires": self.fires, "rows": self.rows} | {
            "alone": self.alone,
            "largest": self.largest,
            "contexts": items,
        }

    def to_table(self) -> Table:
        """The text and largest code of each context."""
        rows = [{"text": "".join(one.tokens), "code": float(one.codes.max())} for one in self.items]
        return Table(["text", "code"], rows, self.caption)

    def __rich__(self) -> Any:
        from rich.markup import escape
        from rich.text import Text

        from unbraid.feature_model.reading import token_rich

        lines = [escape(self.caption)]
        for one in self.items:
            strengths = one.codes / (self.largest or 1.0)
            coloured = [token_rich(text, float(s)) for text, s in zip(one.tokens, strengths, strict=True)]
            lines.append(f"{one.codes[one.peak]:8.3g}  " + "".join(coloured))
        return Text.from_markup("\n".join(lines))

    def _repr_html_(self) -> str:
        from html import escape

        from unbraid.feature_model.reading import token_html

        lines = []
        for one in self.items:
            strengths = one.codes / (self.largest or 1.0)
            shown = (
                token_html(text, float(strength), f"{code:.4g}")
                for text, strength, code in zip(one.tokens, strengths, one.codes, strict=True)
            )
            lines.append(f'<div style="margin:3px 0">{"".join(shown)}</div>')
        return limited(f"<div><div>{escape(self.caption)}</div>", lines, "</div>", [], "context")


@dataclass(eq=False)
class HeldOut:
    """What a pass over held-out text saw.

    Attributes:
        seen: tokens, places and codes.
        norms: NAME -> mean ||x|| of the rows read.
        length_C: `[C]` tokens of each row of text; shorter rows are padded on the right.
        known_maxima: NAME -> `[N]` largest codes where more was seen than is kept.
    """

    seen: HeldOutPass
    norms: dict[str, float]
    length_C: np.ndarray
    known_maxima: dict[str, np.ndarray] = field(default_factory=dict)
    _texts: dict[int, list[str]] = field(default_factory=dict)

    @cached_property
    def maxima(self) -> dict[str, np.ndarray]:
        """NAME -> `[N]` largest code of each feature; 0 where it never fired."""
        return {
            name: self.known_maxima[name] if name in self.known_maxima else codes.max(axis=0).toarray().ravel()
            for name, codes in self.seen.codes.items()
        }

    def maximum(self, feature: Feature) -> float | None:
        """The largest code; None for a feature that never fired."""
        largest = float(self.maxima[feature.dictionary.name][feature.index])
        return largest if largest > 0 else None

    def firing(self, feature: Feature) -> Firing:
        """Where and how strongly a feature fires."""
        assert feature.index is not None
        return firing(self.seen.codes[feature.dictionary.name], feature.index)

    def peaks(self, fm: Any, feature: Feature, k: int) -> list[str]:
        """The tokens a feature fires on, of its strongest firings: those with the largest codes in sum, at most k."""
        fires = self.firing(feature)
        strongest = np.argsort(-fires.values, kind="stable")[:STRONGEST]
        weights: dict[str, float] = {}
        for row, value in zip(fires.rows[strongest].tolist(), fires.values[strongest].tolist(), strict=True):
            token = int(self.seen.tokens_CT[self.seen.context_R[row], self.seen.position_R[row]])
            text = f"<{token}>" if fm.tokenizer is None else single_token_text(fm.tokenizer, token).strip()
            weights[text] = weights.get(text, 0.0) + value
        return [text for text in sorted(weights, key=lambda text: -weights[text]) if text][:k]

    def contexts(self, fm: Any, feature: Feature, k: int, other: Feature | None) -> Contexts:
        """See `FeatureModel.contexts`."""
        if k < 1:
            raise FeatureError(f"k={k}; expected at least 1")
        fires = self.firing(feature)
        rows = fires.rows[np.argsort(-fires.values, kind="stable")]
        firings = [fires]
        if other is not None:
            silent = self.firing(other)
            rows, firings = alone(self.seen, fires, silent), [fires, silent]
        _, first = np.unique(self.seen.context_R[rows], return_index=True)
        items = [self.context(fm, int(row), firings) for row in rows[np.sort(first)][:k]]
        largest = float(fires.values.max()) if len(fires.values) else 0.0
        counts = len(fires.rows), len(self.seen.context_R)
        found = Contexts(str(feature), items, *counts, largest)
        return found if other is None else replace(found, alone_from=str(other), alone=len(rows))

    def context(self, fm: Any, row: int, firings: list[Firing]) -> Context:
        """The text around a token, with the codes of the features given by their firings."""
        found = excerpt(self.seen, row, firings)
        stop = min(found.stop, int(self.length_C[found.context]))
        if found.context not in self._texts:
            ids = self.seen.tokens_CT[found.context].tolist()
            texts = [f"<{one}>" for one in ids] if fm.tokenizer is None else token_texts(fm.tokenizer, ids)
            self._texts[found.context] = texts
        texts = self._texts[found.context][found.start : stop]
        own, *others = (one[: stop - found.start] for one in found.activations)
        peak = int(self.seen.position_R[row]) - found.start
        return Context(texts, own, peak, others[0] if others else None)

    @classmethod
    def of_text(cls, fm: Any, text: Iterable[Any]) -> "HeldOut":
        """Read texts, or rows of token ids, with every dictionary of a model.

        Raises:
            FeatureError: there is no text.
        """
        if isinstance(text, str):
            text = [text]
        rows = [fm.prompt(one).tokens_BT for one in text]
        ids = [row for tokens_BT in rows for row in tokens_BT]
        if not ids:
            raise FeatureError("text is empty; expected at least one text to take maxima and contexts from")
        width = max(map(len, ids))
        tokens_CT = np.zeros((len(ids), width), dtype=np.int64)
        places: list[np.ndarray] = []
        codes: dict[str, list[Any]] = {name: [] for name in fm.dictionaries}
        norms: dict[str, float] = dict.fromkeys(fm.dictionaries, 0.0)
        for number, row_T in enumerate(ids):
            tokens_CT[number, : len(row_T)] = row_T.cpu().numpy()
        for number, row_T in enumerate(ids):
            batch = fm.prompt(row_T)
            mask_1T = batch.span.content_BT
            reading, _ = fm.passed(batch, (), mask_1T, "content", logits=False)
            read = reading.read_BT[0].nonzero()[:, 0].numpy()
            places.append(np.stack([np.full(len(read), number), read], axis=1))
            row_of = np.full(len(row_T), -1)
            row_of[read] = np.arange(len(read))
            for name, found in reading.codes.items():
                _, tokens, features = found.indices().numpy()
                at = (row_of[tokens], features)
                codes[name].append(sparse.csr_array((found.values().numpy(), at), shape=(len(read), found.shape[2])))
                norms[name] += float(reading.norms[name].sum())
        place_R2 = np.concatenate(places)
        if not len(place_R2):
            raise FeatureError("the held-out text has no content tokens; expected longer texts")
        stacked = {name: sparse.csc_array(sparse.vstack(parts)) for name, parts in codes.items()}
        seen = HeldOutPass(tokens_CT, place_R2[:, 0], place_R2[:, 1], stacked)
        means = {name: total / len(place_R2) for name, total in norms.items()}
        return cls(seen, means, np.array([len(row_T) for row_T in ids]))
