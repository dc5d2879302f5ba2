"""circuit-tracer's cross-layer transcoders: `W_enc_I.safetensors` and `W_dec_I.safetensors` for each layer of a model.

`W_enc_I[n,D] b_enc_I b_dec_I` and perhaps `threshold_I[n]` (else ReLU) of layer I, and `W_dec_I[n,L-I,D]`, what its
features write into layers I to L-1. `config.yaml` in the folder names both hooks and the model. A dictionary that was
trained with `sae.cross_layer` is written so.
"""

import re
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from unbraid.distributed.shard import Shard
from unbraid.errors import FormatError
from unbraid.formats.folder import SAEFolder, check_sae_folder, write_tensors, written_whole
from unbraid.formats.metadata import checked_metadata
from unbraid.formats.published import NOTHING, Known
from unbraid.formats.reading import read_tensors, read_yaml, text
from unbraid.formats.several_sites import SeveralSitesDictionary, numbered_files, require_several_sites, stacked
from unbraid.formats.transcoder_set import require_holdable
from unbraid.formats.weights import require
from unbraid.sae.cross_layer import CrossLayer
from unbraid.sites import AND

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


def save_one(one: SAEFolder, name: str, folder: Path, *, overwrite: bool = False) -> Path:
    """Write a cross-layer transcoder of the layers from 0 as the folder that circuit-tracer reads; returns it.

    Args:
        one: trained with `sae.cross_layer`, with its model and hooks as metadata.
        name: of it, for messages.
        folder: made, or replaced as a whole where it holds an SAE that unbraid wrote.
        overwrite: allow that.

    Raises:
        FormatError: it is no such dictionary, or the folder cannot be written; nothing is written then.
    """
    sae = require_holdable(name, one.sae)
    reads, writes = (_hooks_of_layers(name, one.metadata, key) for key in ("hook_name", "hook_name_out"))
    layers = len(reads)
    width, rest = divmod(sae.d_in, layers)
    uneven = rest or sae.n_features % layers or len(writes) != layers
    of_layers = None if uneven else CrossLayer((width,) * layers, (width,) * layers, Shard(sae.n_features))
    if of_layers is None or sae.W_skip is not None or not of_layers.holds(sae.encoder_ND, sae.W_dec, None):
        raise FormatError(
            f"{name} reads {layers} sites and predicts {len(writes)}, with {sae.n_features} features; expected as many "
            "features for each of these layers, which write into their own output and later ones, and no skip "
            "connection; train with sae.cross_layer, or export to sae_lens"
        )
    if not one.metadata.get("model_name"):
        raise FormatError(f"{name}: its model is not known; expected a model_name; put it into its metadata")
    check_sae_folder(folder, overwrite)
    config = {"model_name": one.metadata["model_name"], "model_kind": "cross_layer_transcoder"}
    config |= {"feature_input_hook": reads[0], "feature_output_hook": writes[0]}
    b_dec_LD = sae.b_dec.view(layers, width)
    with written_whole(folder) as unfinished:
        for layer, (features, columns, _) in enumerate(of_layers.blocks()):
            encoder = {
                "W_enc": sae.encoder_ND[features, columns],
                "b_enc": sae.b_enc[features],
                "b_dec": b_dec_LD[layer],
            }
            if sae.form.activation == "jumprelu":
                encoder["threshold"] = sae.threshold[features]
            W_dec = sae.W_dec[features].view(-1, layers, width)[:, layer:]
            _write(unfinished / f"W_enc_{layer}.safetensors", layer, encoder)
            _write(unfinished / f"W_dec_{layer}.safetensors", layer, {"W_dec": W_dec})
        (unfinished / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return folder


def _write(path: Path, layer: int, tensors: dict[str, Tensor]) -> None:
    write_tensors(path, {f"{name}_{layer}": tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def _hooks_of_layers(name: str, metadata: dict[str, Any], key: str) -> list[str]:
    """What is read or written in every layer, without the layer.

    Raises:
        FormatError: it is not the same in each, or the layers are not those from 0.
    """
    found = [re.fullmatch(r"blocks\.(\d{1,4})\.(.+)", hook) for hook in str(metadata.get(key)).split(AND)]
    hooks = [match[2] for match in found if match is not None]
    if [match and int(match[1]) for match in found] != list(range(len(found))) or len(set(hooks)) > 1:
        raise FormatError(
            f"{name}: {key} is {metadata.get(key)!r}; expected the same hook of every layer from 0, in order, which "
            "circuit-tracer asks for; export to sae_lens"
        )
    return hooks


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
