"""Selective decorrelation in a training loop of your own: one module, one line, one term in the loss.

python examples/plain_pytorch.py
"""

import torch

import unbraid

batches = [torch.randn(256, 64, generator=torch.Generator().manual_seed(step)) for step in range(20)]

# README from here
W_dec = torch.nn.Parameter(torch.nn.functional.normalize(torch.randn(512, 64), dim=1))
W_enc = torch.nn.Parameter(W_dec.detach().T.clone())
optimiser = torch.optim.Adam([W_enc, W_dec], lr=3e-4)
decorrelate = unbraid.SelectiveDecorrelation(window=4)  # choose pairs on four batches, push them apart on each
for x in batches:
    values, indices = torch.relu(x @ W_enc).topk(8)
    f = torch.zeros(len(x), 512).scatter(1, indices, values)
    penalty, stats = decorrelate(indices=indices, values=values, n_features=512)  # or decorrelate(f)
    loss = (x - f @ W_dec).pow(2).sum(1).mean() + 0.1 * penalty
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    with torch.no_grad():
        W_dec /= W_dec.norm(dim=1, keepdim=True)
    print(f"loss {loss.item():.3f}  R {penalty.item():.4f}  tau {stats.tau:.4f}  {len(stats.pairs)} pairs")
# README to here
