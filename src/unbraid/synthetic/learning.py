"""Training SAEs on a synthetic world: the run's own training step, fed with samples instead of a language model.

The SAEs learn in a run's units (`Normalisation`) and come back acting on raw activations, as a run's SAEs do, so what
is found on a world holds for the trainer that is used on language models. SAEs trained together see the same samples,
as the variants of a run do: drawing them costs more than a small SAE's step, and the comparison is paired.
"""

import copy
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from unbraid.config import VariantConfig
from unbraid.errors import CheckpointError, TrainingError
from unbraid.randomness import derive_seed, generator
from unbraid.sae import SAE
from unbraid.synthetic.world import World, WorldStream
from unbraid.training.checkpoint import list_checkpoints, read_checkpoint, write_checkpoint
from unbraid.training.fit import Records, train_steps
from unbraid.training.normalisation import Normalisation
from unbraid.training.sae_trainer import SAETrainer, trainer_from_settings

SCALE_SAMPLES = 16_384
CHECKPOINTS_KEPT = 1


def train_on_world(
    world: World,
    variants: Sequence[VariantConfig],
    samples: int,
    batch: int = 1024,
    on_step: Callable[[int, list[SAETrainer]], None] | None = None,
    penalties: Sequence[nn.Module | None] | None = None,
    checkpoints: Path | None = None,
    checkpoint_every: int = 1000,
) -> list[SAE]:
    """An SAE for each of `variants`, all trained on the same `samples` fresh samples of `world`, on its device.

    An SAE trained beside others is the one trained alone. They act on raw activations.

    Args:
        world: where activations come from.
        variants: architecture, penalty and optimiser of each, and the seed they share, which decides the samples and,
            where widths agree, the first directions.
        samples: how many; `samples // batch` steps.
        batch: samples per step.
        on_step: called with the number of steps done and the SAEs in training (`as_trained` gives one to be judged).
        penalties: penalties of your own, one per variant, instead of those in the settings (none: keep that
            one), weighted by the variant's lambda2. Called with codes, as `f` or `codes=`, and `decoder=W_dec`; the
            answer is a pair of a scalar and anything.
        checkpoints: a folder to go on from and to write to, so that a training that was killed ends the same.
        checkpoint_every: steps between checkpoints.

    Raises:
        TrainingError: there is no step to make, the seeds differ, or a loss is not finite.
        CheckpointError: `checkpoints` holds those of another training.
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
    trainers = [
        trainer_from_settings(
            settings.sae.architecture, (0,), settings, seed, normalise, world.device, None, penalty, steps, samples
        )
        for settings, penalty in zip(variants, penalties or [None] * len(variants), strict=True)
    ]
    stream = world.batches(batch, generator(seed, "samples", device=world.device))
    identity = _identity(world, variants, samples, batch)
    done = _restore(checkpoints, identity, trainers, stream) if checkpoints is not None else 0

    def after_step(step: int, _: Records | None) -> None:
        if on_step is not None:
            on_step(step, trainers)
        if checkpoints is not None and (step == steps or step % checkpoint_every == 0):
            _save(checkpoints, step, identity, trainers, stream)

    train_steps(trainers, lambda: [next(stream)], steps, done=done, after_step=after_step)
    return [as_trained(trainer) for trainer in trainers]


def as_trained(trainer: SAETrainer) -> SAE:
    """A copy of the SAE as it is now, acting on raw activations."""
    sae = copy.deepcopy(trainer.sae).requires_grad_(False)
    sae.fold(trainer.normalise.mean_D, trainer.normalise.scale)
    return sae


def _identity(world: World, variants: Sequence[VariantConfig], samples: int, batch: int) -> str:
    """What a training must have in common with the checkpoints it goes on from."""
    settings = [*(variant.model_dump_json() for variant in variants), f"{samples} {batch}"]
    directions = world.dictionary.cpu().contiguous().numpy().tobytes()
    return hashlib.sha256("\n".join(settings).encode() + directions).hexdigest()


def _save(folder: Path, step: int, identity: str, trainers: list[SAETrainer], stream: WorldStream) -> None:
    groups = {f"sae-{number}": trainer.tensors() for number, trainer in enumerate(trainers)}
    groups["stream"] = stream.state_dict()
    write_checkpoint(folder, step, groups, {"step": step, "identity": identity}, CHECKPOINTS_KEPT)


def _restore(folder: Path, identity: str, trainers: list[SAETrainer], stream: WorldStream) -> int:
    saved = list_checkpoints(folder)
    if not saved:
        return 0
    tensors, state = read_checkpoint(saved[-1])
    if state["identity"] != identity:
        raise CheckpointError(
            f"{str(folder)!r} holds checkpoints of a training with other settings; expected those of this one; choose "
            "another folder, or delete that one to start again"
        )
    for number, trainer in enumerate(trainers):
        trainer.load_tensors(tensors[f"sae-{number}"])
    stream.load_state_dict(tensors["stream"])
    return state["step"]
