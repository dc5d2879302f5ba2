"""Training SAEs on a synthetic world: the run's own training step, fed with samples instead of a language model.

The SAEs learn in a run's units (`Normalisation`) and come back acting on raw activations, as a run's SAEs do, so what
is found on a world holds for the trainer that is used on language models. SAEs trained together see the same samples,
as the variants of a run do: drawing them costs more than a small SAE's step, and the comparison is paired.
"""

from collections.abc import Callable, Sequence

from torch import nn

from unbraid.config import VariantConfig
from unbraid.errors import TrainingError
from unbraid.randomness import derive_seed, generator
from unbraid.sae import SAE
from unbraid.synthetic.world import World
from unbraid.training.normalisation import Normalisation
from unbraid.training.schedules import learning_rate
from unbraid.training.trainee import train_step, untrained

SCALE_SAMPLES = 16_384


def train_on_world(
    world: World,
    variants: Sequence[VariantConfig],
    samples: int,
    batch: int = 1024,
    on_step: Callable[[int], None] | None = None,
    penalties: Sequence[nn.Module | None] | None = None,
) -> list[SAE]:
    """An SAE for each of `variants`, all trained on the same `samples` fresh samples of `world`, on its device.

    An SAE trained beside others is the one trained alone. They act on raw activations.

    Args:
        world: where activations come from.
        variants: architecture, penalty and optimiser of each, and the seed they share, which decides the samples and,
            where widths agree, the first directions.
        samples: how many; `samples // batch` steps.
        batch: samples per step.
        on_step: called with the number of steps done.
        penalties: penalties of your own, one a variant, in the place of those the settings describe (none: keep that
            one), weighted by the variant's lambda2. Called with codes, as `f` or `codes=`, and `decoder=W_dec`; the
            answer is a pair of a scalar and anything.

    Raises:
        TrainingError: there is no step to make, the seeds differ, or a loss is not finite.
    """
    steps = samples // batch
    if steps < 1:
        raise TrainingError(f"{samples} samples // {batch} a step gives no step; expected at least 1; raise samples")
    seeds = {settings.seed for settings in variants}
    if len(seeds) != 1:
        raise TrainingError(
            f"variants have the seeds {sorted(seeds)}; expected one seed, because they share their samples; train each "
            "seed by itself"
        )
    seed = derive_seed(seeds.pop(), "world")
    x_BD, _ = world.sample(SCALE_SAMPLES, generator(seed, "scale", device=world.device))
    normalise = Normalisation.of(x_BD, "the world's samples")
    trainees = [
        untrained(settings.sae.architecture, 0, settings, seed, normalise, world.device) for settings in variants
    ]
    for trainee, penalty in zip(trainees, penalties or [None] * len(trainees), strict=True):
        if penalty is not None:
            trainee.decorrelate = penalty
    stream = world.batches(batch, generator(seed, "samples", device=world.device))
    for step in range(steps):
        x_BD = normalise(next(stream))
        for trainee in trainees:
            train_step(trainee, x_BD, step, learning_rate(trainee.config.optimiser, step, steps), log=False)
        if on_step is not None:
            on_step(step + 1)
    for trainee in trainees:
        trainee.sae.fold(normalise.mean_D, normalise.scale)
    return [trainee.sae.requires_grad_(False) for trainee in trainees]
