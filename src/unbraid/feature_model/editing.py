"""Edits made ready for a model: the hooks that carry them out, and the span of tokens each pass covers."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from unbraid.activations.hooks import Place, Visit
from unbraid.errors import FeatureError
from unbraid.feature_model.dictionaries import Dictionaries, Dictionary, Feature
from unbraid.feature_model.edits import Ablate, Clamp, Edit, Patch, Scale, Splice, Steer
from unbraid.feature_model.hooks import hooked
from unbraid.feature_model.positions import Span, chosen, is_special


class SpanTracker:
    """Knows, in every pass of a model, which positions its tokens have: also behind a cache and left padding.

    Positions come from `position_ids` where the caller gives them, else from the attention mask, else from the length
    of the cache. The first pass without a cache is the prompt.
    """

    def __init__(self, model: nn.Module, special_ids: Sequence[int]):
        self.model, self.special_ids = model, special_ids
        self.span: Span | None = None

    @contextmanager
    def following(self) -> Iterator[None]:
        """Keep `span` up to date while the block lasts."""
        handle = self.model.register_forward_pre_hook(self._see, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _see(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        tokens_BT = args[0] if args else kwargs.get("input_ids")
        embeds = kwargs.get("inputs_embeds")
        if tokens_BT is None and embeds is None:
            raise FeatureError("the model was called without input_ids or inputs_embeds; expected one of them")
        rows, width = (tokens_BT if tokens_BT is not None else embeds).shape[:2]
        device = (tokens_BT if tokens_BT is not None else embeds).device
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        position_BT, real_BT = self._positions(kwargs, rows, width, past, device)
        position_BT = position_BT.masked_fill(~real_BT, -1)
        special_BT = torch.zeros_like(real_BT) if tokens_BT is None else is_special(tokens_BT, self.special_ids)
        if past == 0 or self.span is None:
            length_B = position_BT.amax(1) + 1 if past == 0 else position_BT[:, 0]
        else:
            length_B = self.span.length_B
            if len(length_B) != rows:
                raise FeatureError(
                    f"a cached pass has {rows} rows where the prompt had {len(length_B)}; expected the same rows; "
                    "edits do not follow beams or repeated sequences"
                )
        self.span = Span(position_BT, special_BT, length_B)

    @staticmethod
    def _positions(kwargs: Any, rows: int, width: int, past: int, device: torch.device) -> tuple[Tensor, Tensor]:
        mask = kwargs.get("attention_mask")
        masked = isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == past + width
        real_BT = mask[:, -width:].bool() if masked else torch.ones(rows, width, dtype=torch.bool, device=device)
        given = kwargs.get("position_ids")
        if isinstance(given, Tensor) and given.ndim == 2 and given.shape[1] == width:
            return given.expand(rows, -1).long(), real_BT
        if masked:
            return (mask.long().cumsum(1) - 1)[:, -width:], real_BT
        return torch.arange(past, past + width, device=device).expand(rows, -1), real_BT


@dataclass
class _Work:
    """What is to be done with one dictionary: edits with the feature each is about, and a splice if there is one."""

    dictionary: Dictionary
    edits: list[tuple[Edit, Feature]] = field(default_factory=list)
    splice: Splice | None = None


class Editing:
    """Edits ready to be carried out on a model, in one pass or in many behind a cache.

    Args:
        dictionaries: of the model.
        edits: what to do.
        units: NAME, unit -> what 1 is worth: `[N]` codes for `"max"`, a norm for `"norm"`.

    Raises:
        FeatureError: an edit names no feature of the model, contradicts another, or is of no known kind.
    """

    def __init__(self, dictionaries: Dictionaries, edits: Sequence[Any], units: Any):
        self.dictionaries, self.edits = dictionaries, list(edits)
        self._work: dict[str, _Work] = {}
        self._amounts: dict[int, float] = {}
        self._directions: dict[int, Tensor] = {}
        for edit in self.edits:
            self._add(edit, units)
        spliced: dict[Place, str] = {}
        for name, work in self._work.items():
            if work.splice is None or work.splice.error:
                continue
            if (other := spliced.setdefault(work.dictionary.writes, name)) != name:
                raise FeatureError(
                    f"{other} and {name} are both spliced into {work.dictionary.writes.name}; expected one "
                    "reconstruction per site; splice one of them, or hold its error"
                )

    def _add(self, edit: Any, units: Any) -> None:
        if isinstance(edit, Splice):
            work = self._work_of(self.dictionaries[edit.dictionary])
            if work.splice is not None:
                raise FeatureError(f"{work.dictionary.name} is spliced twice; expected one Splice per dictionary")
            work.splice = edit
            return
        if not isinstance(edit, Steer | Scale | Clamp | Ablate | Patch):
            raise FeatureError(f"{edit!r} is no edit; expected Steer, Scale, Clamp, Ablate, Patch or Splice, in a list")
        number = getattr(edit, "by", getattr(edit, "factor", getattr(edit, "value", 0)))
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise FeatureError(f"{edit!r} has no finite number; expected one, such as 2.0")
        feature = self.dictionaries.feature(edit.feature, or_all=isinstance(edit, Ablate | Patch))
        self._work_of(feature.dictionary).edits.append((edit, feature))
        if isinstance(edit, Steer):
            self._amounts[id(edit)] = float(edit.by) * (1.0 if edit.unit == "code" else units(feature, edit.unit))
            if edit.without:
                self._directions[id(edit)] = self._direction(feature, edit)

    def _work_of(self, dictionary: Dictionary) -> _Work:
        return self._work.setdefault(dictionary.name, _Work(dictionary))

    def _direction(self, feature: Feature, edit: Steer) -> Tensor:
        """The feature's decoder row less its part in the span of those it must not move."""
        others = [self.dictionaries.feature(address) for address in _listed(edit.without)]
        for other in others:
            if other.dictionary.writes != feature.dictionary.writes or other == feature:
                raise FeatureError(
                    f"{edit.feature!r} cannot be steered without {str(other)!r}; expected another feature of "
                    "the same site"
                )
        row_M = feature.dictionary.W_dec[feature.index].double()
        rows_KM = torch.stack([other.dictionary.W_dec[other.index].double() for other in others])
        _, sizes, basis_KM = torch.linalg.svd(rows_KM, full_matrices=False)
        basis_KM = basis_KM[sizes > 1e-9 * sizes.max()]
        return (row_M - (basis_KM @ row_M) @ basis_KM).float()

    def hooks(self, tracker: SpanTracker) -> list[tuple[Place, Visit]]:
        """The hooks of one model, which read the span of each pass from `tracker`."""
        found: list[tuple[Place, Visit]] = []
        by_place: dict[Place, list[_Carried]] = {}
        for work in self._work.values():
            carried = _Carried(work, self._amounts, self._directions, tracker)
            by_place.setdefault(work.dictionary.writes, []).append(carried)
            if work.dictionary.reads != work.dictionary.writes:
                found.append((work.dictionary.reads, carried.see))
        return found + [(place, _together(several)) for place, several in by_place.items()]

    @contextmanager
    def attached(self, tracker: SpanTracker) -> Iterator[None]:
        """Carry out the edits on every pass while the block lasts."""
        with hooked(self.hooks(tracker)):
            yield


