from itertools import pairwise

import pytest

from unbraid.config import OptimiserConfig
from unbraid.training.schedules import learning_rate, warm_up


def test_the_first_rate_is_above_zero_and_warm_up_ends_on_time():
    config = OptimiserConfig(lr=1.0, warmup_steps=10, decay_fraction=0.0)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[8] < 1.0 == rates[9] == rates[99]


def test_the_rate_falls_linearly_at_the_end_and_the_last_step_still_learns():
    config = OptimiserConfig(lr=1.0, warmup_steps=0, decay_fraction=0.2)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[79] == 1.0 > rates[81]
    assert 0 < rates[99] < 0.06
    assert all(first >= second for first, second in pairwise(rates))


def test_no_warm_up_is_full_strength_at_once():
    assert warm_up(0, 0) == 1.0


def test_a_run_shorter_than_its_warm_up_never_reaches_the_full_rate():
    config = OptimiserConfig(lr=1.0, warmup_steps=1000)
    assert max(learning_rate(config, step, 50) for step in range(50)) <= 0.05
