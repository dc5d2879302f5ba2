"""Bytes exchanged are those of the formula in docs/distributed.md, and do not grow with the number of features."""

import pytest
import split_training
from gloo import on_ranks

from unbraid.distributed.cost import Job, split_step_payload


@pytest.mark.parametrize("architecture", ["topk", "batch_topk"])
@pytest.mark.parametrize("n_features", [60, 600])
def test_a_split_step_exchanges_the_bytes_of_the_formula(architecture, n_features):
    rows, k, ranks = 40, 4, 3
    settings = {"architecture": architecture, "n_features": n_features, "k": k}
    found = on_ranks(ranks, split_training.payload_of_a_step, settings, rows)
    assert sum(rank["active"] for rank in found) == rows * k
    largest = max(rank["active"] for rank in found)
    job = Job(rows, split_training.SPLIT["D"], n_features, k)
    expected = split_step_payload(job, ranks, largest, batch_top_k=architecture == "batch_topk")
    assert [rank["payload"] for rank in found] == [expected] * ranks
