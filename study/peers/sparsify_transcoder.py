"""eai-sparsify's transcoder on rows that `sites.py` wrote, in an environment that has it; one JSON line.

Its Trainer runs only inside a language model's forward hooks, so the body of its hook and its optimiser step are
written out here: Adam, inputs as they are, `b_dec` at the first batch's mean, no norm on the decoder's rows.
"""

import json
import sys
import time

import torch
from safetensors.torch import load_file
from sparsify import SparseCoder, SparseCoderConfig

torch.set_num_threads(2)
asked = json.loads(sys.argv[1])
rows = load_file(asked["rows"])
x_RD, y_RD = (rows[site].float() for site in asked["ends"])
batch, held_out, steps = asked["batch"], asked["held_out"], asked["steps"]
torch.manual_seed(asked["seed"])
config = SparseCoderConfig(num_latents=asked["n_features"], k=asked["k"], transcode=True, skip_connection=asked["skip"])
coder = SparseCoder(x_RD.shape[1], config, "cpu", dtype=torch.float32)
optimiser = torch.optim.Adam(coder.parameters(), lr=asked["lrs"][0])
since_fired = torch.zeros(asked["n_features"], dtype=torch.long)
began = time.process_time()
for step, lr in enumerate(asked["lrs"]):
    here = slice(held_out + step * batch, held_out + (step + 1) * batch)
    x_BD, y_BD = x_RD[here], y_RD[here]
    if step == 0:
        coder.b_dec.data = y_BD.mean(0)
    for group in optimiser.param_groups:
        group["lr"] = lr
    out = coder(x=x_BD, y=y_BD, dead_mask=since_fired > 10_000_000)
    (out.fvu + out.auxk_loss / 32).backward()
    optimiser.step()
    optimiser.zero_grad()
    since_fired += batch
    since_fired[out.latent_indices.unique()] = 0
seconds = time.process_time() - began
with torch.no_grad():
    x_BD, y_BD = x_RD[:held_out], y_RD[:held_out]
    y_hat_BD = torch.cat([coder(x=x, y=y).sae_out for x, y in zip(x_BD.split(2048), y_BD.split(2048), strict=True)])
    fvu = float((y_BD - y_hat_BD).double().square().sum() / (y_BD - y_BD.mean(0)).double().square().sum())
print(json.dumps({"fvu": fvu, "cpu_seconds_a_step": seconds / steps}))
