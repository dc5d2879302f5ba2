"""From a model's name to its weights and tokenizer, whatever kind of place the name points to.

transformers is imported on first use only: importing it costs seconds and most of unbraid does not need it.
"""

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from unbraid.activations.packaged_model import MODELS, packaged_model_folder
from unbraid.activations.random_model import FAMILIES, random_model
from unbraid.config import ModelConfig
from unbraid.errors import ModelError
from unbraid.offline import is_hub_id, why_unreachable
from unbraid.sites import HANDED_IN

PACKAGED = ", ".join(f"packaged:{name}" for name in MODELS)


def load_model_and_tokenizer(config: ModelConfig, seed: int = 0) -> tuple[nn.Module, Any]:
    """The transformers model, in `config.dtype`, and its tokenizer; on the CPU but where it is quantised or spread.

    Raises:
        ModelError: the model is not installed, not found or not readable.
    """
    if config.name == HANDED_IN:
        raise ModelError(
            "model.name is handed_in, which stands for a model given in Python, and there is none; expected the same "
            "model again, as in unbraid.resume(run, model=..., tokenizer=...), or its name, as in `unbraid eval RUN "
            "--model NAME`; in Python also unbraid.FeatureModel(model, tokenizer, {site: sae})"
        )
    kind, _, rest = config.name.partition(":")
    anywhere_but_the_hub = kind in ("random", "packaged") or Path(config.name).expanduser().exists()
    with quiet_transformers(bars=not anywhere_but_the_hub):
        if kind == "random":
            if rest not in FAMILIES:
                raise ModelError(
                    f"model.name = {config.name!r}: no such family; expected random: and one of {', '.join(FAMILIES)}"
                )
            return random_model(rest, "float32" if config.dtype == "stored" else config.dtype, seed)
        if kind == "packaged":
            return _packaged(config, packaged_model_folder(rest))
        if config.name.endswith(".gguf"):
            return _gguf(config, Path(config.name).expanduser())
        local = Path(config.name).expanduser()
        if local.is_dir():
            return _pretrained(config, str(local))
        return _pretrained(config, config.name, on_hub=is_hub_id(config.name))


def _packaged(config: ModelConfig, folder: Path) -> tuple[nn.Module, Any]:
    try:
        return _pretrained(config, str(folder))
    except ModelError as problem:
        raise ModelError(f"{problem}. If {str(folder)!r} is damaged, delete it: it is made again") from problem


def _pretrained(config: ModelConfig, name: str, on_hub: bool = False) -> tuple[nn.Module, Any]:
    from transformers import AutoConfig

    placing = _placing(config)
    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    unreachable = why_unreachable() if on_hub else None
    if unreachable is not None:
        options["local_files_only"] = True  # what was downloaded before still loads, without minutes of trying again
    try:
        settings = AutoConfig.from_pretrained(name, **options)
        model_class = _model_class(config, settings)
        tokenizer = _tokenizer(config, name, options)
        if getattr(settings.get_text_config(), "attn_logit_softcapping", None):
            options["attn_implementation"] = "eager"  # the fused kernels of some versions leave the soft-cap out
        model = model_class.from_pretrained(name, dtype=_dtype(config), **options, **placing)
    except ModelError:
        raise
    except Exception as problem:  # transformers, safetensors and hub clients raise too many kinds to list
        reason = _reason(problem)
        if unreachable is not None:
            reason = f"the hub cannot be reached ({unreachable}) and the model was not downloaded before"
        raise ModelError(
            f"cannot load model.name = {config.name!r} (revision {config.revision or 'default'!r}): {reason}; expected "
            f"{PACKAGED}, random:FAMILY, a .gguf file, a local folder, or a hub id that this machine can reach and is "
            "allowed to read; change model.name, or log in to the hub"
        ) from problem
    return model, tokenizer


def _dtype(config: ModelConfig) -> Any:
    """What transformers takes as a dtype."""
    import torch

    return "auto" if config.dtype == "stored" else getattr(torch, config.dtype)


