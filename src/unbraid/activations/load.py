"""From a model's name to its weights and tokenizer, whatever kind of place the name points to.

transformers is imported on first use only: importing it costs seconds and most of unbraid does not need it.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from unbraid.activations.packaged_model import packaged_model_folder
from unbraid.activations.random_model import FAMILIES, random_model
from unbraid.config import ModelConfig
from unbraid.errors import ModelError


def load_model_and_tokenizer(config: ModelConfig, seed: int = 0) -> tuple[nn.Module, Any]:
    """The transformers model, in `config.dtype` on the CPU, and its tokenizer.

    Raises:
        ModelError: the model is not installed, not found or not readable.
    """
    kind, _, rest = config.name.partition(":")
    anywhere_but_the_hub = kind in ("random", "packaged") or Path(config.name).expanduser().exists()
    with quiet_transformers(bars=not anywhere_but_the_hub):
        if kind == "random":
            if rest not in FAMILIES:
                raise ModelError(
                    f"model.name = {config.name!r}: no such family; expected random: and one of {', '.join(FAMILIES)}"
                )
            return random_model(rest, config.dtype, seed)
        if kind == "packaged":
            return _pretrained(config, str(packaged_model_folder(rest)))
        if config.name.endswith(".gguf"):
            return _gguf(config, Path(config.name).expanduser())
        local = Path(config.name).expanduser()
        return _pretrained(config, str(local) if local.is_dir() else config.name)


def _pretrained(config: ModelConfig, name: str) -> tuple[nn.Module, Any]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        text_config = AutoConfig.from_pretrained(name, **options).get_text_config()
        if getattr(text_config, "attn_logit_softcapping", None):
            options["attn_implementation"] = "eager"  # the fused kernels of some versions leave the soft-cap out
        model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, config.dtype), **options)
    except Exception as problem:  # transformers, safetensors and hub clients raise too many kinds to list
        raise ModelError(
            f"cannot load model.name = {config.name!r} (revision {config.revision or 'default'}): "
            f"{_first_line(problem)}; expected packaged:smollm2, random:FAMILY, a .gguf file, a local folder, or a hub "
            "id that this machine can reach and is allowed to read; change model.name, or log in to the hub"
        ) from problem
    return model, tokenizer


def _gguf(config: ModelConfig, path: Path) -> tuple[nn.Module, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not path.is_file():
        raise ModelError(f"model.name = {config.name!r}: no such file; expected a .gguf file; change model.name")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, dtype=getattr(torch, config.dtype)
        )
    except Exception as problem:  # transformers, safetensors and hub clients raise too many kinds to list
        raise ModelError(
            f"cannot read {config.name!r}: {_first_line(problem)}; expected a GGUF file of an architecture that "
            "transformers knows; reading one needs: pip install gguf accelerate"
        ) from problem
    return model, tokenizer


def _first_line(problem: Exception) -> str:
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]


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
