"""The training loop: one batch feeds every dictionary, and the loop reads like the method.

Runs, synthetic worlds and `unbraid.fit` all come here; what surrounds a run (the buffer, logs, checkpoints) stands in
`loop.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from unbraid.errors import RowsUsedUp
from unbraid.training.sae_trainer import SAETrainer, train_step
from unbraid.training.schedules import learning_rate

Records = dict[str, dict[str, Any] | None]
"""SAE name -> its line of metrics."""


def no_step(_: int) -> bool:
    """The default answer to "is this step logged?"."""
    return False


def train_steps(
    trainers: Sequence[SAETrainer],
    next_batch: Callable[[], list[Tensor]],
    steps: int,
    *,
    done: int = 0,
    logged: Callable[[int], bool] = no_step,
    after_step: Callable[[int, Records | None], None] | None = None,
) -> int:
    """Train until step `steps`, or as far as the rows last; returns the steps executed, those already `done` included.

    Args:
        trainers: the SAEs to train; none affects another.
        next_batch: raw activations of the next step, one [B, D] tensor per site.
        steps: steps planned; learning rates are for this number.
        done: steps made before.
        logged: whether a finished step (counted from 1) is measured.
        after_step: called with the steps finished, and the metrics of a step that is logged.

    Raises:
        TrainingError: a loss or gradient is not finite; that dictionary's weights are as before the step.
        RowsUsedUp: there are not even rows for one step.
    """
    for step in range(done, steps):
        try:
            batch = next_batch()
        except RowsUsedUp:
            if step == 0:
                raise
            steps = step
            break
        log = logged(step + 1)
        records: Records = {}
        for trainer in trainers:
            if trainer.updates <= step:  # One that made this step before a neighbour failed in it does not repeat it.
                lr = learning_rate(trainer.config.optimiser, step, steps)
                x_BD, y_BM = trainer.rows(batch)
                records[trainer.name] = train_step(trainer, x_BD, step, lr, log, y_BM)
        if after_step is not None:
            after_step(step + 1, records if log else None)
    for trainer in trainers:
        trainer.require_finite()
    return steps
