"""Learning rate and penalty weights as pure functions of the step, so nothing about them needs saving.

Steps are counted from 0; a warm-up of n steps gives (step + 1) / n of the full value, so the first step already moves
and step n - 1 is the first at full strength.
"""

from unbraid.config import OptimiserConfig


def warm_up(step: int, steps: int) -> float:
    """Linear rise to 1 over `steps` steps; 1 from the start when `steps` is 0."""
    return min(1.0, (step + 1) / steps) if steps else 1.0


def learning_rate(config: OptimiserConfig, step: int, total_steps: int) -> float:
    """Warm-up, plateau, linear fall to zero over the last `decay_fraction` of the run.

    The last step still has a rate above zero.
    """
    decay_steps = round(config.decay_fraction * total_steps)
    fall = min(1.0, (total_steps - step) / (decay_steps + 1)) if decay_steps else 1.0
    return config.lr * min(warm_up(step, config.warmup_steps), fall)
