"""Train with a penalty of your own: a module with state, which checkpoints keep.

This one pushes decoder rows apart whose features fired most often so far.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import unbraid


class FrequentRowsApart(nn.Module):
    """Mean squared cosine between the decoder rows of the `count` most frequent features."""

    def __init__(self, n_features: int, count: int = 16):
        super().__init__()
        self.count = count
        self.register_buffer("fired", torch.zeros(n_features))

    def forward(self, f: Tensor | None, *, codes: Any, decoder: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Codes are dense in `f` [B, N] or sparse in `codes`; `decoder` is [N, D] with unit rows."""
        fired: Tensor = self.fired  # pyright: ignore[reportAssignmentType]
        with torch.no_grad():
            if f is None:
                fired += torch.bincount(codes.indices, minlength=len(fired))
            else:
                fired += (f > 0).sum(0)
        rows = decoder[fired.topk(self.count).indices]
        cosines = rows @ rows.T - torch.eye(self.count, device=rows.device)
        penalty = cosines.square().mean()
        return penalty, {"largest_cosine": float(cosines.detach().max())}


def main(path: Path | str) -> unbraid.Run:
    """The tiny recipe with this penalty beside its twin."""
    config = unbraid.recipes.tiny().model_dump()
    config["model"]["sites"] = ["resid_post.1"]
    config["decorrelation"]["lambda2"] = 10.0
    config["training"]["tokens"] = 10_240
    return unbraid.train(unbraid.RunConfig(**config), path, penalty=FrequentRowsApart(config["sae"]["n_features"]))


if __name__ == "__main__":
    print(main(sys.argv[1]).summary["saes"])
