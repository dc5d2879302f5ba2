"""Where the activations of a published SAE come from, read from what its folder says of itself.

SAELens' folders name a model as TransformerLens does, a hook, and how the model was loaded. Each of these is followed,
or refused by name: an SAE measured on activations it was not made for gives numbers that mean nothing.
"""

import re
from typing import Any

from torch import Tensor, nn

from unbraid.config import BufferConfig, EvaluationConfig, ModelConfig, RunConfig, TextConfig, validated
from unbraid.errors import ConfigError, EvaluationError
from unbraid.sites import AND, Site

LIMIT_OF_OTHERS = 10.0
"""Times the median norm: the rows that dictionary_learning leaves out, for SAEs whose folder says nothing."""
TRANSFORMER_LENS_NAMES = (
    (r"gpt2-small", "openai-community/gpt2"),
    (r"(gpt2(-medium|-large|-xl)?|distilgpt2)", r"openai-community/\1"),
    (r"(gemma(-\d)?-\w+(-it|-pt)?)", r"google/\1"),
    (r"(pythia-.+)", r"EleutherAI/\1"),
    (r"((Meta-)?Llama-.+)", r"meta-llama/\1"),
    (r"(Qwen.+)", r"Qwen/\1"),
    (r"qwen3-([\d.]+)b", r"Qwen/Qwen3-\1B"),
    (r"mistral-7b", "mistralai/Mistral-7B-v0.1"),
)
"""Names that TransformerLens gives to models of the hub, as patterns."""
CHANGE_NOTHING = {
    "fold_ln",
    "center_unembed",
    "device",
    "n_devices",
    "move_to_device",
    "default_padding_side",
    "hf_model",
}
"""Ways of loading a model that leave every site but attn_z as it is."""
CHANGE_HEADS = {"fold_value_biases", "refactor_factored_attn_matrices"}
CENTRED_KINDS = {"resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "embed"}
"""Sites that center_writing_weights changes, in models with LayerNorm."""
DTYPES = ("float32", "bfloat16", "float16")


def origin(metadata: dict[str, Any], config: EvaluationConfig, transcoders: bool = False) -> RunConfig:
    """The settings under which the activations of an SAE can be had again.

    Args:
        metadata: what its folder says, under SAELens' names.
        config: what was said by hand, which goes first.
        transcoders: accept a dictionary that predicts another site than it reads, whose `output_site` says which.

    Raises:
        EvaluationError: naming what is not said, or not possible here.
    """
    name = config.model or metadata.get("model_name")
    if name is None:
        raise EvaluationError("the folder does not say which model the SAE belongs to; give --model")
    written = output_site(metadata)
    if written is not None and not transcoders:
        raise EvaluationError(
            f"the SAE reads {metadata.get('hook_name')} and predicts {metadata['hook_name_out']}: it is a transcoder; "
            "expected an SAE that reconstructs what it reads"
        )
    if written is not None and is_centred(metadata, written):
        raise EvaluationError(
            f"model_from_pretrained_kwargs.center_writing_weights is true for a transcoder that predicts {written}; "
            "expected false, because its output lacks the mean that this model's has"
        )
    site = _site(metadata, config, str(name))
    settings = {"name": hub_name(str(name)), "sites": [str(site)]} | _loading(metadata, site)
    text: dict[str, Any] = config.text.model_dump()
    if metadata.get("context_size") is not None:
        text["context_length"] = metadata["context_size"]
    if metadata.get("prepend_bos") is not None:
        text["bos"] = "context" if metadata["prepend_bos"] else "none"
    rows = {"norm_limit": metadata.get("norm_limit", LIMIT_OF_OTHERS)}
    try:
        return RunConfig(
            buffer=validated(BufferConfig, rows, "the SAE's folder (norm_limit)"),
            model=validated(ModelConfig, settings, "the SAE's folder"),
            text=validated(TextConfig, text, "the SAE's folder (context_size, prepend_bos)"),
        )
    except ConfigError as problem:
        raise EvaluationError(str(problem)) from None


def hub_name(name: str) -> str:
    """A model's name on the hub, from TransformerLens' name; any other name, and one with an owner, is kept."""
    if "/" in name:
        return name
    for pattern, known in TRANSFORMER_LENS_NAMES:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, known, name)
    return name


