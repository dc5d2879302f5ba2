"""Files that somebody damaged or forged: whatever is read ends in what it holds or in one error that names it.

Every JSON file unbraid reads is written whole, one value in it is replaced, removed or nested (or the text is cut), and
what reads the file is called. The same seed gives the same case; `pytest -m slow` tries many more.
"""

import copy
import json
import random
import shutil
import struct
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published_fixtures import FIXTURES
from sae_samples import D, K, N, make_sae
from safetensors.torch import save_file

import unbraid
from unbraid import formats
from unbraid.activations.cache import CachedActivations, harvest
from unbraid.config import RunConfig
from unbraid.errors import UnbraidError
from unbraid.formats.export import export
from unbraid.reporting.compare import frontier
from unbraid.reporting.training_log import TrainingLog
from unbraid.training.checkpoint import read_checkpoint, write_checkpoint
from unbraid.training.run_folder import RunFolder

HOSTILE: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3.5, 1e308, -1e308, 1e-320, float("nan"), float("inf"), 10**18, 10**400),
    *("", "x", "8", "no", "../../x", "/etc/passwd", "a\0b", "\ud800", "nan", "<script>", "$\\frac{", "x" * 2000),
    *([], {}, [1], ["x"], [None], {"a": 1}, [[[]]], {"": {}}, [0] * 300),
]
DAMAGED = ("", "[]", "null", "1", '"x"', "{", "\ufeff{}", "[" * 100_000, '{"a":' * 100_000, "\0" * 50, "{}\n{}")


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths of every value in a JSON document, the document itself among them."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def mutated(text: str, chance: random.Random) -> str:
    """A JSON text with one thing wrong."""
    if chance.random() < 0.08:
        return chance.choice(DAMAGED)
    if chance.random() < 0.05:
        return text[: chance.randrange(len(text))]
    data = json.loads(text)
    for _ in range(chance.choice((1, 1, 1, 2))):
        data = changed(data, chance.choice(list(places(data))), chance)
    return json.dumps(data)


def changed(data: Any, path: tuple, chance: random.Random) -> Any:
    if not path:
        return chance.choice([data, copy.deepcopy(chance.choice(HOSTILE)), [data], {"a": data}])
    data = copy.deepcopy(data)
    holder = data
    for key in path[:-1]:
        holder = holder[key]
    old, how = holder[path[-1]], chance.random()
    if how < 0.15:
        del holder[path[-1]]
    elif how < 0.25:
        holder[path[-1]] = chance.choice([[old], {"a": old}, str(old), json.dumps(old)])
    elif how < 0.35 and isinstance(old, int | float):
        holder[path[-1]] = chance.choice([-old, old + 1, old * 1000, old / 3, float(old), bool(old)])
    elif how < 0.4 and isinstance(holder, dict):
        holder[chance.choice(["../x", "a\0", "\ud800", "x" * 300, "$\\frac{"])] = holder.pop(path[-1])
    else:
        holder[path[-1]] = copy.deepcopy(chance.choice(HOSTILE))
    return data


