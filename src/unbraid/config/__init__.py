"""Every setting, its default and its check; nothing else in the package holds a default of its own.

A run is described by one frozen `RunConfig`. Unknown keys are refused, never dropped. The defaults are the paper's
constants where it gives them (Adam, lr 3e-4, lambda1 0.04, 1000 warm-up steps, batches of 2048 tokens, 24 contexts of
128 tokens per model pass, a buffer of 2048 contexts); named settings live in `recipes.py`.
"""

from unbraid.config.checks import validated
from unbraid.config.decorrelation import DecorrelationConfig, Floor
from unbraid.config.measuring import EvaluationConfig, ProbingConfig, SpellingConfig, SynthConfig, WorldConfig
from unbraid.config.run import (
    Architecture,
    BufferConfig,
    ModelConfig,
    OptimiserConfig,
    RunConfig,
    SAEConfig,
    TextConfig,
    TrainingConfig,
    VariantConfig,
    load_config,
    require_trust,
)

__all__ = [
    "Architecture",
    "BufferConfig",
    "DecorrelationConfig",
    "EvaluationConfig",
    "Floor",
    "ModelConfig",
    "OptimiserConfig",
    "ProbingConfig",
    "RunConfig",
    "SAEConfig",
    "SpellingConfig",
    "SynthConfig",
    "TextConfig",
    "TrainingConfig",
    "VariantConfig",
    "WorldConfig",
    "load_config",
    "require_trust",
    "validated",
]
