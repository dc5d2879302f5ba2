"""The yardstick: one bare encoder product x W_enc a step, into fresh memory or, with "reuse", into the same memory."""

import torch
from feed import Feed, settings_from_arguments

settings = settings_from_arguments()
feed = Feed(settings, lambda x: (x, x))
W_enc = torch.randn(settings["d_in"], settings["n_features"], device=settings["device"])
out = torch.empty(settings["batch"], settings["n_features"], device=settings["device"])
for x in feed:
    if settings["reuse"]:
        torch.mm(x, W_enc, out=out)
    else:
        product = x @ W_enc
        del product
