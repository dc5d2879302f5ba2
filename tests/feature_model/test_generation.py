"""Positions mean the same with and without a cache, alone and in a padded batch; generation follows them."""

import pytest
import torch
from feature_models import PROMPT, random_feature_model

from unbraid.errors import FeatureError
from unbraid.feature_model import Clamp, Steer
from unbraid.feature_model.positions import Span, chosen

SITE = "resid_post.0"
FAMILIES = ["llama", "gemma2", "gpt2", "gpt_neox", "qwen2"]
EDITS = [Steer(f"{SITE}/5", 12.0, unit="code", at=slice(2, None, 2)), Clamp("resid_post.1/9", 8.0)]


@pytest.fixture(params=FAMILIES, scope="module")
def fm(request):
    return random_feature_model(request.param)


def test_generation_is_the_same_with_and_without_a_cache(fm):
    with_cache, without = (
        fm.generate(PROMPT, EDITS, max_new_tokens=8, do_sample=False, use_cache=cache) for cache in (True, False)
    )
    assert torch.equal(with_cache.ids, without.ids) and with_cache.text == without.text
    assert not torch.equal(with_cache.ids, with_cache.plain_ids)


def test_cached_logits_are_those_of_one_pass(fm):
    ids = fm.prompt(PROMPT).tokens_BT
    cut = ids.shape[1] - 4
    with torch.no_grad(), fm.edited(EDITS) as model:
        whole = model(ids).logits
    with torch.no_grad(), fm.edited(EDITS) as model:
        cache = model(ids[:, :cut], use_cache=True).past_key_values
        steps = [model(ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits for at in range(cut, cut + 4)]
    torch.testing.assert_close(torch.cat(steps, 1), whole[:, cut:], atol=1e-4, rtol=1e-4)


def test_a_row_alone_is_the_row_in_a_padded_batch(fm):
    prompts = [PROMPT, "zuka", "mima tuko pali roda zuka kate bola"]
    together = fm.run(prompts, EDITS[1:]).logits
    read = fm.read(prompts)
    for row, prompt in enumerate(prompts):
        alone = fm.run(prompt, EDITS[1:]).logits
        torch.testing.assert_close(together[row, -alone.shape[1] :], alone[0], atol=1e-4, rtol=1e-4)
        codes = fm.read(prompt).codes[SITE].to_dense()[0]
        torch.testing.assert_close(read.codes[SITE].to_dense()[row, -len(codes) :], codes, atol=1e-4, rtol=1e-4)
    batch = fm.generate(prompts, EDITS, max_new_tokens=5, do_sample=False)
    assert batch.text == [fm.generate(one, EDITS, max_new_tokens=5, do_sample=False).text for one in prompts]


def test_sampling_repeats_with_its_seed_and_leaves_the_generator_alone(fm):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one, again, other = (fm.generate(PROMPT, EDITS, max_new_tokens=12, seed=seed, do_sample=True) for seed in (1, 1, 2))
    assert one.text == again.text != other.text and one.plain == again.plain
    assert torch.equal(torch.get_rng_state(), state)
    same = fm.generate(PROMPT, [], max_new_tokens=12, seed=1, do_sample=True)
    assert same.text == same.plain == one.plain


def test_streamed_pieces_are_the_text_and_a_reader_may_leave():
    fm = random_feature_model()
    whole = fm.generate(PROMPT, EDITS, max_new_tokens=12, do_sample=False).text
    assert "".join(fm.generate(PROMPT, EDITS, max_new_tokens=12, do_sample=False, stream=True)) == whole
    left = fm.generate(PROMPT, EDITS, max_new_tokens=400, do_sample=False, stream=True)
    pieces = iter(left)
    next(pieces)
    pieces.close()
    assert True not in left._ids
    assert not fm.blocks[0]._forward_hooks


def test_a_slice_goes_on_into_generated_text_and_a_position_does_not():
    fm = random_feature_model()
    strong = {"by": 60.0, "unit": "code"}
    plain = fm.generate(PROMPT, [], max_new_tokens=6, do_sample=False)
    length = fm.prompt(PROMPT).tokens_BT.shape[1]
    later = fm.generate(
        PROMPT, [Steer(f"{SITE}/5", at=slice(length, None), **strong)], max_new_tokens=6, do_sample=False
    )
    assert later.ids[0, 0] == plain.ids[0, 0] and not torch.equal(later.ids, plain.ids)
    last = fm.run(PROMPT, [Steer(f"{SITE}/5", at=-1, **strong)])
    assert torch.equal(last.logits[:, :-1], last.plain_logits[:, :-1])
    assert not torch.equal(last.logits[:, -1], last.plain_logits[:, -1])


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        ("content", [0, 0, 1, 0, 1, 1]),
        ("last", [0, 0, 0, 0, 1, 0]),
        ("all", [0, 1, 1, 1, 1, 1]),
        (0, [0, 1, 0, 0, 0, 0]),
        (-1, [0, 0, 0, 0, 1, 0]),
        (-2, [0, 0, 0, 1, 0, 0]),
        (slice(2, None), [0, 0, 0, 1, 1, 1]),
        (slice(-2, None), [0, 0, 0, 1, 1, 1]),
        (slice(1, -1), [0, 0, 1, 1, 0, 0]),
        (slice(0, None, 2), [0, 1, 0, 1, 0, 1]),
        ([0, -1], [0, 1, 0, 0, 1, 0]),
        (torch.tensor([True, False, True, False, False]), [0, 0, 1, 0, 0, 0]),
    ],
    ids=str,
)
def test_positions_count_real_tokens_and_from_the_end_of_the_prompt(at, expected):
    """A row with one padding token, four prompt tokens (the third special) and one generated token."""
    special = torch.tensor([[False, False, False, True, False, False]])
    span = Span(torch.tensor([[-1, 0, 1, 2, 3, 4]]), special, torch.tensor([4]))
    assert chosen(at, span)[0].int().tolist() == expected


