"""Work with features: read the features of a prompt, steer, ablate and splice them, and attribute logits to them."""

from typing import TYPE_CHECKING

from unbraid.lazy_names import imported_when_asked_for

if TYPE_CHECKING:
    from unbraid.feature_model.edits import Ablate, Clamp, Patch, Scale, Splice, Steer
    from unbraid.feature_model.logit_metric import logit
    from unbraid.feature_model.matching import match
    from unbraid.feature_model.model import FeatureModel
    from unbraid.feature_model.opening import features

__all__ = ["Ablate", "Clamp", "FeatureModel", "Patch", "Scale", "Splice", "Steer", "features", "logit", "match"]
__getattr__ = imported_when_asked_for(
    __name__,
    {
        "unbraid.feature_model.logit_metric": ["logit"],
        "unbraid.feature_model.edits": ["Ablate", "Clamp", "Patch", "Scale", "Splice", "Steer"],
        "unbraid.feature_model.matching": ["match"],
        "unbraid.feature_model.model": ["FeatureModel"],
        "unbraid.feature_model.opening": ["features"],
    },
)
