"""Sites on every family of models: sums hold, hidden states are met bit for bit, changes arrive, refusals are named."""

import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.model_families import FAMILIES, Findings, examine

from unbraid.sites import KINDS

FEW = ["OPT", "BLOOM", "Llama 4"]
ROOT = Path(__file__).parents[2]


def check(found: Findings) -> None:
    assert found.layers["resid_post"] == found.layers["resid_pre"] == list(range(found.n_layers))
    for kind, layers in found.layers.items():
        assert len(layers) == found.n_layers or "for this model" in found.reasons[kind]


@pytest.mark.parametrize("family", FEW)
def test_families_that_flatten_tokens_or_add_the_stream_inside_are_read_right(family: str) -> None:
    found = examine(family)
    check(found)
    assert found.hidden == "equal"
    for kind in ("attn_out", "mlp_out", "resid_mid", "attn_z", "mlp_in", "mlp_normed"):
        assert found.layers[kind] == list(range(found.n_layers))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str) -> None:
    check(examine(family))


@pytest.mark.slow
def test_the_table_of_the_docs_is_what_these_families_give() -> None:
    done = subprocess.run([sys.executable, ROOT / "docs/sites.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(FAMILIES) >= 45 and len(KINDS) == 10


def test_what_a_model_changes_in_place_later_is_read_as_it_was() -> None:
    """Falcon adds the attention's output into the tensor that its MLP returned."""
    assert examine("Falcon").layers["mlp_out"] == [0, 1, 2]
