"""A short run that the tests of a module share."""

import pytest

import unbraid


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> unbraid.Run:
    whole = unbraid.recipes.tiny()
    training = whole.training.model_copy(update={"tokens": 5120, "held_out_tokens": 512})
    return unbraid.train(whole.model_copy(update={"training": training}), tmp_path_factory.mktemp("runs") / "tiny")