def _listed(without: Any) -> list[Any]:
    return [without] if isinstance(without, str) else list(without)


def _together(several: "list[_Carried]") -> Visit:
    """All that happens at one place: a reconstruction in place of the activations if asked for, then what is added."""

    def change(y_BTM: Tensor) -> Tensor:
        after = y_BTM.float()
        parts = [one(y_BTM) for one in several]
        for replaced, _ in parts:
            if replaced is not None:
                mask_BT, y_hat_BTM = replaced
                after = torch.where(mask_BT[..., None], y_hat_BTM, after)
        for _, added in parts:
            if added is not None:
                after = after + added
        return after.to(y_BTM.dtype)

    return change


class _Carried:
    """One dictionary's work, carried out pass by pass."""

    def __init__(
        self, work: _Work, amounts: Mapping[int, float], directions: Mapping[int, Tensor], tracker: SpanTracker
    ):
        self.dictionary, self.edits, self.splice = work.dictionary, work.edits, work.splice
        self.amounts, self.directions, self.tracker = amounts, directions, tracker
        self.read_BTD: Tensor | None = None

    def see(self, x_BTD: Tensor) -> None:
        """Remember what the dictionary reads, where it writes elsewhere."""
        self.read_BTD = x_BTD

    def __call__(self, y_BTM: Tensor) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
        """What takes the place of activations (which tokens, what), and what is added to all, `[B, T, M]` float32."""
        span = self._span(y_BTM)
        masks = [chosen(edit.at, span) for edit, _ in self.edits]
        self._refuse_two_values(masks)
        x_BTD = y_BTM if self.dictionary.reads == self.dictionary.writes else self.read_BTD
        if x_BTD is None:
            raise FeatureError(f"{self.dictionary.name} writes before it reads in this model; its edits cannot act")
        if self.dictionary.scales_tokens is None:
            self.dictionary.encode(x_BTD[:, -1].float())
        replaces = self.splice is not None and not self.splice.error
        if not replaces and not self._needs_codes():
            return None, self._steered(masks, y_BTM)
        involved_BT = torch.stack([*masks, *([chosen(self.splice.at, span)] if replaces else [])]).any(0)  # pyright: ignore
        if not bool(involved_BT.any()):
            return None, None
        return self._coded(x_BTD, y_BTM, span, masks, involved_BT)

    def _coded(
        self, x_BTD: Tensor, y_BTM: Tensor, span: Span, masks: list[Tensor], involved_BT: Tensor
    ) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
        x_RD = x_BTD[involved_BT].float()
        scale_R1 = self.dictionary.token_scale(x_RD)
        f_RN = self.dictionary.encode(x_RD)
        change_RN, aside_RM = torch.zeros_like(f_RN), f_RN.new_zeros(len(f_RN), y_BTM.shape[-1])
        for (edit, feature), mask_BT in zip(self.edits, masks, strict=True):
            mask_R = mask_BT[involved_BT]
            if id(edit) in self.directions:
                aside_RM = aside_RM + mask_R[:, None] * self.amounts[id(edit)] * self.directions[id(edit)]
                continue
            columns = slice(None) if feature.index is None else slice(feature.index, feature.index + 1)
            own_RK = self._change(edit, feature, f_RN[:, columns], mask_BT, span, involved_BT)
            change_RN[:, columns] = change_RN[:, columns] + torch.where(mask_R[:, None], own_RK, 0.0)
        if self.splice is None or self.splice.error:
            added_RM = self._written(change_RN, scale_R1) + (aside_RM if scale_R1 is None else aside_RM * scale_R1)
            return None, _at(involved_BT, added_RM, y_BTM)
        spliced_BT = chosen(self.splice.at, span)
        spliced_R1 = spliced_BT[involved_BT][:, None]
        y_hat_BTM = _at(involved_BT, self.dictionary.predict(x_RD, f_RN + change_RN), y_BTM)
        added_RM = torch.where(spliced_R1, 0.0, self._written(change_RN, scale_R1))
        aside_RM = aside_RM if scale_R1 is None else aside_RM * scale_R1
        return (spliced_BT, y_hat_BTM), _at(involved_BT, added_RM + aside_RM, y_BTM)

    def _written(self, change_RN: Tensor, scale_R1: Tensor | None) -> Tensor:
        """(f' - f) W_dec, from the columns that change."""
        columns = change_RN.detach().any(0).nonzero().flatten()
        written_RM = change_RN[:, columns] @ self.dictionary.W_dec[columns]
        return written_RM if scale_R1 is None else written_RM * scale_R1

    def _steered(self, masks: list[Tensor], y_BTM: Tensor) -> Tensor | None:
        """What steering adds where nothing depends on the codes."""
        added: Tensor | None = None
        for (edit, feature), mask_BT in zip(self.edits, masks, strict=True):
            row_M = self.directions.get(id(edit), self.dictionary.W_dec[feature.index])
            own = mask_BT[..., None].float() * (self.amounts[id(edit)] * row_M)
            added = own if added is None else added + own
        return added

    def _needs_codes(self) -> bool:
        return bool(self.dictionary.scales_tokens) or not all(isinstance(edit, Steer) for edit, _ in self.edits)

    def _change(
        self, edit: Edit, feature: Feature, f_RK: Tensor, mask_BT: Tensor, span: Span, involved_BT: Tensor
    ) -> Tensor:
        """f' - f of the columns an edit is about, at all rows involved."""
        if isinstance(edit, Steer):
            return torch.full_like(f_RK, self.amounts[id(edit)])
        if isinstance(edit, Scale):
            return f_RK * (edit.factor - 1)
        if isinstance(edit, Clamp):
            return edit.value - f_RK
        if isinstance(edit, Ablate):
            return -f_RK
        assert isinstance(edit, Patch)
        return _patched(edit, feature, f_RK, mask_BT, span, involved_BT) - f_RK

    def _refuse_two_values(self, masks: list[Tensor]) -> None:
        """No code may be given two values at one token."""
        taken: dict[int | None, Tensor] = {}
        for (edit, feature), mask_BT in zip(self.edits, masks, strict=True):
            if isinstance(edit, Steer):
                continue
            for index, before_BT in taken.items():
                same = None in (index, feature.index) or index == feature.index
                if same and bool((before_BT & mask_BT).any()):
                    raise FeatureError(
                        f"two edits give {feature} a value at the same token ({edit!r} is the second); expected one of "
                        "Scale, Clamp, Ablate and Patch per feature and token; leave one out, or change at"
                    )
            taken[feature.index] = taken.get(feature.index, torch.zeros_like(mask_BT)) | mask_BT

    def _span(self, y_BTM: Tensor) -> Span:
        span = self.tracker.span
        if span is None or tuple(y_BTM.shape[:2]) != tuple(span.position_BT.shape):
            seen = None if span is None else list(span.position_BT.shape)
            raise FeatureError(
                f"{self.dictionary.site} gave activations of shape {list(y_BTM.shape)} in a pass over tokens {seen}; "
                "expected [rows, tokens, width]"
            )
        if y_BTM.shape[-1] != self.dictionary.W_dec.shape[1]:
            raise FeatureError(
                f"{self.dictionary.name} writes {self.dictionary.W_dec.shape[1]} wide, but {self.dictionary.site} is "
                f"{y_BTM.shape[-1]} wide; expected a dictionary trained there"
            )
        return span


