"""Dictionaries under their names: where each reads and writes, its codes kept sparse, and what its decoder writes.

Nothing asks for unbraid's classes: `encode`, `decode` and `W_dec` [N, D] are enough. That `W_dec` is what `decode`
writes is checked on the first activations seen, and with it whether a dictionary normalises each token, in which case
what one unit of a code writes is as large as the token's scale.
"""

import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unbraid.activations.hooks import Place
from unbraid.activations.language_model import LanguageModel
from unbraid.errors import FeatureError
from unbraid.evaluation.protocols import predicted

ROWS_AT_ONCE = 1024
"""Token rows whose dense codes are alive at a time."""


class Feature(NamedTuple):
    """A dictionary's feature; `index` None stands for all of them."""

    dictionary: "Dictionary"
    index: int | None  # pyright: ignore[reportIncompatibleMethodOverride]

    def __str__(self) -> str:
        return f"{self.dictionary.name}/{'all' if self.index is None else self.index}"


def split_address(address: str) -> tuple[str, int]:
    """NAME and index of a feature that is known to exist; `Dictionaries.feature` checks what a user gives."""
    name, _, index = address.rpartition("/")
    return name, int(index)


class Dictionary:
    """One dictionary standing in a model.

    Attributes:
        name: NAME in addresses.
        site: where it stands.
        reads, writes: the places its encoder reads and its decoder writes; the same for an SAE.
        W_dec: `[N, M]` float32, detached.
    """

    def __init__(self, name: str, site: str, sae: Any, reads: Place, writes: Place):
        for part in ("encode", "decode"):
            if not callable(getattr(sae, part, None)):
                raise FeatureError(f"{name}: a {type(sae).__name__} has no {part}; expected encode, decode and W_dec")
        W_dec = getattr(sae, "W_dec", None)
        if not isinstance(W_dec, Tensor) or W_dec.ndim != 2:
            raise FeatureError(f"{name}: a {type(sae).__name__} has no matrix W_dec; expected [N, D]")
        self.name, self.site, self.sae, self.reads, self.writes = name, site, sae, reads, writes
        self.dtype = W_dec.dtype
        self.W_dec = W_dec.detach().float()
        self.scales_tokens: bool | None = None

    @property
    def n_features(self) -> int:
        """N."""
        return self.W_dec.shape[0]

    def encode(self, x_RD: Tensor) -> Tensor:
        """Codes `[R, N]` in float32 of activation rows.

        Raises:
            FeatureError: the dictionary is on another device, or does not fit the activations or its own `W_dec`.
        """
        if x_RD.device != self.W_dec.device:
            raise FeatureError(
                f"{self.name} is on {self.W_dec.device} but its site's activations are on {x_RD.device}; expected one "
                "device; move the dictionary there"
            )
        if self.scales_tokens is None and len(x_RD):
            self._prove(x_RD[:4])
        return self.sae.encode(x_RD.to(self.dtype)).float()

    def decode(self, f_RN: Tensor) -> Tensor:
        """Reconstruction `[R, M]` in float32 of codes of the rows encoded last."""
        return self.sae.decode(f_RN.to(self.dtype)).float()

    def predict(self, x_RD: Tensor, f_RN: Tensor) -> Tensor:
        """What it makes of rows whose codes are known, `[R, M]` in float32, a transcoder's skip connection included."""
        return predicted(self.sae, x_RD.to(self.dtype), f_RN.to(self.dtype)).float()

    def token_scale(self, x_RD: Tensor) -> Tensor | None:
        """What one unit of code writes at each row, `[R, 1]` times `W_dec`; None where that is always 1."""
        if self.scales_tokens is None:
            self.encode(x_RD[:4])
        if not self.scales_tokens or not len(x_RD):
            return None
        self.encode(x_RD)
        return self._scale(len(x_RD))[0]

    @torch.no_grad()
    def _prove(self, x_RD: Tensor) -> None:
        """Set `scales_tokens` from what `decode` does with a few codes."""
        try:
            f_RN = self.sae.encode(x_RD.to(self.dtype))
            if tuple(f_RN.shape) != (len(x_RD), self.n_features):
                raise FeatureError(
                    f"{self.name}: encode gave {tuple(f_RN.shape)} for {len(x_RD)} rows; expected "
                    f"[{len(x_RD)}, {self.n_features}] as W_dec [{', '.join(map(str, self.W_dec.shape))}] says"
                )
            scale_R1, error, size = self._scale(len(x_RD))
        except (RuntimeError, ValueError) as problem:
            raise FeatureError(
                f"{self.name} does not fit activations of width {x_RD.shape[1]} at {self.site} "
                f"({str(problem).splitlines()[0]}); expected a dictionary trained there"
            ) from problem
        tolerance = 64 * torch.finfo(self.dtype).eps
        if not error <= tolerance * size:
            raise FeatureError(
                f"{self.name}: decode is not f W_dec + b, not even up to a scale per token; expected W_dec [N, D] with "
                "the rows decode writes; edits act through W_dec"
            )
        self.scales_tokens = not bool(((scale_R1 - 1).abs() <= tolerance * size).all())

    def _scale(self, rows: int) -> tuple[Tensor, float, float]:
        """The token scales of the rows encoded last; how far `decode` is from scaled rows of `W_dec`, and its size."""
        few = self.W_dec.norm(dim=1).topk(min(4, self.n_features)).indices
        f_RN = torch.zeros(rows, self.n_features, device=self.W_dec.device)
        zero_RM = self.decode(f_RN)
        f_RN[:, few] = 1.0
        written_RM = self.decode(f_RN) - zero_RM
        expected_M = self.W_dec[few].sum(0)
        scale_R1 = (written_RM @ expected_M / expected_M.square().sum().clamp(min=1e-30))[:, None]
        error = float((written_RM - scale_R1 * expected_M).norm())
        return scale_R1, error, float(zero_RM.norm() + written_RM.norm()) + 1e-30


