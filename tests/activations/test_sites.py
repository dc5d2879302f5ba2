"""Sites: what each name means, that sums and projections hold, and that what is put in a site's place is used."""

from collections.abc import Callable
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor

from unbraid.activations.language_model import LanguageModel, load_language_model
from unbraid.config import ModelConfig
from unbraid.errors import ConfigError, ModelError
from unbraid.sites import KINDS, Site

FAMILIES = ["llama", "gemma2", "gpt2"]
PARALLEL = "gpt_neox"
TOKENS = torch.arange(60).view(3, 20) + 5


def load(family: str, *sites: str) -> LanguageModel:
    return load_language_model(ModelConfig(name=f"random:{family}", sites=list(sites)))


def read(family: str, *sites: str) -> list[Tensor]:
    return [x.double() for x in load(family, *sites).activations(TOKENS)]


def close(x: Tensor, y: Tensor) -> bool:
    return bool((x - y).norm() <= 1e-6 * y.norm())


@pytest.mark.parametrize("text", ["embed", *(f"{kind}.12" for kind in KINDS), "module:a.0.b", "module:a.0.b:input"])
def test_a_site_is_read_from_its_own_name_and_from_its_hooks(text: str) -> None:
    site = Site.parse(text)
    assert str(site) == text and Site.parse(str(site)) == site
    if site.kind != "module":
        assert Site.parse(site.hook) == Site.of_hook(site.hook) == site
    assert not set(site.folder) & set(':/\\*?"<>|')


@pytest.mark.parametrize("text", ["", "resid_post", "resid_post.-1", "nothing.1", "module:", "module:../x", "embed.0"])
def test_what_is_no_site_is_refused_with_the_kinds_there_are(text: str) -> None:
    with pytest.raises(ConfigError, match=r"expected KIND\.LAYER with KIND one of resid_pre, resid_mid, resid_post"):
        Site.parse(text)


def test_transformer_lens_names_the_stream_between_attention_and_mlp_twice() -> None:
    assert Site.parse("blocks.3.hook_mlp_in") == Site.parse("blocks.3.hook_resid_mid") == Site("resid_mid", 3)


