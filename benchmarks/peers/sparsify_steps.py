"""Steps of eai-sparsify's SparseCoder, as its Trainer takes them.

That Trainer runs only inside a language model's forward hooks, so the body of its hook and its optimiser step are
written out here, with Adam as its `optimizer: adam`.
"""

import torch
from feed import Feed, settings_from_arguments
from sparsify import SparseCoder, SparseCoderConfig

settings = settings_from_arguments()
torch.set_float32_matmul_precision("high")
config = SparseCoderConfig(num_latents=settings["n_features"], k=settings["k"])
sae = SparseCoder(settings["d_in"], config, settings["device"], dtype=torch.float32)


def score(x):
    values, features, _ = sae.encode(x)
    f = torch.zeros(len(x), settings["n_features"], device=x.device).scatter_(1, features, values)
    return f @ sae.W_dec + sae.b_dec, f


feed = Feed(settings, score)
optimiser = torch.optim.Adam(sae.parameters(), lr=settings["lr"])
since_fired = torch.zeros(settings["n_features"], dtype=torch.long, device=settings["device"])
fired = torch.zeros(settings["n_features"], dtype=torch.bool, device=settings["device"])
sae.b_dec.data = feed.batches[0].mean(0)
for x in feed:
    sae.set_decoder_norm_to_unit_norm()
    out = sae(x=x, y=x, dead_mask=since_fired > 10_000_000)
    fired[out.latent_indices.flatten()] = True
    (out.fvu + out.auxk_loss / 32).backward()
    sae.remove_gradient_parallel_to_decoder_directions()
    optimiser.step()
    optimiser.zero_grad()
    with torch.no_grad():
        since_fired += len(x)
        since_fired[fired] = 0
        fired.zero_()
