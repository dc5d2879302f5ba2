"""Steps of dictionary_learning, through its trainSAE()."""

import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.standard import StandardTrainer
from dictionary_learning.trainers.top_k import TopKTrainer
from dictionary_learning.training import trainSAE
from feed import Feed, bias_for_l0, settings_from_arguments

settings = settings_from_arguments()
architecture, k = settings["architecture"], settings["k"]
# threshold_start_step=0: the inference threshold is followed from the start, as in the steady state of a long run.
chosen_k = {"k": k, "threshold_start_step": 0}
trainer, own = {
    "relu": (StandardTrainer, {"l1_penalty": settings["lambda1"], "sparsity_warmup_steps": None}),
    "topk": (TopKTrainer, chosen_k),
    "batch_topk": (BatchTopKTrainer, chosen_k),
    "jumprelu": (
        JumpReluTrainer,
        {"bandwidth": settings["sae"].get("bandwidth"), "target_l0": settings["l0"], "sparsity_warmup_steps": None},
    ),
    "gated": (GatedSAETrainer, {"l1_penalty": settings["lambda1"], "sparsity_warmup_steps": None}),
    "matryoshka": (MatryoshkaBatchTopKTrainer, chosen_k | {"group_fractions": [1 / 16, 3 / 16, 12 / 16]}),
}[architecture]
made = []


def make(**arguments):
    made.append(trainer(**arguments))
    autoencoder = made[-1].ae
    with torch.no_grad():
        if settings["l0"]:
            x = feed.batches[0][:256]
            if architecture == "jumprelu":
                autoencoder.b_enc += bias_for_l0(x @ autoencoder.W_enc, settings["l0"])
            else:
                bias = autoencoder.gate_bias if architecture == "gated" else autoencoder.encoder.bias
                bias += bias_for_l0(x @ autoencoder.encoder.weight.T, settings["l0"])
    return made[-1]


def score(x):
    autoencoder = made[-1].ae
    by_batch = architecture in ("topk", "batch_topk", "matryoshka")
    f = autoencoder.encode(x, use_threshold=False) if by_batch else autoencoder.encode(x)
    return autoencoder.decode(f), f


feed = Feed(settings, score)
steps = 10**7
common = {"activation_dim": settings["d_in"], "dict_size": settings["n_features"], "lr": settings["lr"], "layer": 0}
common |= {
    "lm_name": "synthetic",
    "warmup_steps": 1,
    "seed": settings["seed"],
    "device": settings["device"],
    "steps": steps,
}
trainSAE(data=feed, trainer_configs=[common | own | {"trainer": make}], steps=steps, device=settings["device"])
