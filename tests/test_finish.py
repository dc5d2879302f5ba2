"""The end of a run measures on held-out rows that were chosen as training chose its own."""

import pytest
import torch
from fake_source import FakeSource

from unbraid.activations.rows import Chunk, RowFilter
from unbraid.config import BufferConfig, ModelConfig, RunConfig, TrainingConfig
from unbraid.errors import TextError
from unbraid.finish import held_out_rows


def config(held_out_tokens: int = 256) -> RunConfig:
    return RunConfig(
        model=ModelConfig(sites=["resid_post.0"]),
        buffer=BufferConfig(norm_limit=3.0),
        training=TrainingConfig(held_out_tokens=held_out_tokens),
    )


def chunk_of(norms: list[float], width: int = 4) -> Chunk:
    """Rows of these norms, after a first position that is left out."""
    rows = torch.zeros(1, len(norms) + 1, width)
    rows[0, 1:, 0] = torch.tensor(norms)
    return Chunk(torch.ones(1, len(norms) + 1, dtype=torch.long), [rows], {"context": 1})


class Norms(FakeSource):
    """Held-out rows of the norms given."""

    def __init__(self, norms: list[float]):
        super().__init__(1)
        self.norms = norms

    def chunks(self, position, held_out=False):
        assert held_out
        yield chunk_of(self.norms)


def trained_filter() -> RowFilter:
    """After training on rows with a median norm of 1, whose mean norm is 13: the limit is 3."""
    source = Norms([])
    rows_filter = RowFilter(config().buffer, source.sites, frozenset())
    kept = rows_filter(chunk_of([1.0] * 8 + [61.0] * 2))
    assert len(kept[0]) == 8
    return rows_filter


def test_the_norm_limit_is_a_multiple_of_the_median_not_of_the_mean():
    assert trained_filter().limits == [pytest.approx(3.0)]


def test_held_out_rows_are_limited_by_the_norms_of_training():
    """Their own median of 10 would let 20 through and rows of training's size are all that is measured."""
    rows = torch.cat(
        [part[0] for part in held_out_rows(config(), Norms([10.0] * 5 + [20.0, 1.0, 2.0]), trained_filter())]
    )
    assert rows[:, 0].tolist() == [1.0, 2.0]


def test_no_more_held_out_rows_than_asked_for():
    (rows,) = held_out_rows(config(256), Norms([1.0] * 300), trained_filter())
    assert len(rows[0]) == 256


def test_held_out_text_that_disappeared_is_said():
    with pytest.raises(TextError, match="no held-out row is left"):
        list(held_out_rows(config(), Norms([50.0]), trained_filter()))
