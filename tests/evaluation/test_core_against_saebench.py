"""Core keys equal what SAEBench 0.6.0 itself computed on the same tensors (fixtures/make_saebench_fixtures.py)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unbraid.evaluation.controls import LinearSAE
from unbraid.evaluation.core import core_metrics
from unbraid.evaluation.splice import preservation

FIXTURES = Path(__file__).parent / "fixtures"
TENSORS = load_file(FIXTURES / "saebench_core.safetensors")
BENCH = json.loads((FIXTURES / "saebench_core.json").read_text())
RENAMED = {"explained_variance": "saebench_explained_variance", "mse": "saebench_mse"}


class JumpReLU(LinearSAE):
    """SAEBench's form: the bias b_dec is not taken off before the encoder."""

    def encode(self, x):
        pre = x @ self.W_enc + self.b_enc
        return pre.relu() * (pre > TENSORS["jumprelu.threshold"])


def sae_named(name: str) -> LinearSAE:
    weights = [TENSORS[f"{name}.{part}"] for part in ("W_enc", "b_enc", "W_dec", "b_dec")]
    if name == "jumprelu":
        return JumpReLU(*weights)
    return LinearSAE(*weights, k=BENCH["k"] if name == "topk" else None)


def keep(tokens):
    return ~torch.isin(tokens, torch.tensor(BENCH["special"]))


class TailOnly:
    """The model after the site, which is all a splice at the end of the stream can change."""

    def logits(self, tokens, site=None, replace=None):
        rows = [int((TENSORS["tokens"] == context).all(1).nonzero()) for context in tokens]
        x = TENSORS["x"][rows]
        return (x if replace is None else replace(x)) @ TENSORS["W_U"] + TENSORS["b_U"]


@pytest.mark.parametrize("name", BENCH["results"])
def test_core_keys_equal_saebench(name):
    sae, expected = sae_named(name), BENCH["results"][name]["metrics"]
    core = core_metrics(sae, [(TENSORS["x"], keep(TENSORS["tokens"]))], group_contexts=BENCH["batch_contexts"])
    contexts = ((tokens, keep(tokens)) for tokens in TENSORS["tokens"].split(5))
    spliced = preservation(TailOnly(), {None: {"sae": sae}}, contexts)["sae"]
    assert set(expected) <= set(core.categories) | set(spliced)
    for category, metrics in expected.items():
        ours = {**core.categories.get(category, {}), **spliced.get(category, {})}
        for key, value in metrics.items():
            assert ours[RENAMED.get(key, key)] == pytest.approx(value, rel=1e-5), f"{category}.{key}"


@pytest.mark.parametrize("name", BENCH["results"])
def test_numbers_by_feature_equal_saebench(name):
    expected = BENCH["results"][name]["features"]
    core = core_metrics(sae_named(name), [(TENSORS["x"], keep(TENSORS["tokens"]))], group_contexts=4)
    assert set(core.features) == set(expected)
    for key, values in expected.items():
        values = torch.tensor([float("nan") if v is None else v for v in values])
        torch.testing.assert_close(
            core.features[key].float(),
            values,
            rtol=1e-5,
            atol=1e-6,
            equal_nan=True,
            msg=lambda m, key=key: f"{key}: {m}",
        )
    details = core.details()
    assert details[7]["index"] == 7 and details[0]["consistent_activation_heuristic"] is None
