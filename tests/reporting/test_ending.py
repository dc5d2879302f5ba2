"""The pairs that a finished run shows: those that changed most, and none of a feature that never fires."""

import numpy as np
import scipy.sparse as sparse
import torch

from unbraid.reporting.dashboard.entangled import Pair, pair_contexts
from unbraid.reporting.dashboard.passes import HeldOutPass
from unbraid.reporting.ending import most_changed, pair_lines

C, T, N = 20, 11, 6
R = C * (T - 1)


def codes_where(*, silent: tuple[int, ...] = (), together: bool) -> sparse.csc_array:
    """Features 0 and 1 fire on the same rows or on different ones, the others at random."""
    chance = np.random.default_rng(0)
    f_RN = (chance.random((R, N)) * (chance.random((R, N)) < 0.2)).astype(np.float32)
    f_RN[:, 0] = np.arange(R) % 4 == 0
    f_RN[:, 1] = np.arange(R) % 4 == (0 if together else 2)
    f_RN[:, list(silent)] = 0.0
    return sparse.csc_array(f_RN)


def held_out(codes: sparse.csc_array) -> HeldOutPass:
    context_R, position_R = (part.ravel() for part in np.meshgrid(np.arange(C), np.arange(1, T), indexing="ij"))
    return HeldOutPass(np.arange(C * T).reshape(C, T), context_R, position_R, {"sae": codes})


def test_the_pair_that_was_entangled_in_the_twin_alone_comes_first():
    W_dec, codes = torch.eye(N), codes_where(together=False)
    first = most_changed(codes, W_dec, codes_where(together=True), W_dec)[0]
    assert first.features == (0, 1)
    assert first.correlation < 0.1 < 0.9 < first.twin_correlation
    texts = [[f" w{token}" for token in row] for row in held_out(codes).tokens_CT]
    lines = [str(line) for line in pair_lines("sae", first, held_out(codes), codes, texts)]
    assert lines[0].startswith("sae/0 and sae/1: correlation 0.00, in the twin 1.00")
    assert [line.split()[:2] for line in lines[1:]] == [["only", "0"], ["only", "1"]]


def test_a_feature_that_is_dead_here_gives_no_pair():
    W_dec = torch.eye(N)
    found = most_changed(codes_where(silent=(1,), together=False), W_dec, codes_where(together=True), W_dec)
    assert all(1 not in pair.features for pair in found)


def test_a_pair_with_a_silent_feature_has_contexts_of_the_other_alone():
    codes = codes_where(silent=(1,), together=False)
    pair = Pair((0, 1), 0.0, 0, (R // 4, 0), 0.0, None, None, None)
    found = pair_contexts(held_out(codes), codes, pair)
    assert found["both"] == found["second"] == [] and found["first"]
