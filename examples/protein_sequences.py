"""Train an SAE on a protein language model's residues: a model that sees both ways, read by your own loop.

The ESM here has random weights and the sequences are made up, so that the example needs no download.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers

import unbraid

RESIDUES, SPECIAL, LENGTH = 20, 4, 48


def residues() -> Iterator[torch.Tensor]:
    """Hidden states of every residue of one batch of proteins after another, [proteins, residues, D]."""
    config = transformers.EsmConfig(
        vocab_size=SPECIAL + RESIDUES,
        mask_token_id=2,
        pad_token_id=1,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=LENGTH + 2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.EsmModel(config, add_pooling_layer=False).eval()
    draws = torch.Generator().manual_seed(1)
    for _ in range(40):
        sequences = torch.randint(SPECIAL, SPECIAL + RESIDUES, (8, LENGTH), generator=draws)
        with torch.no_grad():
            yield model(sequences, attention_mask=torch.ones_like(sequences)).last_hidden_state


def main(path: Path | str) -> unbraid.Run:
    """A run with an SAE and its twin without decorrelation."""
    config = unbraid.recipes.tiny().model_dump()
    config["training"] |= {"tokens": 10_240, "batch_tokens": 512}
    return unbraid.train(unbraid.RunConfig(**config), path, activations={"residues": residues})


if __name__ == "__main__":
    print(main(sys.argv[1]).summary["saes"])