@pytest.mark.parametrize("family", [*FAMILIES, PARALLEL])
def test_the_residual_stream_is_the_sum_of_its_parts(family: str) -> None:
    embedded, before, attention, mlp, after = read(
        family, "embed", "resid_pre.0", "attn_out.0", "mlp_out.0", "resid_post.0"
    )
    assert close(before + attention + mlp, after)
    assert family == "gpt2" or torch.equal(embedded, before)  # GPT-2 adds positions
    assert torch.equal(*read(family, "resid_post.0", "resid_pre.1"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stream_between_attention_and_mlp_is_what_the_mlps_norm_reads(family: str) -> None:
    norms = {"llama": "post_attention_layernorm", "gemma2": "pre_feedforward_layernorm", "gpt2": "ln_2"}
    blocks = "transformer.h" if family == "gpt2" else "model.layers"
    before, attention, middle, mlp, after, read_by_norm = read(
        family, "resid_pre.1", "attn_out.1", "resid_mid.1", "mlp_out.1", "resid_post.1",
        f"module:{blocks}.1.{norms[family]}:input",
    )  # fmt: skip
    assert torch.equal(middle, read_by_norm)
    assert close(before + attention, middle) and close(middle + mlp, after)


def test_parallel_attention_has_no_stream_in_between() -> None:
    with pytest.raises(ModelError, match=r"resid_mid\.1.* read the same input.*use resid_post\.1"):
        load(PARALLEL, "resid_mid.1")


@pytest.mark.parametrize("family", ["llama", "gpt2", PARALLEL])
def test_heads_and_neurons_are_what_the_last_linear_layers_read(family: str) -> None:
    model = load(family, "attn_z.1", "attn_out.1", "mlp_act.1", "mlp_out.1")
    block = model.blocks[1]
    attention, mlp = {
        "llama": lambda: (block.self_attn.o_proj, block.mlp.down_proj),
        "gpt2": lambda: (block.attn.c_proj, block.mlp.c_proj),
        "gpt_neox": lambda: (block.attention.dense, block.mlp.dense_4h_to_h),
    }[family]()
    z, attention_out, neurons, mlp_out = model.activations(TOKENS)
    assert model.widths[0] == 64 and model.widths[2] > 64
    assert close(attention(z), attention_out) and close(mlp(neurons), mlp_out)


@pytest.mark.parametrize("family", [*FAMILIES, PARALLEL])
def test_the_norm_without_gain_has_unit_rows_and_gives_what_the_mlp_reads(family: str) -> None:
    model = load(family, "mlp_normed.1", "mlp_in.1")
    gains = [p for name, p in model.blocks[1].named_parameters() if "norm" in name or "ln_" in name]
    with torch.no_grad():
        for gain in gains:
            gain.copy_(torch.linspace(0.5, 2, len(gain)))
    normed, read_by_mlp = load_again(model, "mlp_normed.1", "mlp_in.1").activations(TOKENS)
    assert torch.allclose(normed.square().mean(-1), torch.ones(3, 20), atol=1e-2)
    gain = torch.linspace(0.5, 2, 64) + (family == "gemma2")
    bias = torch.linspace(0.5, 2, 64) if family in ("gpt2", PARALLEL) else 0.0
    assert torch.allclose(normed * gain + bias, read_by_mlp, atol=1e-4)


def load_again(model: LanguageModel, *sites: str) -> LanguageModel:
    return LanguageModel(model.model, model.tokenizer, sites)


@pytest.mark.parametrize("family", [*FAMILIES, PARALLEL])
def test_a_visit_that_gives_back_what_it_got_changes_nothing(family: str) -> None:
    kinds = [kind for kind in KINDS if not (family == PARALLEL and kind == "resid_mid")]
    model = load(family, "resid_post.0")
    expected = model.logits(TOKENS)
    for site in ["embed", *(f"{kind}.1" for kind in kinds)]:
        for same in (lambda x: x, lambda x: None, lambda x: x.clone()):
            with model.visiting({site: same}):
                assert torch.allclose(model.logits(TOKENS), expected, atol=1e-4)


@pytest.mark.parametrize("family", [*FAMILIES, PARALLEL])
def test_what_a_visit_returns_is_what_the_model_goes_on_with(family: str) -> None:
    """Every kind: a change at a site moves what comes after it by the same amount that arithmetic predicts."""
    kinds = [kind for kind in KINDS if not (family == PARALLEL and kind == "resid_mid")]
    model = load(family, *(f"{kind}.1" for kind in kinds))
    plain = dict(zip(kinds, model.activations(TOKENS), strict=True))
    for kind in kinds:
        shift = torch.linspace(-1, 1, plain[kind].shape[-1])
        with model.visiting({f"{kind}.1": lambda x, shift=shift: x + shift}):
            moved = dict(zip(kinds, model.activations(TOKENS), strict=True))
        assert not torch.allclose(moved["resid_post"], plain["resid_post"], atol=1e-3), kind
        if kind in ("attn_out", "mlp_out", "resid_post"):
            stream = {"attn_out": "resid_mid"}.get(kind, "resid_post")
            if stream in plain:
                assert torch.allclose(moved[stream], plain[stream] + shift, atol=1e-5), kind
        if kind == "resid_mid":
            assert torch.allclose(moved["resid_post"] - moved["mlp_out"], plain["resid_mid"] + shift, atol=1e-4)


def test_visits_nest_run_in_the_order_given_and_leave_no_hooks() -> None:
    model = load("llama", "resid_post.0")
    seen: list[str] = []

    def note(name: str) -> Callable[[Tensor], None]:
        return lambda x: seen.append(name)

    with (
        model.visiting({"mlp_out.1": note("late"), "attn_in.0": note("early")}),
        model.visiting({"mlp_out.1": lambda x: 0 * x}),
    ):
        model.logits(TOKENS)
    assert seen == ["early", "late"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.model.modules())


def test_gradients_reach_a_visited_site() -> None:
    model = load("llama", "resid_post.0")
    direction = torch.zeros(64, requires_grad=True)
    with model.visiting({"resid_mid.0": lambda x: x + direction}):
        model.model(input_ids=TOKENS).logits.square().sum().backward()
    assert direction.grad is not None and direction.grad.norm() > 0


def test_a_visit_of_another_shape_is_refused() -> None:
    model = load("llama", "resid_post.0")
    with ExitStack() as stack:
        stack.enter_context(model.visiting({"mlp_act.0": lambda x: x[..., :5]}))
        with pytest.raises(ModelError, match=r"mlp_act\.0 has shape \(3, 20, 5\); expected .* \[3, 20, 128\]"):
            model.logits(TOKENS)


def test_any_module_is_a_site_and_a_wrong_path_names_a_near_one() -> None:
    mlp, entrance, module = read("llama", "mlp_out.0", "mlp_in.0", "module:model.layers.0.mlp")
    assert torch.equal(mlp, module)
    assert torch.equal(entrance, read("llama", "module:model.layers.0.mlp:input")[0])
    with pytest.raises(
        ModelError, match=r"no module 'model.layers.0.mpl'; expected one such as .*model\.layers\.0\.mlp"
    ):
        load("llama", "module:model.layers.0.mpl")
