"""Crosscoders of dictionary_learning's fork give the codes and outputs that its code computes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import unbraid
from unbraid.errors import FormatError
from unbraid.formats import save
from unbraid.formats.export import export
from unbraid.sae import SAE
from unbraid.sae.crosscoder import exclusive_features, relative_norms

L, D, N = 3, 6, 20


def made(how: int | None = 1, threshold: float | None = 1.0, normalised: str = "by site", seed: int = 0) -> dict:
    """A state dict as that library stores it."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"encoder.weight": (L, D, N), "encoder.bias": (N,), "decoder.weight": (L, N, D), "decoder.bias": (L, D)}
    state = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    if how is not None:
        state["code_normalization_id"] = torch.tensor(how)
    if threshold is not None:
        state |= {"k": torch.tensor(4, dtype=torch.int), "threshold": torch.tensor(threshold)}
    mean, std = torch.randn(L, D, generator=draw), torch.rand(L, D, generator=draw) + 0.5
    scale = 0.8 / (std.square().sum(1) + 1e-8).sqrt() if normalised == "by site" else torch.ones(L)
    if normalised == "off":
        mean, std = torch.full((L, D), torch.nan), torch.full((L, D), torch.nan)
    names = ("target_rms", "activation_mean", "activation_std", "activation_global_scale")
    return state | dict(zip(names, (torch.tensor(0.8), mean, std, scale), strict=True))


