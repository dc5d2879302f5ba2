"""Every setting, its default and its check; nothing else in the package holds a default of its own.

A run is described by one frozen `RunConfig`. Unknown keys are refused, never dropped. The defaults are the paper's
constants where it gives them (Adam, lr 3e-4, lambda1 0.04, 1000 warm-up steps, batches of 2048 tokens, 24 contexts of
128 tokens per model pass, a buffer of 2048 contexts); named settings live in `recipes.py`.
"""

from unbraid.config.checks import Section, above, active_when, including, validated
from unbraid.config.decorrelation import DecorrelationConfig, Floor, PenaltyConfig
from unbraid.config.measuring import EvaluationConfig, ProbingConfig, SpellingConfig, SynthConfig, WorldConfig
from unbraid.config.overrides import Dropped, overridden
from unbraid.config.run import (
    BufferConfig,
    ModelConfig,
    OptimiserConfig,
    RunConfig,
    TextConfig,
    TrainingConfig,
    VariantConfig,
)
from unbraid.config.sae import SAEConfig, WeightedSAEConfig, WithKConfig
from unbraid.config.settings_file import load_config, read_settings, require_trust

__all__ = [
    "BufferConfig",
    "DecorrelationConfig",
    "Dropped",
    "EvaluationConfig",
    "Floor",
    "ModelConfig",
    "OptimiserConfig",
    "PenaltyConfig",
    "ProbingConfig",
    "RunConfig",
    "SAEConfig",
    "Section",
    "SpellingConfig",
    "SynthConfig",
    "TextConfig",
    "TrainingConfig",
    "VariantConfig",
    "WeightedSAEConfig",
    "WithKConfig",
    "WorldConfig",
    "above",
    "active_when",
    "including",
    "load_config",
    "overridden",
    "read_settings",
    "require_trust",
    "validated",
]
