"""Random models of real families with random dictionaries, for tests of the feature model."""

import torch
from sae_settings import sae_settings

from unbraid.activations.random_model import WIDTH, random_model
from unbraid.feature_model import FeatureModel
from unbraid.sae import SAE, build

PROMPT = "kate bola mima, zuka pali."
TEXT = ["kate bola mima tuko pali", "zuka pali roda, hello", "mima mima"]


def random_sae(seed: int, architecture: str = "relu", n_features: int = 96) -> SAE:
    draws = torch.Generator().manual_seed(seed)
    sae = build(sae_settings(architecture, n_features=n_features, k=8), WIDTH, draws)
    with torch.no_grad():
        for parameter in sae.state_dict().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draws)
    return sae.eval().requires_grad_(False)


def random_feature_model(family: str = "llama", dtype: str = "float32", **options) -> FeatureModel:
    model, tokenizer = random_model(family, dtype, 0)
    saes = options.pop("saes", None) or {"resid_post.0": random_sae(0), "resid_post.1": random_sae(1)}
    return FeatureModel(model, tokenizer, saes, **{"text": TEXT, "bos": True} | options)
