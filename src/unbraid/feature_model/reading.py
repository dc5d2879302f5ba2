"""What a dictionary sees in a prompt: sparse codes and reconstruction errors of every token."""

import html
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.markup import escape
from torch import Tensor

from unbraid.feature_model.dictionaries import ROWS_AT_ONCE, Dictionary, split_address
from unbraid.feature_model.hooks import StopPass
from unbraid.feature_model.positions import Span, chosen
from unbraid.feature_model.tables import Result, Table, limited, require_rows, shown, visible

NOTE = (
    "features: index, tokens it fires on (or raises: ↑), code in % of its largest on held-out text if that is known; "
    "error: ||x - x_hat|| / ||x||"
)
FeaturesOfToken = list[tuple[str, float]]


@dataclass(frozen=True, eq=False, repr=False)
class Reading(Result):
    """Codes of a prompt.

    Attributes:
        tokens: texts of the tokens, one list per prompt; None is padding.
        ids_BT: `[B, T]` token ids.
        codes: NAME -> sparse `[B, T, N]`, zero where not read.
        error: NAME -> `[B, T]` ||x - x_hat|| / ||x||, zero where not read.
        norms: NAME -> `[B, T]` ||x||, zero where not read.
        at: the positions read; read_BT: which tokens these are, `[B, T]` bool.
        span: where the tokens stand.
    """

    tokens: list[list[str | None]]
    ids_BT: Tensor
    codes: dict[str, Tensor]
    error: dict[str, Tensor]
    norms: dict[str, Tensor]
    at: Any
    read_BT: Tensor
    span: Span
    share: Callable[[str, int, float], float | None] = field(repr=False, default=lambda name, index, code: None)
    words: Callable[[str, int], str] = field(repr=False, default=lambda name, index: "")

    def of(self, name: str) -> "Reading":
        """What one dictionary sees."""
        return replace(self, codes={name: self.codes[name]}, error={name: self.error[name]})

    def code(self, name: str, index: int) -> Tensor:
        """`[B, T]` codes of one feature."""
        return self.codes[name].index_select(2, torch.tensor([index])).to_dense()[..., 0]

    def entries(self, name: str, at: Any = "all") -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Row, token, feature and value of the codes at some positions, in text order."""
        rows, tokens, features = self.codes[name].indices()
        values = self.codes[name].values()
        kept = chosen(at, self.span).cpu()[rows, tokens]
        return rows[kept], tokens[kept], features[kept], values[kept]

    def top(self, k: int = 10, at: Any = "all") -> Table:
        """The k largest codes, and what share of each feature's maximum they are where that is known."""
        require_rows(k)
        table = self._largest(k, at)
        rows = [row | {"words": self.words(*split_address(row["feature"]))} for row in table.rows]
        return Table([*table.columns, "words"], rows)

    def _largest(self, k: int, at: Any) -> Table:
        found: list[tuple[float, str, int, int, int]] = []
        for name in self.codes:
            rows, tokens, features, values = self.entries(name, at)
            for place in values.argsort(descending=True, stable=True)[:k].tolist():
                found.append((float(values[place]), name, int(features[place]), int(rows[place]), int(tokens[place])))
        found.sort(key=lambda one: (-one[0], *one[1:]))
        lines = [
            {
                "feature": f"{name}/{index}",
                "prompt": row,
                "position": int(self.span.position_BT[row, token]),
                "token": self.tokens[row][token],
                "code": code,
                "share of max": self.share(name, index, code),
            }
            for code, name, index, row, token in found[:k]
        ]
        columns = ["feature", *(["prompt"] if len(self.tokens) > 1 else [])]
        return Table([*columns, "position", "token", "code", "share of max"], lines)

    def of_token(self, row: int, token: int, k: int = 3) -> dict[str, FeaturesOfToken]:
        """NAME -> the k largest features of a token."""
        found: dict[str, FeaturesOfToken] = {}
        for name, codes in self.codes.items():
            rows, tokens, features = codes.indices()
            here = (rows == row) & (tokens == token)
            values, order = codes.values()[here].sort(descending=True)
            names = features[here][order]
            found[name] = [(f"{name}/{int(i)}", float(v)) for i, v in zip(names[:k], values[:k], strict=True)]
        return found

    def to_table(self, k: int = 3) -> Table:
        """One row per token and dictionary: its strongest features and the error."""
        require_rows(k)
        lines = []
        for row, texts in enumerate(self.tokens):
            for token, text in enumerate(texts):
                if text is None:
                    continue
                read = bool(self.read_BT[row, token])
                for name, features in self.of_token(row, token, k).items():
                    described = [self._described(address, code) for address, code in features]
                    line = {"prompt": row, "position": int(self.span.position_BT[row, token]), "token": text}
                    line |= {"dictionary": name, "features": " | ".join(described)}
                    lines.append(line | {"error": float(self.error[name][row, token]) if read else None})
        columns = ["prompt"] if len(self.tokens) > 1 else []
        columns += ["position", "token", *(["dictionary"] if len(self.codes) > 1 else []), "features", "error"]
        return Table(columns, lines, notes=(NOTE,))

    def _described(self, address: str, code: float) -> str:
        """`334 she her (87 %)`: a feature, in words, and its code in percent of its largest, or as it is."""
        name, index = split_address(address)
        share, words = self.share(name, index, code), self.words(name, index)
        strength = shown(code) if share is None else f"{100 * share:.0f} %"
        return " ".join(part for part in (str(index), words, f"({strength})") if part)

    def to_dict(self) -> dict[str, Any]:
        """Tokens, and the features of each, as plain values."""
        prompts = []
        for row, texts in enumerate(self.tokens):
            prompts.append(
                [
                    {
                        "token": text,
                        "id": int(self.ids_BT[row, token]),
                        "position": int(self.span.position_BT[row, token]),
                        "features": {
                            address: code
                            for one in self.of_token(row, token, 1 << 30).values()
                            for address, code in one
                        },
                        "error": {name: float(error[row, token]) for name, error in self.error.items()},
                    }
                    for token, text in enumerate(texts)
                    if text is not None
                ]
            )
        return {"prompts": prompts}

    def to_pandas(self) -> Any:
        """A DataFrame with a row per code: feature, prompt, position, token, code, share of max."""
        return self._largest(sum(len(codes.values()) for codes in self.codes.values()), "all").to_pandas()

    def _repr_html_(self) -> str:
        """Coloured tokens: the darker, the larger the strongest code; its features are in the tooltip."""
        strongest = self._strengths()
        lines: list[str] = []
        for row, texts in enumerate(self.tokens):
            for token, text in enumerate(texts):
                if text is not None:
                    tip = [f"{a} {shown(c)}" for one in self.of_token(row, token).values() for a, c in one]
                    lines.append(token_html(text, float(strongest[row, token]), " | ".join(tip)))
            lines.append("<br>")
        return limited('<div style="line-height:1.9">', lines[:-1], "</div>", [], "token")

    def _strengths(self) -> Tensor:
        """`[B, T]` in 0..1: each token's largest code beside the largest of the prompt, over dictionaries."""
        total = torch.zeros(self.read_BT.shape)
        for codes in self.codes.values():
            rows, tokens, _ = codes.indices()
            peak = torch.zeros(self.read_BT.numel())
            peak.scatter_reduce_(0, rows * self.read_BT.shape[1] + tokens, codes.values(), "amax")
            total = torch.maximum(total, peak.view(total.shape) / peak.max().clamp(min=1e-30))
        return total


