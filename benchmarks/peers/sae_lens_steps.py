"""Steps of sae-lens, through its SAETrainer.fit()."""

import sae_lens
import torch
from feed import Feed, bias_for_l0, settings_from_arguments
from sae_lens.config import SAETrainerConfig

settings = settings_from_arguments()
shared = {"d_in": settings["d_in"], "d_sae": settings["n_features"], "device": settings["device"]}
n, k = settings["n_features"], settings["k"]
sae = {
    "relu": lambda: sae_lens.StandardTrainingSAE(
        sae_lens.StandardTrainingSAEConfig(**shared, l1_coefficient=settings["lambda1"])
    ),
    "topk": lambda: sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(**shared, k=k)),
    "batch_topk": lambda: sae_lens.BatchTopKTrainingSAE(sae_lens.BatchTopKTrainingSAEConfig(**shared, k=k)),
    "jumprelu": lambda: sae_lens.JumpReLUTrainingSAE(
        sae_lens.JumpReLUTrainingSAEConfig(
            **shared,
            l0_coefficient=settings["lambda1"],
            jumprelu_init_threshold=settings["sae"]["initial_threshold"],
            jumprelu_bandwidth=settings["sae"]["bandwidth"],
        )
    ),
    "gated": lambda: sae_lens.GatedTrainingSAE(
        sae_lens.GatedTrainingSAEConfig(**shared, l1_coefficient=settings["lambda1"])
    ),
    "matryoshka": lambda: sae_lens.MatryoshkaBatchTopKTrainingSAE(
        sae_lens.MatryoshkaBatchTopKTrainingSAEConfig(**shared, k=k, matryoshka_widths=[n // 16, n // 4, n])
    ),
}[settings["architecture"]]()


def score(x):
    f, _ = sae.encode_with_hidden_pre(x)
    f = f.to_dense() if f.is_sparse else f
    norms = sae.W_dec.norm(dim=1) if settings["architecture"] in ("relu", "jumprelu", "gated") else 1.0
    return sae.decode(f), f * norms


feed = Feed(settings, score)
with torch.no_grad():
    if settings["l0"]:
        bias = sae.b_gate if settings["architecture"] == "gated" else sae.b_enc
        bias += bias_for_l0(sae.process_sae_in(feed.batches[0][:256]) @ sae.W_enc, settings["l0"])
config = SAETrainerConfig(
    total_training_samples=10**9,
    train_batch_size_samples=settings["batch"],
    lr=settings["lr"],
    lr_end=settings["lr"],
    device=settings["device"],
)
sae_lens.SAETrainer(cfg=config, sae=sae, data_provider=feed).fit()
