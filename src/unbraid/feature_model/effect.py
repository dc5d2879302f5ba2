"""What edits did in one pass: logits beside the unedited ones, the codes that moved, and the partners."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from unbraid.feature_model.dictionaries import split_address
from unbraid.feature_model.edits import Edit, Splice
from unbraid.feature_model.positions import chosen
from unbraid.feature_model.prompts import Prompt
from unbraid.feature_model.reading import Reading
from unbraid.feature_model.tables import Result, Table, require_rows


def edited_mask(batch: Prompt, edits: Sequence[Edit]) -> Tensor:
    """Content and whatever is edited, `[B, T]`: what an effect is read at."""
    mask_BT = batch.span.content_BT
    for edit in edits:
        mask_BT = mask_BT | chosen(getattr(edit, "at", "content"), batch.span)
    return mask_BT


@dataclass(frozen=True, eq=False, repr=False)
class Effect(Result):
    """One edited pass beside the unedited one.

    Attributes:
        edits: what was done.
        before, after: what the dictionaries see without and with the edits; `after` re-encodes the edited stream.
        plain_logits, logits: `[B, T, V]` without and with the edits.
    """

    fm: Any
    batch: Prompt
    edits: tuple[Edit, ...]
    before: Reading
    after: Reading
    plain_logits: Tensor
    logits: Tensor

    @cached_property
    def kl(self) -> Tensor:
        """`[B, T]` KL divergence of the edited next-token distribution from the unedited one; 0 at padding."""
        p_BTV, q_BTV = (one.float().log_softmax(-1) for one in (self.plain_logits, self.logits))
        return (p_BTV.exp() * (p_BTV - q_BTV)).sum(-1).masked_fill(~self.batch.real_BT, 0.0)

    @property
    def features(self) -> list[str]:
        """Addresses of the single features that were edited."""
        found = [self.fm.dictionaries.feature(e.feature, or_all=True) for e in self.edits if not isinstance(e, Splice)]
        return list(dict.fromkeys(str(one) for one in found if one.index is not None))

    @cached_property
    def readback(self) -> dict[str, Tensor]:
        """Address -> `[B, T]` code of each edited feature, re-encoded from the edited stream."""
        return {address: self.after.code(*split_address(address)) for address in self.features}

    def moved(self, k: int = 10) -> Table:
        """The codes that changed most, those of the edited features aside."""
        require_rows(k)
        found: list[dict[str, Any]] = []
        for name in self.after.codes:
            change = (self.after.codes[name] - self.before.codes[name]).coalesce()
            rows, tokens, features = change.indices()
            own = torch.tensor(
                [split_address(one)[1] for one in self.features if split_address(one)[0] == name], dtype=torch.long
            )
            kept = ~torch.isin(features, own) & (change.values() != 0)
            rows, tokens, features, values = rows[kept], tokens[kept], features[kept], change.values()[kept]
            for place in values.abs().argsort(descending=True, stable=True)[:k].tolist():
                row, token, index = int(rows[place]), int(tokens[place]), int(features[place])
                after = float(self.after.codes[name][row, token, index])
                line = {"feature": f"{name}/{index}", "prompt": row}
                line |= {
                    "position": int(self.batch.span.position_BT[row, token]),
                    "token": self.after.tokens[row][token],
                }
                found.append(
                    line | {"before": after - float(values[place]), "after": after, "change": float(values[place])}
                )
        found.sort(key=lambda line: (-abs(line["change"]), line["feature"]))
        lines = [line | {"words": self.fm.words(*split_address(line["feature"]))} for line in found[:k]]
        columns = ["feature", *(["prompt"] if len(self.after.tokens) > 1 else [])]
        return Table([*columns, "position", "token", "before", "after", "change", "words"], lines, "codes that moved")

    @cached_property
    def partners(self) -> Table:
        """The entangled partners of what was edited: mean code over the content before and after, the twin's beside it.

        The twin's answer is what its own partner does when the counterpart of the edited feature is edited alike.
        """
        rows: list[dict[str, Any]] = []
        for address in self.features:
            pairs = self.fm.pairs(address, 5)
            twin = self._twin(address)
            for pair in [*pairs, *self._held(address, {one["partner"] for one in pairs})]:
                line = {"feature": address, "partner": pair["partner"]}
                line |= {key: pair.get(key) for key in ("correlation", "cosine", "twin correlation")}
                line |= self._means(self, pair["partner"], "before", "after")
                if twin is not None and pair.get("twin partner") is not None:
                    line |= self._means(twin, pair["twin partner"], "twin before", "twin after")
                rows.append(line)
        columns = ["feature", "partner", "correlation", "cosine", "before", "after"]
        if any("twin after" in row for row in rows):
            columns += ["twin correlation", "twin before", "twin after"]
        return Table(columns, [{key: row.get(key) for key in columns} for row in rows], "entangled partners")

    def _held(self, address: str, known: set[str]) -> list[dict[str, Any]]:
        """Features an edit of `address` was told to leave alone, that are not among its partners anyway."""
        held = [
            str(self.fm.feature(one))
            for edit in self.edits
            if getattr(edit, "without", ()) and str(self.fm.feature(edit.feature)) == address  # pyright: ignore
            for one in ([edit.without] if isinstance(edit.without, str) else edit.without)  # pyright: ignore
        ]
        return [{"partner": one} for one in held if one not in known]

    def _twin(self, address: str) -> "Effect | None":
        """The same edits of the counterpart in the twin."""
        counterpart = self.fm.pairs(address, 1).counterpart
        if counterpart is None:
            return None
        edits = []
        for edit in self.edits:
            if isinstance(edit, Splice) or str(self.fm.dictionaries.feature(edit.feature, or_all=True)) != address:
                continue
            if hasattr(edit, "reading"):
                return None
            edits.append(replace(edit, feature=counterpart, **({"without": ()} if hasattr(edit, "without") else {})))
        mask_BT = edited_mask(self.batch, edits)
        after, _ = self.fm.passed(self.batch, edits, mask_BT, "content", logits=False)
        return replace(self, edits=tuple(edits), after=after)

    @staticmethod
    def _means(effect: "Effect", address: str, before: str, after: str) -> dict[str, float]:
        mask_BT = effect.batch.span.content_BT.cpu()
        count = max(1, int(mask_BT.sum()))
        codes = {before: effect.before.code(*split_address(address)), after: effect.after.code(*split_address(address))}
        return {name: float(code_BT[mask_BT].sum()) / count for name, code_BT in codes.items()}

    def to_table(self, k: int = 10) -> Table:
        """The codes that moved, with the divergence and the re-encoded codes below."""
        require_rows(k)
        kl = float(self.kl.sum()) / int(self.batch.real_BT.sum())
        notes = [f"KL divergence {kl:.4g} per token"]
        for address, code_BT in self.readback.items():
            notes.append(f"{address} re-encodes as {float(code_BT.max()):.4g} at most")
        moved = self.moved(k)
        return Table(moved.columns, moved.rows, moved.caption, tuple(notes))

    def to_dict(self) -> dict[str, Any]:
        """Divergence, moved codes, re-encoded codes and partners as plain values."""
        return {
            "kl": self.kl.tolist(),
            "readback": {address: code.tolist() for address, code in self.readback.items()},
            "moved": self.moved(50).rows,
            "partners": self.partners.rows,
        }

    def to_pandas(self) -> Any:
        """The moved codes as a DataFrame."""
        return self.moved(100).to_pandas()
