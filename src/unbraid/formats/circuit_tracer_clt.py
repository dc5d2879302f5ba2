"""circuit-tracer's cross-layer transcoders: `W_enc_I.safetensors` and `W_dec_I.safetensors` for each layer of a model.

`W_enc_I[n,D] b_enc_I b_dec_I` and perhaps `threshold_I[n]` (else ReLU) of layer I, and `W_dec_I[n,L-I,D]`, what its
features write into layers I to L-1. `config.yaml` in the folder names both hooks and the model.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from unbraid.errors import FormatError
from unbraid.formats.folder import SAEFolder
from unbraid.formats.metadata import checked_metadata
from unbraid.formats.published import NOTHING, Known
from unbraid.formats.reading import read_tensors, read_yaml, text
from unbraid.formats.several_sites import SeveralSitesDictionary, numbered_files, require_several_sites, stacked
from unbraid.formats.weights import require

FILE = re.compile(r"W_enc_(\d{1,3})\.safetensors")


def recognises(folder: Path) -> bool:
    """Whether `folder` looks like this layout."""
    return (folder / "W_enc_0.safetensors").is_file()


def load(folder: Path, known: Known = NOTHING) -> SAEFolder:
    """Read all layers of a folder.

    Raises:
        FormatError: a dictionary of one site is wanted, or a file is missing, damaged or of another shape than others.
    """
    where = str(folder)
    require_several_sites(known, where, "a cross-layer transcoder of circuit-tracer")
    layers = range(len(numbered_files(folder, FILE)))
    tensors = stacked([_part(folder, layer, len(layers)) for layer in layers], where)
    sae = SeveralSitesDictionary("cross_layer_transcoder", tensors)
    config = read_yaml(folder / "config.yaml") if (folder / "config.yaml").is_file() else {}
    hooks = [text(config, f"feature_{end}_hook", where) for end in ("input", "output")]
    reads, writes = hooks[0] or "hook_resid_mid", (hooks[1] or "hook_mlp_out").replace("mlp.hook_out", "hook_mlp_out")
    metadata = {"model_name": text(config, "model_name", where)}
    metadata |= {"hook_names": [f"blocks.{layer}.{reads}" for layer in layers]}
    metadata |= {"hook_names_out": [f"blocks.{layer}.{writes}" for layer in layers]}
    metadata = checked_metadata(metadata | known.metadata, where)
    return SAEFolder(sae.eval().requires_grad_(False), "circuit_tracer_clt", metadata)


def _part(folder: Path, layer: int, layers: int) -> dict[str, Tensor]:
    """One layer, its decoder with zeros where it does not write."""
    where, decoder = str(folder / f"W_enc_{layer}.safetensors"), folder / f"W_dec_{layer}.safetensors"
    state, written = read_tensors(Path(where)), read_tensors(decoder)
    jumps = [f"threshold_{layer}"] if f"threshold_{layer}" in state else []
    require(state, (*(f"{name}_{layer}" for name in ("W_enc", "b_enc", "b_dec")), *jumps), where)
    require(written, (f"W_dec_{layer}",), str(decoder))
    part = {name.removesuffix(f"_{layer}"): tensor for name, tensor in state.items()}
    n, d_in = part["W_enc"].shape if part["W_enc"].ndim == 2 else (0, 0)
    W_dec = written[f"W_dec_{layer}"]
    wanted = {
        "W_enc": (n, d_in),
        "b_enc": (n,),
        "threshold": (n,),
        "b_dec": (d_in,),
        "W_dec": (n, layers - layer, d_in),
    }
    for name, tensor in (part | {"W_dec": W_dec}).items():
        if tuple(tensor.shape) != wanted[name] or not n:
            shape = wanted[name] if n else "[features, D]"
            raise FormatError(
                f"{where}: {name}_{layer} is {tuple(tensor.shape)}; expected {shape} for {layers} layers; download the "
                "files again"
            )
    threshold = part.get("threshold", torch.zeros(n)).clamp_min(0.0)
    earlier = W_dec.new_zeros(n, layer, d_in)
    return part | {"W_enc": part["W_enc"].T, "threshold": threshold, "W_dec": torch.cat([earlier, W_dec], dim=1)}
