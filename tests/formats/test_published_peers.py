"""SAELens' own readers of published layouts give the codes and outputs that ours give: `make test-peers`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from published_fixtures import FIXTURES, D, M, N
from safetensors.torch import load_file
from torch import Tensor

from unbraid import formats

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
SMALL = {"d_in": D, "d_sae": N, "dtype": "float32"}
CASES = {
    "gemma_scope": ("gemma_2", "google/gemma-scope-2b-pt-res"),
    "gemma_scope_attention": ("gemma_2", "google/gemma-scope-9b-it-att"),
    "gemma_scope_embedding": ("gemma_2", "google/gemma-scope-2b-pt-res"),
    "gemma_scope_transcoder": ("gemma_2_transcoder", "google/gemma-scope-2b-pt-transcoders"),
    "gemma_scope_2": ("gemma_3", "google/gemma-scope-2-4b-pt"),
    "gemma_scope_2_affine": ("gemma_3", "google/gemma-scope-2-1b-it"),
    "qwen_scope": ("qwen_scope", "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_5"),
    "mwhanna": ("mwhanna_transcoder", "mwhanna/qwen3-4b-transcoders"),
    "llama_scope": ("llama_scope", "fnlp/Llama3_1-8B-Base-LXR-8x"),
    "llama_scope_r1": ("llama_scope_r1_distill", "fnlp/Llama-Scope-R1-Distill"),
    "goodfire": ("goodfire", "Goodfire/Llama-3.1-8B-Instruct-SAE-l19"),
    "deepseek_r1": ("deepseek_r1", "qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19"),
    "connor_rob": ("connor_rob_hook_z", "ckkissane/attn-saes-gpt2-small-all-layers"),
}
"""Fixture -> SAELens' name of the reader, and the repository it thinks it reads."""
ROOTS = {
    "gemma_scope": 3,
    "gemma_scope_attention": 3,
    "gemma_scope_embedding": 2,
    "gemma_scope_transcoder": 3,
    "gemma_scope_2": 2,
    "gemma_scope_2_affine": 2,
    "llama_scope_r1": 2,
}
"""How many folders the path has inside its repository; one for all others."""
SCALES = {"llama_scope": D**0.5 / 3.5, "llama_scope_r1": 1.7}


def their_sae(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from huggingface_hub.errors import LocalEntryNotFoundError
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders as loaders

    loader, repository = CASES[name]
    root = place
    for _ in range(ROOTS.get(name, 1)):
        root = root.parent

    def local(repo_id: str, filename: str, subfolder: str | None = None, **_: Any) -> str:
        path = root / (subfolder or "") / filename
        if not path.is_file():
            raise LocalEntryNotFoundError(filename)
        return str(path)

    def shapes(_: str, filename: str) -> dict[str, list[int]]:
        return {key: list(tensor.shape) for key, tensor in load_file(root / filename).items()}

    monkeypatch.setattr(loaders, "hf_hub_download", local)
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes)
    if name == "mwhanna":
        sizes = f"d_model: {{value: {D}}}\nd_feature: {{value: {N}}}\nbatch_size: {{value: 8}}\n"
        (root / "wandb-config.yaml").write_text(sizes)
        (root / "config.yaml").write_text("model_name: Qwen/Qwen3-4B\n")
    overrides = SMALL | ({"d_out": M} if name == "gemma_scope_2_affine" else {})
    overrides |= {"d_out": D} if "transcoder" in name else {}
    read = loaders.NAMED_PRETRAINED_SAE_LOADERS[loader]
    cfg, state, _ = read(repository, str(place.relative_to(root)), "cpu", False, overrides)
    cfg = loaders.handle_config_defaulting(cfg)
    sae = SAE.from_dict(cfg)
    sae.process_state_dict_for_loading(state)
    sae.load_state_dict(state)
    if name in SCALES:
        sae.fold_activation_norm_scaling_factor(SCALES[name])
    return sae


@pytest.mark.parametrize("name", CASES)
def test_saelens_reads_the_same(name: str, x: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("sae_lens", reason="SAELens, from `make test-peers`")
    made = FIXTURES[name](tmp_path, "float32")
    theirs = their_sae(name, made.place, monkeypatch)
    ours = formats.load(made.place, **made.options)
    heads = x.unflatten(-1, (2, D // 2)) if theirs.cfg.reshape_activations == "hook_z" else x
    with torch.no_grad():
        f, y = theirs.encode(heads), theirs(heads).reshape(*x.shape[:-1], -1)
    f = f.to_dense() if f.is_sparse else f
    f = f / SCALES[name] if name == "llama_scope" else f  # theirs are in the units of training there
    assert torch.equal(ours.encode(x) != 0, f != 0)
    torch.testing.assert_close(ours.encode(x), f, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours(x), y, rtol=1e-4, atol=1e-4 * float(y.abs().max()))