class Dictionaries(Mapping[str, Dictionary]):
    """The dictionaries of a model by NAME, and addresses of their features.

    Args:
        model: places the sites.
        saes: NAME -> an object with `encode`, `decode`, `W_dec`.
        sites: NAME -> site, for names that are not sites.
    """

    def __init__(self, model: LanguageModel, saes: Mapping[str, Any], sites: Mapping[str, str]):
        if not saes:
            raise FeatureError("no dictionary was given; expected {NAME: sae}, such as {'resid_post.5': sae}")
        standing = {name: sites.get(name, name) for name in saes}
        self._by_name = {
            name: Dictionary(name, standing[name], sae, *_places(model, standing[name])) for name, sae in saes.items()
        }

    def __getitem__(self, name: str) -> Dictionary:
        """The dictionary of a NAME, or of a site where one dictionary stands.

        Raises:
            FeatureError: there is none, or several stand there.
        """
        if name in self._by_name:
            return self._by_name[name]
        there = [one for one in self._by_name.values() if one.site == name]
        if len(there) == 1:
            return there[0]
        names = ", ".join(self._by_name)
        if there:
            raise FeatureError(
                f"{len(there)} dictionaries stand at {name}; expected one of {', '.join(one.name for one in there)}"
            )
        close = difflib.get_close_matches(str(name), self._by_name, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {names}"
        raise FeatureError(f"no dictionary {name!r}; expected a NAME of this model; {hint}")

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __iter__(self) -> Any:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def feature(self, address: Any, *, or_all: bool = False) -> Feature:
        """The feature an address `NAME/index` means; with `or_all` also `NAME/all`, and `all` for a lone dictionary.

        Raises:
            FeatureError: there is no such feature.
        """
        if isinstance(address, Feature):
            return address
        text = str(address)
        name, slash, index = text.rpartition("/")
        if not slash and or_all and text == "all" and len(self) == 1:
            return Feature(next(iter(self._by_name.values())), None)
        form = "NAME/index" + (" or NAME/all" if or_all else "") + f" such as {next(iter(self._by_name))}/0"
        if not slash or not name:
            raise FeatureError(f"{text!r} is no feature's address; expected {form}")
        dictionary = self[name]
        if or_all and index == "all":
            return Feature(dictionary, None)
        if not index.isascii() or not index.isdigit():
            raise FeatureError(f"{text!r} is no feature's address; expected {form}")
        if int(index) >= dictionary.n_features:
            raise FeatureError(
                f"{text!r} does not exist; expected an index from 0 to {dictionary.n_features - 1} of {dictionary.name}"
            )
        return Feature(dictionary, int(index))


def _places(model: LanguageModel, site: str) -> tuple[Place, Place]:
    """Where codes are read and where the decoder writes."""
    ends = [end.strip() for end in str(site).split("->")]
    if len(ends) > 2:
        raise FeatureError(f"site {site!r} has {len(ends)} ends; expected one, or two as in 'A -> B'")
    return model.place(ends[0]), model.place(ends[-1])
