"""Where a crosscoder's features live: how much each writes into each of its sites.

Features of a crosscoder over two models that write into one of them only are how the models differ (Lindsey et al.
2024). Under an L1 penalty features seem exclusive that are not, because it drives the weaker of two decoder rows to
nothing; BatchTopK crosscoders do not have that fault (Minder et al., arXiv 2504.02922), nor do any here whose L0 is
fixed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from unbraid.errors import EvaluationError
from unbraid.sae.base import SAE

EXCLUSIVE_BELOW = 0.2
"""Of the largest norm: a feature whose rows of all other sites are smaller belongs to one site. With two sites this is
a relative norm difference above 0.9, where Minder et al. call a latent exclusive."""


def by_site(widths_out: Sequence[int], scales_out: Sequence[float]) -> dict[str, Any]:
    """What a dictionary's metadata says of the sites it predicts: nothing where it is one."""
    if len(widths_out) == 1:
        return {}
    return {"widths_out": list(widths_out), "scales_out": list(scales_out)}


@torch.no_grad()
def relative_norms(crosscoder: SAE) -> Float[Tensor, "N sites"]:
    """Norms of each feature's decoder rows by site, as shares of its largest one.

    They are taken in units in which every site has the same spread, as in training.

    Raises:
        EvaluationError: it does not predict several sites.

    Example:
        >>> import unbraid
        >>> x = torch.randn(2048, 8, generator=torch.Generator().manual_seed(0))
        >>> topk = unbraid.SAEConfig(architecture="topk", n_features=32, k=4)
        >>> crosscoder = unbraid.fit(topk, {"base + copy": (x, x.clone())}, batch_tokens=256)["sae"]
        >>> relative_norms(crosscoder).shape
        torch.Size([32, 2])
    """
    parts = crosscoder.by_site(crosscoder.W_dec.float())
    if len(parts) < 2:
        raise EvaluationError(f"{crosscoder!r} predicts one site; expected a crosscoder, trained on A + B")
    scales = crosscoder.metadata.get("scales_out", [1.0] * len(parts))
    norms_NL = torch.stack([scale * part.norm(dim=1) for scale, part in zip(scales, parts, strict=True)], dim=1)
    return norms_NL / norms_NL.amax(1, keepdim=True).clamp(min=1e-30)


def exclusive_features(crosscoder: SAE, below: float = EXCLUSIVE_BELOW) -> list[Tensor]:
    """For each site the features that write into it alone, their rows elsewhere `below` that share of the largest.

    Raises:
        EvaluationError: it does not predict several sites.
    """
    relative_NL = relative_norms(crosscoder)
    alone_N = (relative_NL >= below).sum(1) == 1
    return [(alone_N & (relative_NL[:, site] == 1)).nonzero().squeeze(1) for site in range(relative_NL.shape[1])]