def _at(mask_BT: Tensor, rows_RM: Tensor, like_BTM: Tensor) -> Tensor:
    """Rows put where the mask is, zero elsewhere, `[B, T, M]` float32."""
    zeros = torch.zeros(like_BTM.shape, dtype=torch.float32, device=like_BTM.device)
    return zeros.index_put((mask_BT,), rows_RM)


def _patched(edit: Patch, feature: Feature, f_RK: Tensor, mask_BT: Tensor, span: Span, involved_BT: Tensor) -> Tensor:
    reading = edit.reading
    if feature.dictionary.name not in getattr(reading, "codes", {}):
        raise FeatureError(
            f"the reading of {edit!r} has no codes of {feature.dictionary.name}; expected a Reading made by this model"
        )
    if feature.dictionary.n_features != reading.codes[feature.dictionary.name].shape[2]:
        raise FeatureError(f"the reading is of another dictionary than {feature.dictionary.name}; expected its width")
    inside_BT = mask_BT & (span.position_BT < span.length_B[:, None])
    after_RK = f_RK.clone()
    if not bool(inside_BT.any()):  # generated text
        return after_RK
    theirs_bt = chosen(edit.at, reading.span) & (reading.span.position_BT < reading.span.length_B[:, None])
    rows_N = reading.codes[feature.dictionary.name].to_dense()
    codes = rows_N if feature.index is None else rows_N[..., feature.index : feature.index + 1]
    row_of_R = involved_BT.nonzero()[:, 0]
    inside_R = inside_BT[involved_BT]
    for row in range(len(mask_BT)):
        other = min(row, len(theirs_bt) - 1)
        values = codes[other][theirs_bt[other]]
        here_R = inside_R & (row_of_R == row)
        if not bool(reading.read_BT[other][theirs_bt[other]].all()):
            raise FeatureError(
                f"at={edit.at!r} names a token that was not read (reading.at={reading.at!r}); expected tokens with "
                "codes; read with at='all'"
            )
        if len(values) != int(here_R.sum()) or (len(theirs_bt) not in (1, len(mask_BT))):
            raise FeatureError(
                f"at={edit.at!r} names {int(here_R.sum())} tokens of the prompt and {len(values)} of the reading; "
                "expected as many; give positions such as at=-1"
            )
        after_RK = after_RK.index_put((here_R,), values.to(after_RK))
    return after_RK
