"""Dictionaries that read several sites at once, in inference form only: each site has features of its own.

A cross-layer transcoder's features of a layer write into that layer and later ones; a crosscoder of this kind writes
into all its sites. Which it is lies in the weights: a decoder row is zero where it does not write.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unbraid.distributed.shard import Shard
from unbraid.errors import ActivationError, CodesError, FormatError
from unbraid.formats.published import Known
from unbraid.sae import SAE


def require_several_sites(known: Known, where: str, what: str) -> None:
    """Refuse a dictionary of several sites where one of one site is wanted, before anything of it is read.

    Raises:
        FormatError: naming it.
    """
    if not known.several_sites:
        raise FormatError(
            f"{where!r} holds {what}, which reads several sites; expected a dictionary of one site here; choose an SAE "
            "or a transcoder of one layer, or use unbraid.load in Python"
        )


def numbered_files(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """The files of a folder whose name has a layer's number where `pattern` has its group, from layer 0 on.

    Raises:
        FormatError: a layer's file is missing.
    """
    files = {int(found[1]): path for path in folder.iterdir() if (found := pattern.fullmatch(path.name))}
    if sorted(files) != list(range(len(files))):
        raise FormatError(
            f"{str(folder)!r}: files of layers {sorted(files)}; expected 0 to {max(files)}; download them all"
        )
    return [files[layer] for layer in sorted(files)]


def stacked(parts: Sequence[dict[str, Tensor]], where: str) -> dict[str, Tensor]:
    """The tensors of all layers, `[L, ...]` each.

    Raises:
        FormatError: a layer has other tensors than the first, or of other shapes.
    """
    shapes = [{name: tuple(tensor.shape) for name, tensor in part.items()} for part in parts]
    for layer, found in enumerate(shapes):
        if found != shapes[0]:
            raise FormatError(
                f"{where}: layer {layer} has {found}; expected {shapes[0]} as layer 0 has; download it again"
            )
    return {name: torch.stack([part[name] for part in parts]) for name in shapes[0]}


class SeveralSitesDictionary(SAE):
    """f_l = J(x_l W_enc_l + b_enc_l), y_k = sum_l f_l W_dec_l[:, k] + b_dec_k, and x_k W_skip_k in `forward`.

    Attributes:
        encoder_LND: `[L, n, D]`, n features of each of L sites; all N = L n of them stand in this order in codes.
        b_enc, threshold: `[L, n]`.
        W_dec: `[N, K, D]`, what each feature writes into each of K sites.
        b_dec: `[K, D]`.
        W_skip: `[K, D, D]` where there is a skip connection.
    """

    threshold: Tensor

    def __init__(self, name: str, tensors: dict[str, Tensor]):
        nn.Module.__init__(self)
        self._name = name
        self.encoder_LND = nn.Parameter(tensors["W_enc"].transpose(1, 2).contiguous())
        self.b_enc = nn.Parameter(tensors["b_enc"])
        self.threshold = nn.Parameter(tensors["threshold"])
        self.W_dec = nn.Parameter(tensors["W_dec"].flatten(0, 1))
        self.b_dec = nn.Parameter(tensors["b_dec"])
        skip = tensors.get("W_skip")
        self.register_parameter("W_skip", None if skip is None else nn.Parameter(skip))
        self.n_sites, self.features_per_site, self.d_in = self.encoder_LND.shape
        self.n_features = self.n_sites * self.features_per_site
        self.shard, self.is_transcoder = Shard(self.n_features), True
        self.metadata: dict[str, Any] = {}

    @property
    def architecture(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What it is."""
        return self._name

    @property
    def k(self) -> int | None:
        """No number of active features is fixed."""
        return None

    def preactivations(self, x: Float[Tensor, "*rows L D"]) -> Float[Tensor, "*rows N"]:
        """What the activation is applied to, from raw activations."""
        if x.ndim < 2 or x.shape[-2:] != (self.n_sites, self.d_in):
            raise ActivationError(
                f"activations have shape {tuple(x.shape)}; expected [..., {self.n_sites}, {self.d_in}]: those of all "
                f"{self.n_sites} sites of a token, in the order of metadata['hook_names']; stack them"
            )
        return (torch.einsum("...ld,lnd->...ln", x, self.encoder_LND) + self.b_enc).flatten(-2)

    def encode(self, x: Float[Tensor, "*rows L D"]) -> Float[Tensor, "*rows N"]:
        """Codes of raw activations, the first site's features first."""
        pre = self.preactivations(x)
        return pre.relu() * (pre > self.threshold.flatten())

    def decode(self, f: Float[Tensor, "*rows N"]) -> Float[Tensor, "*rows K D"]:
        """Output of every site from codes, without the skip connection."""
        return torch.einsum("...n,nkd->...kd", self.require_codes(f), self.W_dec) + self.b_dec

    def forward(self, x: Float[Tensor, "*rows L D"]) -> Float[Tensor, "*rows K D"]:
        """Output from raw activations, the skip connection included."""
        y = self.decode(self.encode(x))
        return y if self.W_skip is None else y + torch.einsum("...kd,kde->...ke", x, self.W_skip)

    def training_forward(self, *_: Any, **__: Any) -> Any:
        """Imported dictionaries are not trained.

        Raises:
            CodesError: always.
        """
        raise CodesError(f"a {self.architecture} from elsewhere can be used but not trained; train a topk")
