"""Training an SAE on a synthetic world: the run's own training step, fed with samples instead of a language model.

The SAE learns on activations scaled to E||x||^2 = 1 and comes back acting on raw ones, as a run's SAEs do, so what is
found on a world holds for the trainer that is used on language models.
"""

from collections.abc import Callable

import torch

from unbraid.config import VariantConfig
from unbraid.decorrelation.build import build as build_decorrelation
from unbraid.errors import TrainingError
from unbraid.randomness import derive_seed, generator
from unbraid.sae import SAE
from unbraid.sae.build import build as build_sae
from unbraid.synthetic.world import World
from unbraid.training.loop import Trainee, train_step
from unbraid.training.optimiser import SAEOptimiser
from unbraid.training.schedules import learning_rate

SCALE_SAMPLES = 16_384


def train_on_world(
    world: World,
    settings: VariantConfig,
    samples: int,
    batch: int = 1024,
    on_step: Callable[[int], None] | None = None,
) -> SAE:
    """An SAE trained on `samples` fresh samples of `world`, on the world's device; it acts on raw activations.

    Args:
        world: where activations come from.
        settings: architecture, penalty, optimiser and seed; the seed decides the first weights and the samples.
        samples: how many; `samples // batch` steps.
        batch: samples per step.
        on_step: called with the number of steps done.

    Raises:
        TrainingError: there is no step to make, or the loss is not finite.
    """
    steps = samples // batch
    if steps < 1:
        raise TrainingError(f"{samples} samples // {batch} a step gives no step; expected at least 1; raise samples")
    seed = derive_seed(settings.seed, "world")
    x_BD, _ = world.sample(SCALE_SAMPLES, generator(seed, "scale", device=world.device))
    scale = float(x_BD.double().square().sum(1).mean().rsqrt())
    mean_D = (x_BD.double().mean(0) * scale).float()
    sae = build_sae(settings.sae, world.d_model, generator(seed, "init"), mean_D).to(world.device)
    trainee = Trainee(
        name=settings.sae.architecture,
        site=0,
        config=settings,
        scale=scale,
        sae=sae,
        optimiser=SAEOptimiser(sae, settings.optimiser),
        decorrelate=build_decorrelation(
            settings.decorrelation, sae.n_features, sae.d_in, derive_seed(seed, "pairs")
        ).to(world.device),
        generator=generator(seed, "training", device=world.device),
        tokens_since_fired=torch.zeros(sae.n_features, dtype=torch.long, device=world.device),
    )
    stream = world.batches(batch, generator(seed, "samples", device=world.device))
    for step in range(steps):
        train_step(trainee, next(stream) * scale, step, learning_rate(settings.optimiser, step, steps), log=False)
        if on_step is not None:
            on_step(step + 1)
    sae.fold_scale(scale)
    return sae.requires_grad_(False)
