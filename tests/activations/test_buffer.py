import pytest
import torch
from fake_source import FakeSource
from hypothesis import given, settings
from hypothesis import strategies as st

from unbraid.activations.buffer import ActivationBuffer, RefillInterrupted
from unbraid.config import BufferConfig
from unbraid.errors import ActivationError, ConfigError, TextError


def make_buffer(source: FakeSource, batch: int = 16, contexts: int = 16, **settings) -> ActivationBuffer:
    return ActivationBuffer(source, BufferConfig(contexts=contexts), batch, seed=0, **settings)


def drain(buffer: ActivationBuffer, source: FakeSource) -> list[list[int]]:
    batches = []
    while True:
        try:
            batches.append(source.row_numbers(buffer.next_batch()[0]))
        except TextError:
            return batches


@settings(max_examples=25, deadline=None)
@given(
    contexts=st.integers(8, 60),
    context_length=st.integers(2, 9),
    batch_contexts=st.integers(1, 5),
    batch=st.integers(1, 16),
)
def test_every_batch_has_exactly_b_rows_and_no_row_is_lost_or_repeated(contexts, context_length, batch_contexts, batch):
    source = FakeSource(contexts, context_length, batch_contexts=batch_contexts)
    buffer = make_buffer(source, batch, contexts=max(16, 2 * batch_contexts))
    batches = drain(buffer, source)
    seen = [row for rows in batches for row in rows]
    assert all(len(rows) == batch for rows in batches)
    assert len(set(seen)) == len(seen)
    every_row = {r for r in range(contexts * context_length) if r % context_length}
    assert set(seen) <= every_row
    assert len(every_row) - len(seen) < batch


def test_special_tokens_and_first_positions_never_enter():
    source = FakeSource(32)
    rows = {row for rows in drain(make_buffer(source), source) for row in rows}
    assert rows and not any(row % source.context_length == 0 for row in rows)


def test_rows_come_shuffled_across_contexts():
    source = FakeSource(64)
    buffer = make_buffer(source, batch=16, contexts=32)
    contexts_in_first_batch = {row // source.context_length for row in source.row_numbers(buffer.next_batch()[0])}
    assert len(contexts_in_first_batch) > 8


def test_a_row_is_the_same_token_at_every_site():
    source = FakeSource(32, n_sites=3)
    first, second, third = make_buffer(source).next_batch()
    assert source.row_numbers(first) == source.row_numbers(second) == source.row_numbers(third)
    assert not torch.equal(first, second)


def test_massive_rows_are_dropped_counted_and_leave_the_scale_alone():
    source = FakeSource(64)
    plain = make_buffer(source)
    plain.fill()
    source.spoil = {35: 1e6}
    buffer = make_buffer(source)
    buffer.fill()
    assert buffer.filter.dropped["massive"] == 1
    assert next(buffer.rows()).norm(dim=1).max() < 100
    assert torch.isclose(next(buffer.rows()).square().mean(), next(plain.rows()).square().mean(), rtol=0.05)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_stop_the_run_and_name_the_site(value):
    source = FakeSource(64)
    source.spoil = {35: value}
    with pytest.raises(ActivationError, match=r"resid_post\.0 are not finite.*context 0 .*position 3"):
        make_buffer(source).fill()


def test_it_refills_when_half_is_used():
    source = FakeSource(64)
    buffer = make_buffer(source, batch=16, contexts=16)
    buffer.fill()
    passes = source.passes
    while source.passes == passes:
        before = len(buffer)
        buffer.next_batch()
    assert before - 16 < buffer.capacity // 2
    assert len(buffer) > buffer.capacity // 2


@pytest.mark.parametrize("taken", [0, 1, 2, 3, 5, 8])
def test_a_restored_buffer_goes_on_with_the_same_batches(taken):
    source = FakeSource(64)
    buffer = make_buffer(source)
    buffer.fill()
    for _ in range(taken):
        buffer.next_batch()
    state = buffer.state()
    expected = drain(buffer, source)
    other = make_buffer(FakeSource(64))
    other.load_state(*state)
    assert drain(other, source) == expected


def test_a_stop_in_the_middle_of_a_refill_leaves_the_state_untouched():
    source = FakeSource(64)
    stop_after = [10**9]
    buffer = make_buffer(source, should_stop=lambda: source.passes >= stop_after[0])
    buffer.fill()
    stop_after[0] = source.passes + 1
    taken = []
    with pytest.raises(RefillInterrupted):
        while True:
            tensors, data = buffer.state()
            taken.append(source.row_numbers(buffer.next_batch()[0]))
    after_tensors, after_data = buffer.state()
    assert after_data == data
    assert all(torch.equal(tensors[name], after_tensors[name]) for name in tensors)
    stop_after[0] = 10**9
    undisturbed = drain(make_buffer(FakeSource(64)), source)
    assert taken + drain(buffer, source) == undisturbed


def test_text_that_ends_says_how_many_steps_it_gave():
    source = FakeSource(20)
    buffer = make_buffer(source)
    with pytest.raises(TextError, match=r"140 rows, which is 8 steps .*lower training.tokens to at most 128"):
        for _ in range(9):
            buffer.next_batch()


def test_a_batch_larger_than_half_the_buffer_is_refused():
    with pytest.raises(ConfigError, match=r"training.batch_tokens = 65 .*buffer.contexts = 16"):
        make_buffer(FakeSource(64), batch=65)


def test_a_refill_smaller_than_a_model_batch_is_refused():
    with pytest.raises(ConfigError, match=r"buffer.contexts = 6 .*at least 8"):
        make_buffer(FakeSource(64), contexts=6)


def test_bfloat16_storage_halves_the_precision_not_the_rows():
    source = FakeSource(64)
    config = BufferConfig(contexts=16, dtype="bfloat16")
    batch = ActivationBuffer(source, config, 16, seed=0).next_batch()[0]
    exact = make_buffer(source).next_batch()[0]
    assert batch.dtype == torch.float32
    assert torch.equal(batch, exact.bfloat16().float())