@pytest.mark.parametrize(
    "option",
    [{"num_beams": 2}, {"num_return_sequences": 2}, {"assistant_model": 1}, {"cache_implementation": "static"}],
)
def test_what_edits_cannot_follow_is_refused_by_name(option):
    with pytest.raises(FeatureError, match=next(iter(option))):
        random_feature_model().generate(PROMPT, [], max_new_tokens=2, **option)


def test_a_compiled_model_is_refused():
    fm = random_feature_model()
    fm.hf_model.compile(backend="eager")
    with pytest.raises(FeatureError, match="compiled"):
        type(fm)(fm.hf_model, fm.tokenizer, {SITE: fm.dictionaries[SITE].sae})


def test_bos_is_never_written_twice():
    fm = random_feature_model()
    bos = fm.tokenizer.bos_token_id
    assert fm.prompt("<bos>kate").tokens_BT.tolist() == fm.prompt("kate").tokens_BT.tolist()
    assert fm.prompt("kate").tokens_BT[0].tolist().count(bos) == 1
    assert bos not in random_feature_model(bos=None).prompt("kate").tokens_BT
    fm.tokenizer.chat_template = "{% for m in messages %}{{ '<bos>' + m['content'] }}{% endfor %}"
    chat = [{"role": "user", "content": "kate"}]
    assert fm.prompt(chat).tokens_BT.tolist() == fm.prompt("kate").tokens_BT.tolist()


def test_positions_come_from_the_mask_or_the_cache_where_none_are_given():
    from unbraid.feature_model.editing import SpanTracker

    fm = random_feature_model()
    ids = torch.tensor([[9, 9, 30, 31], [32, 33, 34, 35]])
    padded = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    one = torch.ones(2, 1, dtype=torch.long)
    for mask, expected, then in (
        (padded, [[-1, -1, 0, 1], [0, 1, 2, 3]], [[2], [4]]),
        (None, [[0, 1, 2, 3], [0, 1, 2, 3]], [[4], [4]]),
    ):
        tracker = SpanTracker(fm.hf_model, fm.special_ids)
        with torch.no_grad(), tracker.following():
            cache = fm.hf_model(ids, attention_mask=mask, use_cache=True).past_key_values
            assert tracker.span.position_BT.tolist() == expected
            longer = None if mask is None else torch.cat([mask, one], 1)
            fm.hf_model(ids[:, :1], attention_mask=longer, past_key_values=cache, use_cache=True)
        assert tracker.span.position_BT.tolist() == then
        assert tracker.span.length_B.tolist() == ([2, 4] if mask is not None else [4, 4])