def survive(action: Callable[[], Any], case: str) -> None:
    """`action` ends, or says in one short message what is wrong."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            action()
    except UnbraidError as problem:
        message = str(problem)
        assert 10 < len(message) < 3000, f"{case}: {message[:200]!r}"
        message.encode("utf-8")
    except Exception as problem:
        raise AssertionError(f"{case}: {type(problem).__name__}: {str(problem)[:300]}") from problem


Target = tuple[Callable[[Path], Path], Callable[[Path], Any]]
"""Writes a folder and returns the JSON file to damage; reads the folder."""


def load_all(folder: Path) -> None:
    sae = formats.load(folder)
    sae(torch.randn(2, sae.d_in))
    repr(sae)
    if sae.d_in == sae.d_out:
        formats.save(sae, folder.with_name("again"))


def saved(layout: str, architecture: str, file: str, folder: Path) -> Path:
    metadata = {"model_name": "m", "hook_name": "blocks.3.hook_resid_post", "context_size": 128, "prepend_bos": True}
    formats.save(make_sae(architecture), folder, layout=layout, metadata=metadata, frequency_N=torch.ones(N))
    return folder / file


def flat(folder: Path) -> Path:
    """SAELens 3 to 5."""
    folder.mkdir()
    tensors = {"W_enc": torch.randn(D, N), "b_enc": torch.randn(N), "W_dec": torch.randn(N, D), "b_dec": torch.randn(D)}
    save_file(tensors, folder / "sae_weights.safetensors")
    config = {"hook_point": "blocks.2.hook_resid_pre", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}}
    config |= {
        "d_in": D,
        "d_sae": N,
        "dtype": "torch.float32",
        "normalize_activations": "layer_norm",
        "model_name": "m",
    }
    config |= {"model_from_pretrained_kwargs": {"fold_ln": True}, "context_size": 128, "prepend_bos": False}
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder / "cfg.json"


def transcoder(folder: Path) -> Path:
    """An eai-sparsify transcoder with a skip connection."""
    folder.mkdir()
    tensors = {"encoder.weight": torch.randn(N, D), "encoder.bias": torch.randn(N), "W_skip": torch.randn(D, D)}
    save_file(tensors | {"W_dec": torch.randn(N, D), "b_dec": torch.randn(D)}, folder / "sae.safetensors")
    config = {"activation": "groupmax", "k": K, "transcode": True, "skip_connection": True, "d_in": D, "num_latents": N}
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder / "cfg.json"


def published(name: str, folder: Path) -> Path:
    made = FIXTURES[name](folder, "float32")
    place = made.place if made.place.is_dir() else made.place.parent
    return next(file for file in sorted(place.glob("*.json")))


def read_published(path: Path, **options: Any) -> None:
    """The dictionary beside the damaged file."""
    folder = next(file.parent for file in path.rglob("*.json"))
    formats.load(folder, **options)


def run_folder(folder: Path) -> Path:
    config = unbraid.recipes.tiny()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.model_dump(mode="json")))
    metrics = {"l0": 5.0, "r2": 0.5, "correlation_top": 0.4, "correlation_mean": 0.1, "steps": {"planned": 2}}
    saes = {name: metrics for name in config.sae_names}
    (folder / "summary.json").write_text(json.dumps({"steps": {"planned": 2, "executed": 2}, "saes": saes}))
    record = {
        "loss": 1.0,
        "tau": 0.2,
        "correlation_mean": 0.1,
        "correlation_std": 0.1,
        "lambda2": 0.03,
        "path": "dense",
    }
    lines = [{"step": step, "tokens": 64 * step, "saes": dict.fromkeys(config.sae_names, record)} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    core = {"model_performance_preservation": {"ce_loss_score": 0.9}}
    evaluation = {"saes": {name: {"site": "resid_post.0", "core": core} for name in saes}, "controls": {}}
    (folder / "evaluation.json").write_text(json.dumps(evaluation | {"settings": {"core": {}}, "weights": "x"}))
    for name in config.sae_names:
        formats.save(make_sae("relu"), folder / "saes" / name)
    return folder


def run_file(name: str, folder: Path) -> Path:
    return run_folder(folder) / name


def read_run(folder: Path) -> None:
    for read in (
        lambda: RunFolder(folder).config,
        lambda: RunFolder(folder).read_summary(),
        lambda: frontier([folder]),
        lambda: log_of(folder),
        lambda: export(folder, "sae_lens", folder.with_name("exported")),
    ):
        survive(read, "run")


def log_of(folder: Path) -> None:
    log = TrainingLog.read(folder / "metrics.jsonl")
    for name in log.names:
        for quantity in ("loss", "tau", "correlation_mean", "lambda2"):
            log.curve(name, quantity).thinned(5)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> tuple[RunConfig, Path]:
    config = unbraid.recipes.tiny()
    training = config.training.model_copy(update={"tokens": 640, "held_out_tokens": 256})
    config = config.model_copy(update={"training": training})
    folder = tmp_path_factory.mktemp("cache") / "tiny"
    harvest(config, folder, torch.device("cpu"))
    return config, folder


def checkpoint(file: str, folder: Path) -> Path:
    state = {"step": 3, "scales": {"a": 1.0}, "buffer": {"position": {"shard": 1}}, "seconds": {"training": 1.0}}
    written = write_checkpoint(folder / "checkpoints", 3, {"sae-a": {"x": torch.zeros(3)}}, state, keep=2)
    shutil.move(written, folder / "step_3")
    return folder / "step_3" / file


LAYOUTS: dict[str, Target] = {
    "sae_lens topk": (partial(saved, "sae_lens", "topk", "cfg.json"), load_all),
    "sae_lens jumprelu": (partial(saved, "sae_lens", "jumprelu", "cfg.json"), load_all),
    "sae_lens gated": (partial(saved, "sae_lens", "gated", "cfg.json"), load_all),
    "sae_lens 3": (flat, load_all),
    "dictionary_learning": (partial(saved, "dictionary_learning", "matryoshka", "config.json"), load_all),
    "sparsify": (partial(saved, "sparsify", "topk", "cfg.json"), load_all),
    "sparsify transcoder": (transcoder, load_all),
    "gemma_scope_2": (partial(published, "gemma_scope_2"), read_published),
    "llama_scope": (partial(published, "llama_scope"), read_published),
    "llama_scope_r1": (partial(published, "llama_scope_r1"), partial(read_published, norm_scaling_factor=1.5)),
    "llamascopium": (partial(published, "llamascopium_topk"), read_published),
    "connor_rob": (partial(published, "connor_rob"), read_published),
}
RUNS: dict[str, Target] = {
    "config": (partial(run_file, "config.json"), read_run),
    "summary": (partial(run_file, "summary.json"), read_run),
    "evaluation": (partial(run_file, "evaluation.json"), read_run),
    "checkpoint manifest": (partial(checkpoint, "manifest.json"), lambda folder: read_checkpoint(folder / "step_3")),
    "checkpoint state": (partial(checkpoint, "state.json"), lambda folder: read_checkpoint(folder / "step_3")),
}
TARGETS = LAYOUTS | RUNS


def try_cases(name: str, target: Target, seeds: range, tmp_path: Path) -> None:
    make, read = target
    file = make(tmp_path / "subject")
    whole = file.read_text()
    for seed in seeds:
        case = f"{name}, seed {seed}"
        file.write_text(mutated(whole, random.Random(f"{name} {seed}")), encoding="utf-8", errors="surrogatepass")
        survive(lambda: read(tmp_path / "subject"), case)


@pytest.mark.parametrize("name", TARGETS)
def test_one_wrong_value_in_a_file_is_named_or_harmless(name: str, tmp_path: Path):
    try_cases(name, TARGETS[name], range(16), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_many_wrong_values(name: str, tmp_path: Path):
    try_cases(name, TARGETS[name], range(100, 400), tmp_path)


def read_cache(config: RunConfig, folder: Path) -> None:
    cached = CachedActivations(config, folder)
    for held_out in (False, True):
        for chunk in cached.chunks(None, held_out=held_out):
            assert chunk.tokens_BT.shape[1] == config.text.context_length


def forged_caches(cache: tuple[RunConfig, Path], seeds: range, tmp_path: Path) -> None:
    config, source = cache
    folder = shutil.copytree(source, tmp_path / "cache")
    whole = (folder / "manifest.json").read_text()
    for seed in seeds:
        (folder / "manifest.json").write_text(mutated(whole, random.Random(f"cache {seed}")), errors="surrogatepass")
        survive(lambda: read_cache(config, folder), f"cache, seed {seed}")


def test_a_forged_manifest_of_a_cache_is_named_or_harmless(cache, tmp_path: Path):
    forged_caches(cache, range(16), tmp_path)


@pytest.mark.slow
def test_many_forged_manifests_of_a_cache(cache, tmp_path: Path):
    forged_caches(cache, range(100, 400), tmp_path)


def test_what_a_manifest_of_a_cache_may_not_say(cache, tmp_path: Path):
    """Shards outside the folder, counts that do not add up, other widths: each is refused, and names what is wrong."""
    config, source = cache
    whole = json.loads((source / "manifest.json").read_text())
    shutil.copy(source / "training_00000.safetensors", tmp_path / "outside.safetensors")

    def forged(change: Callable[[dict[str, Any]], Any]) -> None:
        folder = shutil.copytree(source, tmp_path / "cache", dirs_exist_ok=True)
        manifest = copy.deepcopy(whole)
        change(manifest["parts"]["training"][0] if "shard" in change.__code__.co_varnames else manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        read_cache(config, folder)

    with pytest.raises(UnbraidError, match=r"file '\.\./outside"):
        forged(lambda shard: shard.update(file="../outside.safetensors"))
    with pytest.raises(UnbraidError, match="file '/etc/passwd'"):
        forged(lambda shard: shard.update(file="/etc/passwd"))
    with pytest.raises(UnbraidError, match=r"contexts \[-1"):
        forged(lambda shard: shard.update(contexts=[-1] * len(shard["contexts"])))
    with pytest.raises(UnbraidError, match="positions for"):
        forged(lambda shard: shard.update(contexts=[*shard["contexts"], 1]))
    with pytest.raises(UnbraidError, match="the manifest says"):
        forged(lambda shard: shard.update(contexts=[1] * len(shard["contexts"])))
    with pytest.raises(UnbraidError, match="the manifest says"):
        forged(lambda manifest: manifest.update(widths={site: 7 for site in manifest["sites"]}))
    with pytest.raises(UnbraidError, match="widths"):
        forged(lambda manifest: manifest.update(widths={site: "x" for site in manifest["sites"]}))
    with pytest.raises(UnbraidError, match="special_ids"):
        forged(lambda manifest: manifest.update(special_ids=["x"]))


def damaged_lines(seeds: range, tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    for seed in seeds:
        chance = random.Random(f"metrics {seed}")
        forged = list(lines)
        forged[chance.randrange(len(lines))] = mutated(lines[0], chance)
        (folder / "metrics.jsonl").write_text("\n".join(forged) + "\n", encoding="utf-8", errors="surrogatepass")
        survive(lambda: log_of(folder), f"metrics, seed {seed}")


def test_a_damaged_line_of_the_log_is_named_or_harmless(tmp_path: Path):
    damaged_lines(range(30), tmp_path)


@pytest.mark.slow
def test_many_damaged_lines_of_the_log(tmp_path: Path):
    damaged_lines(range(100, 900), tmp_path)


def wrong_tensor(tensor: torch.Tensor, chance: random.Random) -> torch.Tensor:
    """A tensor of another shape, type or content."""
    return chance.choice(
        [
            lambda t: t.T.contiguous() if t.ndim == 2 else t.reshape(-1, 1),
            lambda t: t.flatten()[: max(0, t.numel() - 1)],
            lambda t: t.flatten()[:0],
            lambda t: t.reshape(*t.shape, 1),
            lambda t: t.to(torch.int32),
            lambda t: t.bool(),
            lambda t: t.to(torch.complex64),
            lambda t: t * float("nan"),
            lambda t: t * float("inf"),
            lambda t: t * 0,
            lambda t: t.sum(),
            lambda t: torch.cat([t, t]) if t.ndim else t,
            lambda t: -t,
        ]
    )(tensor)


WEIGHTS = {
    "sae_lens": ("jumprelu", "sae_weights.safetensors"),
    "dictionary_learning": ("matryoshka", "ae.pt"),
    "sparsify": ("topk", "sae.safetensors"),
}


def wrong_weights(layout: str, seeds: range, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    architecture, name = WEIGHTS[layout]
    folder = formats.save(make_sae(architecture), tmp_path / "sae", layout=layout)
    file, pickled = folder / name, name.endswith(".pt")
    loaded = torch.load(file, weights_only=True) if pickled else load_file(file)
    state = {key: tensor.clone() for key, tensor in loaded.items()}  # no view of a file that is cut below
    whole = file.read_bytes()
    for seed in seeds:
        chance = random.Random(f"{layout} {seed}")
        if chance.random() < 0.3:
            cut = bytearray(whole[: chance.randrange(len(whole))] if chance.random() < 0.5 else whole)
            for _ in range(chance.choice((0, 1, 8)) if cut else 0):
                cut[chance.randrange(min(len(cut), 600))] = chance.randrange(256)
            file.write_bytes(bytes(cut))
        else:
            forged = {key: tensor.clone() for key, tensor in state.items()}
            key = chance.choice(sorted(forged))
            forged[key] = wrong_tensor(forged[key], chance)
            if chance.random() < 0.2:
                forged[chance.choice(["extra", "../x"])] = forged.pop(key)
            torch.save(forged, file) if pickled else save_file(forged, file)
        survive(lambda: load_all(folder), f"weights of {layout}, seed {seed}")


@pytest.mark.parametrize("layout", WEIGHTS)
def test_wrong_or_damaged_weights_are_named_or_harmless(layout: str, tmp_path: Path):
    wrong_weights(layout, range(16), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("layout", WEIGHTS)
def test_many_wrong_or_damaged_weights(layout: str, tmp_path: Path):
    wrong_weights(layout, range(100, 350), tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        {"W_enc": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 64]}},
        {"W_enc": {"dtype": "F32", "shape": [-1, 16], "data_offsets": [0, 64]}},
        {"W_enc": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 2**40]}},
        {"W_enc": {"dtype": "F4", "shape": [4, 4], "data_offsets": [0, 64]}},
        {"W_enc": []},
        [],
    ],
)
def test_forged_headers_of_safetensors_are_refused(header, tmp_path: Path):
    folder = formats.save(make_sae("relu"), tmp_path / "sae")
    text = json.dumps(header).encode()
    (folder / "sae_weights.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 64)
    with pytest.raises(UnbraidError, match=r"sae_weights\.safetensors"):
        formats.load(folder)


@pytest.mark.parametrize("kind", ["O", "U3", "M8[s]", "u1", "V8", "c8"])
def test_archives_that_hold_no_floating_point_numbers_are_refused(kind, tmp_path: Path):
    arrays = {"W_enc": np.ones((D, N), "f4"), "W_dec": np.ones((N, D), "f4"), "b_dec": np.ones(D, "f4")}
    arrays |= {"threshold": np.ones(N, "f4"), "b_enc": np.zeros(N, kind)}
    np.savez(tmp_path / "params.npz", allow_pickle=True, **arrays)
    with pytest.raises(UnbraidError, match=r"params\.npz"):
        formats.load(tmp_path)


@pytest.mark.parametrize("kind", ["f2", ">f4", "g", "f8"])
def test_archives_of_any_precision_and_byte_order_are_read(kind, tmp_path: Path):
    arrays = {"W_enc": np.ones((D, N), kind), "W_dec": np.ones((N, D), kind), "b_dec": np.ones(D, kind)}
    np.savez(tmp_path / "params.npz", **arrays, threshold=np.ones(N, kind), b_enc=np.zeros(N, kind))
    assert formats.load(tmp_path).n_features == N
