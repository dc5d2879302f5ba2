"""Which module of a transformer speaks for a site, whatever the family calls it.

`resid_post` is a block's output. `attn_out` and `mlp_out` are what is added to the residual stream, so families that
normalise a sublayer's output before adding it (Gemma 2 and 3, OLMo 2, GLM 4) are read after that norm; Llama's
`post_attention_layernorm` has the same name but stands before the MLP. Names alone can mislead, so a loaded model also
proves on a few tokens that what was found adds up.
"""

from torch import Tensor, nn

from unbraid.config import Site
from unbraid.errors import ModelError

ATTENTION_NAMES = ("self_attn", "self_attention", "attention", "attn")
MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "fc2")


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The transformer blocks of a causal language model.

    Raises:
        ModelError: no list of modules is as long as the model's configuration says.
    """
    n_layers = model.config.get_text_config().num_hidden_layers  # pyright: ignore
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers and _looks_like_a_block(module[0]):
            return module
    raise ModelError(
        f"{type(model).__name__} has no list of {n_layers} transformer blocks; expected an AutoModelForCausalLM with "
        f"blocks that hold attention ({', '.join(ATTENTION_NAMES)}) or an MLP ({', '.join(MLP_NAMES)}); "
        "choose another model.name"
    )


def site_module(blocks: nn.ModuleList, site: Site) -> nn.Module:
    """The module whose output is the site's activations.

    Raises:
        ModelError: the model has no such layer, or the layer no such sublayer.
    """
    if site.layer >= len(blocks):
        raise ModelError(
            f"site {site} does not exist; expected a layer from 0 to {len(blocks) - 1}, the model has {len(blocks)}; "
            "change model.sites"
        )
    block = blocks[site.layer]
    if site.kind == "resid_post":
        return block
    if site.kind == "attn_out":
        sandwich = ("post_attention_layernorm",) if hasattr(block, "post_feedforward_layernorm") else ()
        names = ("post_self_attn_layernorm", *sandwich, *ATTENTION_NAMES)
    else:
        names = ("post_mlp_layernorm", "post_feedforward_layernorm", *MLP_NAMES)
    for name in names:
        if isinstance(found := getattr(block, name, None), nn.Module):
            return found
    raise ModelError(
        f"site {site}: a {type(block).__name__} has none of {', '.join(names)}; expected one of them; "
        f"use resid_post.{site.layer}"
    )


def first_tensor(output: object) -> Tensor | None:
    """A module's activations, whether it returns a tensor or a tuple that begins with one."""
    if isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def _looks_like_a_block(module: nn.Module) -> bool:
    return any(hasattr(module, name) for name in (*ATTENTION_NAMES, *MLP_NAMES))
