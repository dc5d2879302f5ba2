"""Settings resolve to what a run trains: variants, and who is whose twin."""

import pytest

from unbraid.config import RunConfig
from unbraid.errors import ConfigError


def test_a_twin_differs_in_nothing_but_lambda2():
    config = RunConfig(
        variants={
            "on": {},
            "other": {"sae.lambda1": 0.3, "decorrelation.lambda2": 0},
            "off": {"decorrelation.lambda2": 0},
        }
    )
    assert config.twins == {"resid_post.6_on": "resid_post.6_off"}
    assert RunConfig().twins == {}


def test_a_frozen_decoder_is_not_asked_to_move():
    frozen = {"sae.frozen": "decoder", "decorrelation.space": "decoder"}
    with pytest.raises(ConfigError, match="keeps every decoder row"):
        RunConfig(variants={"a": frozen})
    assert RunConfig(variants={"a": frozen | {"decorrelation.lambda2": 0}, "b": frozen | {"sae.frozen": "near"}})