def _placing(config: ModelConfig) -> dict[str, Any]:
    """Options that quantise a model and spread it over devices.

    Raises:
        ModelError: a package for it is not installed.
    """
    options: dict[str, Any] = {}
    if config.quantisation != "none":
        _require(config, "quantisation", "bitsandbytes", "accelerate")
        from transformers import BitsAndBytesConfig

        four: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        bits: dict[str, Any] = {"load_in_8bit": True} if config.quantisation == "8bit" else four
        options["quantization_config"] = BitsAndBytesConfig(**bits)
    if config.device_map is not None:
        _require(config, "device_map", "accelerate")
        options["device_map"] = config.device_map
    return options


def _require(config: ModelConfig, setting: str, *packages: str) -> None:
    missing = [package for package in packages if not _is_installed(package)]
    if missing:
        raise ModelError(
            f"model.{setting} = {getattr(config, setting)!r} needs {' and '.join(missing)}, not installed here; run "
            f"`pip install {' '.join(missing)}`, or drop the setting"
        )


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def is_placed(model: nn.Module) -> bool:
    """Whether loading chose the model's devices, so that it must not be moved: it is quantised or spread."""
    return any(getattr(model, name, None) is not None for name in ("hf_quantizer", "hf_device_map"))


def _model_class(config: ModelConfig, settings: Any) -> Any:
    """The auto class that reads a model with these settings as a language model."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMaskedLM

    def reads(auto_class: Any) -> bool:
        remote = getattr(settings, "auto_map", {}) if config.trust_remote_code else {}
        return type(settings) in auto_class._model_mapping or auto_class.__name__ in remote

    if config.bidirectional:
        classes = [AutoModelForMaskedLM, AutoModelForCausalLM]
        return next((auto_class for auto_class in classes if reads(auto_class)), AutoModel)
    for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if reads(auto_class) and not (auto_class is AutoModelForImageTextToText and settings.is_encoder_decoder):
            return auto_class
    kind = type(settings).__name__.removesuffix("Config")
    if settings.is_encoder_decoder:
        raise ModelError(
            f"model.name = {config.name!r} is an encoder-decoder model ({kind}); expected a decoder such as Llama, "
            "which predicts the next token; change model.name"
        )
    if reads(AutoModelForMaskedLM):
        raise ModelError(
            f"model.name = {config.name!r} is an encoder ({kind}), in which tokens see later tokens; expected a causal "
            "language model; set model.bidirectional to true to use it as it is, or change model.name"
        )
    return AutoModelForCausalLM


def _tokenizer(config: ModelConfig, name: str, options: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, **options)
    except Exception as problem:  # as above
        raise ModelError(
            f"model.name = {config.name!r} comes without a tokenizer that can be read ({_reason(problem)}); expected "
            "tokenizer.json, or a tokenizer's other files, beside the weights; put it there with "
            "tokenizer.save_pretrained, or change model.name"
        ) from problem


def _gguf(config: ModelConfig, path: Path) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given = {"quantisation": config.quantisation != "none", "device_map": config.device_map is not None}
    for setting in (name for name, asked in given.items() if asked):
        raise ModelError(
            f"model.{setting} = {getattr(config, setting)!r} is not read for {config.name!r}: transformers widens a "
            "GGUF file's weights and puts them on one device; drop the setting, or name the original model"
        )
    if not path.is_file():
        raise ModelError(f"model.name = {config.name!r}: no such file; expected a .gguf file; change model.name")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=_dtype(config))
    except Exception as problem:  # transformers, safetensors and hub clients raise too many kinds to list
        raise ModelError(
            f"cannot read {config.name!r}: {_reason(problem)}; expected a GGUF file of an architecture that "
            "transformers knows; reading one needs: pip install gguf accelerate"
        ) from problem
    return model, tokenizer


def _reason(problem: Exception) -> str:
    """What went wrong, on one line that is not cut in the middle of a word."""
    words = " ".join(str(problem).split()) or type(problem).__name__
    return words if len(words) <= 300 else f"{words[:300].rpartition(' ')[0]} ..."


@contextmanager
def quiet_transformers(bars: bool) -> Iterator[None]:
    """No chatter below errors from transformers while the block runs, and progress bars only if `bars` (downloads)."""
    from transformers.utils import logging as chatter

    level, hidden = chatter.get_verbosity(), not bars and chatter.is_progress_bar_enabled()
    chatter.set_verbosity(logging.ERROR)
    if hidden:
        chatter.disable_progress_bar()
    try:
        yield
    finally:
        chatter.set_verbosity(level)
        if hidden:
            chatter.enable_progress_bar()
