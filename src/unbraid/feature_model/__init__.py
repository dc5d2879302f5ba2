"""Features in hand: read the features of a prompt, steer, ablate and splice them, and attribute logits to them."""

from unbraid.feature_model.attribution import logit
from unbraid.feature_model.edits import Ablate, Clamp, Patch, Scale, Splice, Steer
from unbraid.feature_model.matching import match
from unbraid.feature_model.model import FeatureModel
from unbraid.feature_model.opening import features

__all__ = ["Ablate", "Clamp", "FeatureModel", "Patch", "Scale", "Splice", "Steer", "features", "logit", "match"]
