"""unbraid: train and study sparse autoencoders (SAEs) with feature decorrelation.

run = unbraid.train(unbraid.recipes.tiny())      # a whole run: text, model, SAEs, metrics, figure
saes = unbraid.fit(unbraid.SAEConfig(...), x)    # SAEs on a tensor of activations, without a run folder
sae = unbraid.load(path)                         # an SAE folder in any known layout
decorrelate = unbraid.SelectiveDecorrelation()   # the penalty, for a training loop of your own
fm = unbraid.features("runs/demo")               # the model with a run's SAEs in it: read, steer, attribute
"""

from typing import TYPE_CHECKING

from unbraid.lazy_names import imported_when_asked_for

if TYPE_CHECKING:
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
    from unbraid.finetuning import finetune
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
    "finetune",
    "fit",
    "load",
    "logit",
    "match",
    "recipes",
    "resume",
    "train",
]
__version__ = "0.2.0"


__getattr__ = imported_when_asked_for(
    __name__,
    {
        "unbraid.recipes": ["recipes"],
        "unbraid.config": ["DecorrelationConfig", "OptimiserConfig", "RunConfig", "SAEConfig", "VariantConfig"],
        "unbraid.decorrelation.penalty": ["SelectiveDecorrelation"],
        "unbraid.errors": ["UnbraidError"],
        "unbraid.feature_model": [
            *("Ablate", "Clamp", "FeatureModel", "Patch", "Scale", "Splice", "Steer", "features", "logit", "match"),
        ],
        "unbraid.finetuning": ["finetune"],
        "unbraid.fitting": ["fit"],
        "unbraid.formats": ["load"],
        "unbraid.run": ["Run", "resume", "train"],
    },
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
