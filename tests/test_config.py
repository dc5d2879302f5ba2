"""Settings resolve to what a run trains: variants, and who is whose twin."""

from unbraid.config import RunConfig


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
