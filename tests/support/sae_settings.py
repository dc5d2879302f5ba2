"""Settings of an SAE of any architecture, from more than it reads: what tests over all architectures share."""

from typing import Any

from unbraid.config import SAEConfig


def sae_settings(architecture: str = "relu", **settings: Any) -> SAEConfig:
    """`SAEConfig` of that architecture with those of `settings` that it reads."""
    read = SAEConfig.kinds()[architecture].model_fields
    return SAEConfig(architecture=architecture, **{name: value for name, value in settings.items() if name in read})
