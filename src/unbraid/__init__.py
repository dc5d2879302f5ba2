"""unbraid: train sparse autoencoders whose features come apart.

run = unbraid.train(unbraid.recipes.tiny())      # a whole run: text, model, SAEs, metrics, figure
saes = unbraid.fit(unbraid.SAEConfig(...), x)    # SAEs on a tensor of activations, without a run folder
sae = unbraid.load(path)                         # an SAE folder in any known layout
decorrelate = unbraid.SelectiveDecorrelation()   # the penalty, for a training loop of your own
fm = unbraid.features("runs/demo")               # the model with a run's SAEs in it: read, steer, attribute
"""

from unbraid import recipes
from unbraid.config import DecorrelationConfig, OptimiserConfig, RunConfig, SAEConfig, VariantConfig
from unbraid.decorrelation.penalty import SelectiveDecorrelation
from unbraid.errors import UnbraidError
from unbraid.feature_model import (
    Ablate,
    Clamp,
    FeatureModel,
    Patch,
    Scale,
    Splice,
    Steer,
    features,
    logit,
    match,
)
from unbraid.fitting import fit
from unbraid.formats import load
from unbraid.run import Run, resume, train

__all__ = [
    "Ablate",
    "Clamp",
    "DecorrelationConfig",
    "FeatureModel",
    "OptimiserConfig",
    "Patch",
    "Run",
    "RunConfig",
    "SAEConfig",
    "Scale",
    "SelectiveDecorrelation",
    "Splice",
    "Steer",
    "UnbraidError",
    "VariantConfig",
    "features",
    "fit",
    "load",
    "logit",
    "match",
    "recipes",
    "resume",
    "train",
]
__version__ = "0.1.0"
