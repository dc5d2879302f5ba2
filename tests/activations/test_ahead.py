import threading

import pytest
import torch
from fake_source import FakeSource

from unbraid.activations.ahead import Ahead
from unbraid.activations.buffer import ActivationBuffer
from unbraid.config import BufferConfig
from unbraid.errors import TextError


def buffer_over(source) -> ActivationBuffer:
    return ActivationBuffer(source, BufferConfig(contexts=16), 16, seed=0)


def test_computing_ahead_changes_no_batch():
    plain, ahead = buffer_over(FakeSource(64)), buffer_over(Ahead(FakeSource(64), depth=2))
    for _ in range(20):
        assert torch.equal(plain.next_batch()[0], ahead.next_batch()[0])


def test_state_does_not_contain_what_was_computed_ahead():
    plain, ahead = buffer_over(FakeSource(64)), buffer_over(Ahead(FakeSource(64), depth=5))
    for _ in range(6):
        plain.next_batch(), ahead.next_batch()
    (first, data), (second, ahead_data) = plain.state(), ahead.state()
    assert data == ahead_data
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_it_blocks_when_full_and_never_runs_away():
    source = FakeSource(400)
    chunks = Ahead(source, depth=3).chunks(None)
    next(chunks)
    for _ in range(50):
        if source.passes >= 5:
            break
        threading.Event().wait(0.02)
    assert source.passes <= 1 + 3 + 1
    chunks.close()


def test_an_error_is_raised_where_it_happened():
    class Broken(FakeSource):
        def chunks(self, position, held_out=False):
            yield from list(super().chunks(position))[:2]
            raise TextError("the stream broke")

    chunks = Ahead(Broken(64), depth=2).chunks(None)
    assert next(chunks).position == {"context": 4}
    assert next(chunks).position == {"context": 8}
    with pytest.raises(TextError, match="the stream broke"):
        next(chunks)


def test_no_thread_is_left_behind():
    before = threading.active_count()
    chunks = Ahead(FakeSource(400), depth=2).chunks(None)
    next(chunks)
    chunks.close()
    assert threading.active_count() == before
    assert len(list(Ahead(FakeSource(64), depth=2).chunks(None))) == 16
    assert threading.active_count() == before