def is_centred(metadata: dict[str, Any], site: Site) -> bool:
    """Whether the SAE was made for activations without their mean over the width."""
    loading = metadata.get("model_from_pretrained_kwargs") or {}
    return loading.get("center_writing_weights") is True and site.kind in CENTRED_KINDS


def output_site(metadata: dict[str, Any]) -> Site | None:
    """What a transcoder predicts; None for an SAE, which reconstructs what it reads.

    Raises:
        EvaluationError: the hook is no site of unbraid's.
    """
    out = metadata.get("hook_name_out")
    if out is None or out == metadata.get("hook_name"):
        return None
    _require_one(str(out), "predicts")
    try:
        return Site.parse(str(out))
    except ConfigError as problem:
        raise EvaluationError(f"hook_name_out {out!r}: {problem}") from None


def _require_one(hook: str, does: str) -> None:
    if AND in hook:
        raise EvaluationError(
            f"the dictionary {does} several sites, {hook}; expected one site of a folder that has left its run; name "
            "the run, or use unbraid.load in Python"
        )


def _site(metadata: dict[str, Any], config: EvaluationConfig, model: str) -> Site:
    hook = config.site or metadata.get("hook_name")
    if hook is None:
        said = metadata.get("submodule_name")
        raise EvaluationError(
            "the folder does not say which site the SAE reads"
            + (f" in words unbraid knows (submodule_name {said!r})" if said else "")
            + "; give --site"
        )
    if hook == "hook_embed" and "gemma" in model:
        return Site("resid_pre", 0)  # Gemma multiplies embeddings after looking them up; the hook stands behind that
    _require_one(str(hook), "reads")
    try:
        return Site.parse(str(hook))
    except ConfigError as problem:
        raise EvaluationError(f"hook_name {hook!r}: {problem}; or give --site") from None


def _loading(metadata: dict[str, Any], site: Site) -> dict[str, Any]:
    """Settings of the model, from how TransformerLens was told to load it."""
    settings: dict[str, Any] = {}
    for name, value in (metadata.get("model_from_pretrained_kwargs") or {}).items():
        if value is None or value is False or name in CHANGE_NOTHING:
            continue
        dtype = str(value).removeprefix("torch.")
        if name == "dtype" and dtype in DTYPES:
            settings["dtype"] = dtype
        elif name == "revision" and isinstance(value, str):
            settings["revision"] = value
        elif name == "center_writing_weights" and value is True and site.kind != "module":
            continue  # `centre_where_needed` follows it once the model is known
        elif name in CHANGE_HEADS and value is True and site.kind != "attn_z":
            continue
        else:
            raise EvaluationError(
                f"model_from_pretrained_kwargs.{name} is {value!r}, which changes the model in a way unbraid does not "
                "follow; expected one of center_writing_weights, dtype, revision, or what changes no activation"
            )
    return settings


class CentredInput:
    """An SAE made for activations without their mean over the width, as it acts on activations that have it.

    A model with LayerNorm cannot see that mean, so TransformerLens can take it out of every weight that writes to the
    residual stream (`center_writing_weights`). The mean is taken off before encoding and put back after decoding.
    """

    def __init__(self, sae: Any):
        self.sae = sae
        self._mean: Tensor | None = None

    def encode(self, x: Tensor) -> Tensor:
        """Codes of raw activations."""
        self._mean = x.mean(-1, keepdim=True)
        return self.sae.encode(x - self._mean)

    def decode(self, f: Tensor) -> Tensor:
        """Reconstruction of the rows encoded last.

        Raises:
            EvaluationError: the codes are not those of the rows encoded last.
        """
        if self._mean is None or self._mean.shape[:-1] != f.shape[:-1]:
            raise EvaluationError("codes of other rows than those encoded last have no mean; encode the rows first")
        return self.sae.decode(f) + self._mean

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sae, name)


def has_layer_norm(model: nn.Module) -> bool:
    """Whether the model's norms take out the mean, so that it cannot see it in the residual stream."""
    return any(isinstance(module, nn.LayerNorm) for module in model.modules())
