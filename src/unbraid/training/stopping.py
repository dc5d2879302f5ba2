"""Stopping politely, and leaving the caller's process as it was found.

The first SIGINT or SIGTERM asks for a stop: the loop notices between two steps and writes a checkpoint. While text is
waited for, which may take minutes when a stream stalls, the same signal ends the waiting; a refill is a transaction, so
nothing is lost. A second signal acts as usual.
"""

import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import numpy as np
import torch

from unbraid.activations.rows import RefillInterrupted
from unbraid.errors import UnbraidError


class TrainingInterrupted(UnbraidError):
    """The run was asked to stop; a checkpoint was written and the run can be resumed.

    Attributes:
        exit_code: what the command line exits with: 128 + the signal's number, as shells do.
    """

    exit_code: int = 130


class StopRequest:
    """Whether a signal asked for a stop. Called, it answers; `waiting` marks code that a signal may end at once."""

    def __init__(self) -> None:
        self.signals: list[int] = []
        self._may_raise = False

    def __call__(self) -> bool:
        """Whether a signal has come."""
        return bool(self.signals)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """For the length of the block a signal raises `RefillInterrupted` where it arrives."""
        self._may_raise = True
        try:
            yield
        finally:
            self._may_raise = False

    def take(self, number: int, _frame: FrameType | None) -> None:
        """A signal has come."""
        self.signals.append(number)
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        if self._may_raise:
            raise RefillInterrupted


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a stop request; the handlers are put back afterwards.

    Only the main thread can catch signals; elsewhere the stop is never asked for.
    """
    request, previous = StopRequest(), {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, request.take)
    except ValueError:
        pass
    try:
        yield request
    except TrainingInterrupted as interrupted:
        # Among ranks another one may have been asked.
        interrupted.exit_code = 128 + (request.signals[0] if request.signals else signal.SIGTERM)
        raise
    finally:
        for number, handler in previous.items():
            # None stands for a handler that was not set from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def process_as_found(threads: int | None) -> Iterator[None]:
    """Use this many CPU threads; afterwards the caller's thread count and random states are what they were."""
    count, torch_state = torch.get_num_threads(), torch.get_rng_state()
    numpy_state, python_state = np.random.get_state(), random.getstate()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(count)
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)
