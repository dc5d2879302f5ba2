"""What is captured is what the model computed: every site of every family, bit for bit, in one shortened pass."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unbraid.activations.language_model import LanguageModel, load_language_model
from unbraid.activations.random_model import FAMILIES
from unbraid.config import ModelConfig
from unbraid.errors import ModelError
from unbraid.sites import Site

SITES = ["resid_post.0", "attn_out.1", "mlp_out.1", "resid_post.1"]
FINAL_NORMS = {"llama": "norm", "gemma2": "norm", "qwen2": "norm", "gpt2": "ln_f", "gpt_neox": "final_layer_norm"}


def load(family: str, *sites: str, batch_contexts: int = 24) -> LanguageModel:
    return load_language_model(
        ModelConfig(name=f"random:{family}", sites=list(sites) or SITES, batch_contexts=batch_contexts)
    )


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def tokens_of(model: LanguageModel, contexts: int = 3, length: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(len(model.tokenizer), (contexts, length), generator=generator)


@pytest.mark.parametrize("contexts", [2, 3])
def test_captured_activations_equal_the_full_models_hidden_states_bit_for_bit(family: str, contexts: int) -> None:
    model = load(family)
    tokens = tokens_of(model, contexts)
    with torch.inference_mode():
        hidden = model.model(tokens, output_hidden_states=True, use_cache=False).hidden_states
        final_norm = getattr(model.model.get_decoder(), FINAL_NORMS[family])
        first, _, _, last = model.activations(tokens)
        assert torch.equal(first, hidden[1])
        assert torch.equal(final_norm(last), hidden[2])
    assert [tuple(x.shape) for x in model.activations(tokens)] == [(contexts, 40, model.d_model)] * 4


def test_attention_and_mlp_outputs_are_what_is_added_to_the_residual_stream(family: str) -> None:
    model = load(family)
    before, attention, mlp, after = (x.double() for x in model.activations(tokens_of(model)))
    assert torch.linalg.vector_norm(before + attention + mlp - after) < 1e-6 * torch.linalg.vector_norm(after)
    assert min(attention.norm(), mlp.norm()) > 0.01 * after.norm()


def test_gemma2_keeps_its_soft_capping_windows_and_sandwich_norms() -> None:
    model = load("gemma2")
    config: Any = model.model.config
    assert config.attn_logit_softcapping and config.final_logit_softcapping
    assert config._attn_implementation == "eager"
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    tokens = tokens_of(model, length=64)
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % len(model.tokenizer)
    assert model.model.config.sliding_window < 40
    first, _, _, _ = (a - b for a, b in zip(model.activations(tokens), model.activations(changed), strict=True))
    assert first[:, : config.sliding_window].any() and not first[:, config.sliding_window :].any()


class Calls:
    """Counts how often a module runs."""

    def __init__(self, module: nn.Module) -> None:
        self.number = 0
        module.register_forward_hook(self)

    def __call__(self, *_: Any) -> None:
        self.number += 1


def test_the_pass_stops_after_the_deepest_site(family: str) -> None:
    model = load(family, "resid_post.0", "attn_out.0")
    later, head = Calls(model.blocks[1]), Calls(model.model.get_output_embeddings())  # pyright: ignore
    later.number = head.number = 0
    model.activations(tokens_of(model))
    assert later.number == head.number == 0
    model.logits(tokens_of(model))
    assert later.number == head.number == 1


def test_hooks_are_gone_after_a_pass() -> None:
    model = load("llama")
    model.activations(tokens_of(model))
    model.logits(tokens_of(model), "resid_post.0", lambda x: x)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.model.modules())


def test_activations_come_in_the_order_the_sites_were_named() -> None:
    forward, backward = load("llama", "attn_out.1", "resid_post.0"), load("llama", "resid_post.0", "attn_out.1")
    tokens = tokens_of(forward)
    for one, other in zip(forward.activations(tokens), reversed(backward.activations(tokens)), strict=True):
        assert torch.equal(one, other)


def test_activations_are_ordinary_tensors_an_sae_can_learn_from() -> None:
    model = load("llama")
    for x in model.activations(tokens_of(model)):
        assert not x.is_inference() and not x.requires_grad
        weight = torch.ones(model.d_model, requires_grad=True)
        (x @ weight).sum().backward()
        assert weight.grad is not None
    assert not any(parameter.requires_grad for parameter in model.model.parameters())
    assert not model.model.training


def test_contexts_beyond_the_pass_size_are_run_in_order() -> None:
    one, many = load("llama", batch_contexts=24), load("llama", batch_contexts=2)
    tokens = tokens_of(one, contexts=5)
    for whole, parts in zip(one.activations(tokens), many.activations(tokens), strict=True):
        assert torch.allclose(whole, parts, atol=1e-5)
    assert torch.allclose(one.logits(tokens), many.logits(tokens), atol=1e-4)


def test_logits_are_the_models_own(family: str) -> None:
    model = load(family)
    tokens = tokens_of(model)
    with torch.inference_mode():
        expected = model.model(tokens, use_cache=False).logits
    assert torch.equal(model.logits(tokens), expected)
    for site in SITES:
        assert torch.equal(model.logits(tokens, site, lambda x: x), expected)
    assert torch.equal(model.logits(tokens, Site("resid_post", 0), lambda x: x + 0), expected)


@pytest.mark.parametrize("site", SITES)
def test_replaced_activations_change_the_logits_from_their_place_on(family: str, site: str) -> None:
    model = load(family)
    tokens = tokens_of(model)
    plain = model.logits(tokens)
    seen: list[Tensor] = []

    def zero_from_position_10(x: Tensor) -> Tensor:
        seen.append(x.clone())
        return torch.cat([x[:, :10], torch.zeros_like(x[:, 10:])], dim=1)

    spliced = model.logits(tokens, site, zero_from_position_10)
    assert torch.equal(seen[0], model.activations(tokens)[SITES.index(site)])
    assert torch.allclose(spliced[:, :10], plain[:, :10], atol=1e-5)
    assert not torch.allclose(spliced[:, 10:], plain[:, 10:], atol=1e-3)


def test_a_layer_beyond_the_model_is_refused_with_the_number_there_is() -> None:
    with pytest.raises(ModelError, match=r"site resid_post\.2 does not exist; expected a layer from 0 to 1"):
        load("llama", "resid_post.2")


def test_a_site_that_never_fires_is_an_error() -> None:
    model = load("llama", "attn_out.1", "resid_post.1")
    model.blocks[1].forward = lambda hidden_states, **_: hidden_states
    with pytest.raises(ModelError, match=r"site attn_out\.1 of random:llama never fired"):
        model.activations(tokens_of(model))
    with pytest.raises(ModelError, match="never fired"):
        model.logits(tokens_of(model), "attn_out.1", lambda x: x)


@pytest.mark.parametrize("wrong", [lambda x: x[0], lambda x: x[:, 1:], lambda x: x[..., :5]])
def test_a_model_that_returns_another_shape_is_an_error(wrong: Any) -> None:
    model = load("llama", "resid_post.0")
    model.blocks[0].forward = lambda hidden_states, **_: wrong(hidden_states)
    with pytest.raises(ModelError, match=r"site resid_post\.0 .* expected activations .* \[3, 40, 64\]"):
        model.activations(tokens_of(model))


def test_a_block_that_returns_no_tensor_is_an_error() -> None:
    model = load("llama", "resid_post.0")
    model.blocks[0].forward = lambda hidden_states, **_: None
    with pytest.raises(ModelError, match=r"site resid_post\.0 gave no tensor; expected activations"):
        model.activations(tokens_of(model))


def test_blocks_may_return_a_tuple_or_a_tensor() -> None:
    model = load("llama", "resid_post.0")
    tokens = tokens_of(model)
    expected = model.activations(tokens)[0]
    inner = model.blocks[0].forward
    model.blocks[0].forward = lambda *args, **kwargs: (inner(*args, **kwargs),)
    assert torch.equal(model.activations(tokens)[0], expected)


def test_a_replacement_of_another_shape_is_an_error() -> None:
    model = load("llama")
    with pytest.raises(ModelError, match=r"has shape \(3, 40\); expected activations"):
        model.logits(tokens_of(model), "resid_post.0", lambda x: x[..., 0])
    with pytest.raises(ModelError, match="expected both or neither"):
        model.logits(tokens_of(model), "resid_post.0")


def test_blocks_whose_parts_do_not_add_up_are_refused() -> None:
    model = load("llama", "resid_post.0")
    inner = model.blocks[1].forward
    model.blocks[1].forward = lambda *args, **kwargs: inner(*args, **kwargs) * 2
    with pytest.raises(ModelError, match=r"do not add up .* use resid_post\.1"):
        LanguageModel(model.model, model.tokenizer, ["mlp_out.1"])


def test_contexts_longer_than_the_model_are_refused() -> None:
    model = load("gpt2", "resid_post.0")
    with pytest.raises(ModelError, match=r"5000 tokens are too long .* at most 4096; lower text\.context_length"):
        model.activations(tokens_of(model, 2, 5000))


@pytest.mark.parametrize("shape", [(0, 8), (8, 0)])
def test_a_pass_over_nothing_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ModelError, match="neither zero"):
        load("llama").activations(torch.zeros(shape, dtype=torch.long))


def run_out_of_memory_above(model: LanguageModel, contexts: int, problem: RuntimeError) -> None:
    inner = model.blocks[0].forward

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(hidden_states) > contexts:
            raise problem
        return inner(hidden_states, *args, **kwargs)

    model.blocks[0].forward = forward


@pytest.mark.parametrize(
    "problem",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_halves_the_pass_says_so_and_loses_nothing(problem: RuntimeError) -> None:
    model = load("llama")
    tokens = tokens_of(model, contexts=11)
    expected, logits = model.activations(tokens), model.logits(tokens)
    run_out_of_memory_above(model, 3, problem)
    with pytest.warns(UserWarning, match="out of memory in a model pass over (11|5) contexts") as caught:
        found = model.activations(tokens)
    assert len(caught) == 2 and model.pass_contexts == 2
    for x, y in zip(found, expected, strict=True):
        assert torch.allclose(x, y, atol=1e-5)
    assert torch.allclose(model.logits(tokens), logits, atol=1e-4)


def test_no_memory_for_a_single_context_is_an_error() -> None:
    model = load("llama")
    run_out_of_memory_above(model, 0, torch.OutOfMemoryError("CUDA out of memory"))
    with (
        pytest.warns(UserWarning, match="going on with 1"),
        pytest.raises(ModelError, match=r"over a single context.*lower text\.context_length"),
    ):
        model.activations(tokens_of(model))


def test_other_errors_of_the_model_are_not_swallowed() -> None:
    model = load("llama")
    run_out_of_memory_above(model, 0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        model.activations(tokens_of(model))
