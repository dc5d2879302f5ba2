"""Train an SAE on the patches of a vision transformer: any field, a run folder, exact resume.

The model has random weights and the images are noise, so that the example needs no download; put yours in their place.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers

import unbraid
from unbraid.config import overridden

LAYER = 1


def patches() -> Iterator[dict[str, torch.Tensor]] | Iterator[torch.Tensor]:
    """Hidden states of one batch of images after another, [images, patches, D], without the class token."""
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.ViTModel(config, add_pooling_layer=False).eval()
    draws = torch.Generator().manual_seed(1)
    for _ in range(80):
        images = torch.randn(16, 3, 32, 32, generator=draws)
        with torch.no_grad():
            states = model(images, output_hidden_states=True).hidden_states
        yield states[LAYER + 1][:, 1:]


def main(path: Path | str) -> unbraid.Run:
    """The run. `patches` is passed as a function, so that it can be started anew."""
    changes = {
        "sae.architecture": "topk",
        "sae.n_features": 64,
        "sae.k": 8,
        "variants": {"": {}},
        "training.tokens": 10_240,
        "training.checkpoint_every": 10,
    }
    config, _ = overridden(unbraid.recipes.tiny(), changes)
    return unbraid.train(config, path, activations={"patches": patches})


if __name__ == "__main__":
    print(main(sys.argv[1]).summary["saes"])