def computed(state: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and outputs of activations [B, L, D], as the library writes them, in float64."""
    s = {name: tensor.double() for name, tensor in state.items()}
    mean, std, scale = (s[f"activation_{name}"] for name in ("mean", "std", "global_scale"))
    on, by_site = not mean.isnan().any(), bool((scale != 1).any())
    if on:
        x = (x - mean) * scale[:, None] if by_site else (x - mean) / (std + 1e-8)
    f = (torch.einsum("bld,ldf->blf", x, s["encoder.weight"]).sum(1) + s["encoder.bias"]).relu()
    W = s["decoder.weight"]
    if "threshold" in s:
        how = int(s.get("code_normalization_id", torch.tensor(1)))
        size = {1: W.norm(dim=2).sum(0), 2: W.norm(dim=(0, 2)), 4: torch.tensor(1.0)}[how]
        f = f * (f * size > s["threshold"])
    y = torch.einsum("bf,lfd->bld", f, W) + s["decoder.bias"]
    if on:
        y = (y / (scale[:, None] + 1e-8) if by_site else y * (std + 1e-8)) + mean
    return f, y


@pytest.mark.parametrize("file", ["model_final.pt", "model.safetensors"])
@pytest.mark.parametrize("normalised", ["by site", "by column", "off"])
@pytest.mark.parametrize(("how", "threshold"), [(1, 1.0), (2, 1.0), (4, 1.0), (1, None), (1, -1.0)])
def test_codes_and_outputs_are_those_of_the_library(how, threshold, normalised, file, tmp_path: Path):
    state = made(how, threshold, normalised)
    if file == "model.safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / file)
    else:
        torch.save({f"_orig_mod.{name}": tensor for name, tensor in state.items()}, tmp_path / file)
    crosscoder = unbraid.load(tmp_path)
    x = torch.randn(200, L, D, generator=torch.Generator().manual_seed(1)) * 1.5
    f, y = computed(state, x.double())
    found = crosscoder.encode(x.flatten(1))
    assert torch.equal(found != 0, f != 0) and 0.02 < (f != 0).double().mean() < 0.98
    torch.testing.assert_close(found.double(), f, rtol=1e-4, atol=1e-4)
    parts = crosscoder.by_site(crosscoder(x.flatten(1)))
    torch.testing.assert_close(torch.stack(parts, 1).double(), y, rtol=1e-4, atol=1e-4 * float(y.abs().max()))
    again = unbraid.load(save(crosscoder, tmp_path / "again", metadata=crosscoder.metadata))
    torch.testing.assert_close(again(x.flatten(1)), crosscoder(x.flatten(1)))
    assert relative_norms(again).shape == (N, L) and len(exclusive_features(again)) == L


def trained(architecture: str, **settings: Any) -> SAE:
    """A crosscoder of three sites of unlike size."""
    draw = torch.Generator().manual_seed(3)
    causes = torch.rand(2048, 12, generator=draw) * (torch.rand(2048, 12, generator=draw) < 0.3)
    sites = tuple(size * (causes @ torch.randn(12, D, generator=draw)) + size for size in (1.0, 5.0, 0.2))
    config = unbraid.SAEConfig(architecture=architecture, n_features=N, **settings)
    return unbraid.fit(config, {"a + b + c": sites}, batch_tokens=128)["sae"]


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [("batch_topk", {"k": 4}), ("matryoshka", {"k": 4, "matryoshka_widths": [8, N]}), ("relu", {}), ("jumprelu", {})],
)
def test_what_is_written_computes_the_same_in_that_library_and_comes_back(architecture, settings, tmp_path: Path):
    ours = trained(architecture, **settings)
    ours.metadata |= {"model_name": "some/model", "hook_name": "a + b + c"}
    if architecture == "jumprelu":
        ours.threshold.copy_(torch.linspace(0.1, 2.0, N))
    save(ours, tmp_path / "theirs", layout="crosscoder")
    state = torch.load(tmp_path / "theirs" / "model_final.pt", weights_only=True)
    wanted = {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias", "code_normalization_id"}
    wanted |= {"target_rms", "activation_mean", "activation_std", "activation_global_scale"}
    assert set(state) == wanted | (set() if architecture == "relu" else {"k", "threshold"}), "it loads strictly"
    x = torch.randn(300, L, D, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 5.0, 0.2])[:, None]
    f, y = computed(state, x.double())
    found = ours.encode(x.flatten(1))
    assert torch.equal(found != 0, f != 0) and 0.02 < (f != 0).double().mean() < 0.98
    parts = torch.stack(ours.by_site(ours(x.flatten(1))), 1)
    torch.testing.assert_close(parts.double(), y, rtol=1e-4, atol=1e-4 * float(y.abs().max()))
    again = unbraid.load(tmp_path / "theirs")
    torch.testing.assert_close(again(x.flatten(1)), ours(x.flatten(1)), rtol=1e-4, atol=1e-4 * float(y.abs().max()))
    assert (again.metadata["model_name"], again.metadata["hook_name"]) == ("some/model", "a + b + c")
    torch.testing.assert_close(relative_norms(again), relative_norms(ours), rtol=1e-4, atol=1e-5)


def test_what_that_library_has_no_class_for_is_refused(tmp_path: Path):
    with pytest.raises(FormatError, match="it is no crosscoder of sites of one width"):
        save(unbraid.load("smollm2-demo"), tmp_path / "one", layout="crosscoder")
    with pytest.raises(FormatError, match="expected one with thresholds"):
        save(trained("topk", k=4), tmp_path / "topk", layout="crosscoder")
    with pytest.raises(FormatError, match="codes are those of 'gated'"):
        save(trained("gated"), tmp_path / "gated", layout="crosscoder")
    never = trained("jumprelu")
    never.threshold[0] = 0
    with pytest.raises(FormatError, match="some thresholds are 0"):
        save(never, tmp_path / "jumprelu", layout="crosscoder")
    with pytest.raises(FormatError, match="no layout 'circuit_tracer_clt' can be written"):
        export(tmp_path, "circuit_tracer_clt", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_file_without_a_kind_of_size_is_of_the_summed_one(tmp_path: Path):
    state = made(None)
    torch.save(state, tmp_path / "model_final.pt")
    x = torch.randn(100, L, D, generator=torch.Generator().manual_seed(1))
    assert torch.equal(unbraid.load(tmp_path).encode(x.flatten(1)) != 0, computed(state, x.double())[0] != 0)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"code_normalization_id": torch.tensor(3)}, "code_normalization_id is 3"),
        ({"threshold": torch.tensor([1.0, 2.0, 3.0])}, "and one threshold"),
        ({"encoder.weight": torch.zeros(2, D, N)}, r"expected \[L, D, N\]"),
        ({"encoder.weight": torch.zeros(D, N)}, r"expected \[L, D, N\]"),
        ({"decoder.bias": None}, r"decoder\.bias"),
        ({"surplus": torch.zeros(1)}, "surplus"),
        ({"activation_global_scale": torch.tensor([1.0, -1.0, 2.0])}, "expected positive numbers"),
        ({"activation_std": torch.ones(L)}, "expected activation_std of shape"),
        ({"activation_mean": torch.full((L, D), torch.inf)}, "expected activation_mean of shape"),
    ],
)
def test_what_a_file_does_not_say_is_refused_by_name(change, problem, tmp_path: Path):
    state = made() | change
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, tmp_path / "model_final.pt")
    with pytest.raises(FormatError, match=problem):
        unbraid.load(tmp_path)


def test_a_pickle_that_runs_code_is_never_opened(tmp_path: Path):
    class Code:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"encoder.weight": Code()}, tmp_path / "model_final.pt")
    with pytest.raises(FormatError, match="could run code"):
        unbraid.load(tmp_path)
