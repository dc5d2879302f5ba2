"""Runs that an error ends on the way."""

from collections.abc import Callable


class Stop(Exception):
    pass


def stop_at(step: int) -> Callable[[int, object], None]:
    """A callback that ends a run after `step` steps."""

    def callback(done: int, _: object) -> None:
        if done == step:
            raise Stop

    return callback