def token_html(text: str, strength: float, tip: str) -> str:
    """A token with a background as strong as `strength` (0 to 1) and a tooltip."""
    alpha = round(0.75 * max(0.0, min(1.0, strength)), 2)
    style = f"background:rgba(240,140,40,{alpha});border-radius:2px;white-space:pre-wrap"
    return f'<span style="{style}" title="{html.escape(visible(tip), quote=True)}">{html.escape(visible(text))}</span>'


def token_rich(text: str, strength: float) -> str:
    """The same as rich markup."""
    shade = max(0.0, min(1.0, strength))
    if shade < 0.02:
        return escape(visible(text))
    blue = round(255 - 190 * shade)
    return f"[black on rgb(255,{round(235 - 95 * shade)},{blue})]{escape(visible(text))}[/]"


class ReadingHook:
    """Reads one dictionary in a pass, a tile of rows at a time, and keeps what is sparse.

    Where the dictionary writes elsewhere (a transcoder), the error is of what it should have written.
    """

    def __init__(self, dictionary: Dictionary, mask_BT: Tensor):
        self.dictionary, self.mask_BT = dictionary, mask_BT
        self.codes: Tensor | None = None
        self.error_BT = self.norm_BT = torch.zeros(mask_BT.shape)
        self._x_RD: Tensor | None = None

    @torch.no_grad()
    def read(self, x_BTD: Tensor) -> None:
        """At the place it reads."""
        self._x_RD = x_BTD[self.mask_BT].float()
        if self.dictionary.reads == self.dictionary.writes:
            self.write(x_BTD)

    @torch.no_grad()
    def write(self, y_BTM: Tensor) -> None:
        """At the place it writes, which comes later or is the same."""
        assert self._x_RD is not None
        y_RM = y_BTM[self.mask_BT].float()
        indices, values, errors = [], [], []
        norm_R = y_RM.norm(dim=1)
        for first in range(0, len(y_RM), ROWS_AT_ONCE):
            f_RN = self.dictionary.encode(self._x_RD[first : first + ROWS_AT_ONCE])
            y_hat_RM = self.dictionary.predict(self._x_RD[first : first + ROWS_AT_ONCE], f_RN)
            missed_R = (y_RM[first : first + ROWS_AT_ONCE] - y_hat_RM).norm(dim=1)
            errors.append((missed_R / norm_R[first : first + ROWS_AT_ONCE].clamp(min=1e-30)).cpu())
            rows, features = f_RN.nonzero(as_tuple=True)
            indices.append(torch.stack([rows + first, features]).cpu())
            values.append(f_RN[rows, features].cpu())
        place_RD = self.mask_BT.nonzero().cpu()
        where = torch.cat(indices, 1) if indices else torch.zeros(2, 0, dtype=torch.long)
        shape = (*self.mask_BT.shape, self.dictionary.n_features)
        self.codes = torch.sparse_coo_tensor(
            torch.cat([place_RD[where[0]].T, where[1:]]),
            torch.cat(values) if values else torch.zeros(0),
            shape,
            check_invariants=False,
            is_coalesced=True,
        )
        self.error_BT, self.norm_BT = torch.zeros(self.mask_BT.shape), torch.zeros(self.mask_BT.shape)
        if errors:
            self.error_BT[self.mask_BT.cpu()] = torch.cat(errors)
            self.norm_BT[self.mask_BT.cpu()] = norm_R.cpu()
        self._x_RD = None


def reading_hooks(
    dictionaries: Mapping[str, Dictionary], mask_BT: Tensor, *, then_stop: bool
) -> tuple[dict[str, ReadingHook], list[Any]]:
    """A `ReadingHook` per dictionary, and the visits that make them; with `then_stop` the last one ends the pass."""
    readers = {name: ReadingHook(one, mask_BT) for name, one in dictionaries.items()}

    def stopping(read: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        def visit(x_BTD: Tensor) -> None:
            read(x_BTD)
            if then_stop and all(reader.codes is not None for reader in readers.values()):
                raise StopPass

        return visit

    visits = []
    for reader in readers.values():
        visits.append((reader.dictionary.reads, stopping(reader.read)))
        if reader.dictionary.writes is not reader.dictionary.reads:
            visits.append((reader.dictionary.writes, stopping(reader.write)))
    return readers, visits
