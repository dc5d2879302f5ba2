"""How the files of published SAEs are read: numbers only, widened to float32, never by running what is in them.

What was stored in bfloat16, float16 or float8 is widened before anything is computed, so that folding a norm or a bias
loses nothing. Pickles are opened for tensors and plain containers alone.
"""

import pickle
import stat
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from unbraid.errors import FormatError
from unbraid.json_files import is_count, is_number, read_json_object, read_text

DTYPES = ("float32", "float64", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
ALIASES = {"float": "float32", "double": "float64", "half": "float16"}
KINDS = {int: "a whole number of at least 1", float: "a number", str: "text", dict: "an object"}
LARGEST_YAML = 1 << 16
LARGEST_EXPANSION = 64
"""Weights do not compress; an archive that grows by more when opened is no archive of weights."""
UNREADABLE = (
    OSError,
    RuntimeError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    IndexError,
    MemoryError,
    OverflowError,
    AssertionError,
    RecursionError,
    NotImplementedError,
    zipfile.BadZipFile,
    SafetensorError,
    pickle.UnpicklingError,
)
"""What the readers of torch, numpy and safetensors raise on damaged files."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        FormatError: the file cannot be read or is not a JSON object.
    """
    return read_json_object(path, FormatError)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU, in float32 at least.

    Raises:
        FormatError: the file cannot be read or is damaged.
    """
    _require_file(path)
    try:
        return {name: widened(tensor) for name, tensor in load_file(path).items()}
    except UNREADABLE as error:
        raise FormatError(f"cannot read {str(path)!r}: {_reason(error)}; expected an intact safetensors file") from None


def read_pickle(path: Path) -> dict[str, Any]:
    """Read a state dict that torch saved, in float32 at least, without running anything in it.

    Raises:
        FormatError: the file cannot be read, is damaged, or holds more than tensors, numbers, texts and containers.
    """
    _require_file(path)
    try:
        _refuse_bombs(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise FormatError(
            f"cannot read {str(path)!r}: {_reason(error)}; expected a state dict of tensors; a pickle that needs more "
            "than tensors could run code and is never opened"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise FormatError(f"{str(path)!r} holds {type(state).__name__}; expected a state dict: tensors by name")
    return {name: widened(value) if isinstance(value, Tensor) else value for name, value in state.items()}


def state_names(path: Path) -> set[str]:
    """Names in a state dict that torch saved, without reading its tensors; none where that is not to be had."""
    try:
        _require_file(path)
        if not zipfile.is_zipfile(path):
            return set(read_pickle(path))
        _refuse_bombs(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (FormatError, *UNREADABLE):
        return set()
    return {name for name in state if isinstance(name, str)} if isinstance(state, dict) else set()


def tensor_names(path: Path) -> set[str]:
    """Names in a safetensors file; none where that is not to be had."""
    try:
        _require_file(path)
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except (FormatError, *UNREADABLE):
        return set()


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a small YAML file.

    Raises:
        FormatError: the file cannot be read, is large, or holds something else.
    """
    content = read_text(path, FormatError, "a YAML file")
    if len(content) > LARGEST_YAML:
        raise FormatError(f"{str(path)!r} has {len(content):,} characters; expected settings, which are few")
    try:
        data = yaml.safe_load(content)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise FormatError(f"{str(path)!r} is not YAML ({_reason(error)}); expected settings by name") from None
    if not isinstance(data, dict):
        raise FormatError(f"{str(path)!r} holds {type(data).__name__}; expected settings by name")
    return data


def read_npz(path: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Read arrays of numbers from an npz archive, in float32 at least, without pickles.

    Args:
        path: the archive.
        names: what it must hold, exactly; matrices may be written with a small w.

    Raises:
        FormatError: the file is damaged, needs pickles, or holds other arrays.
    """
    _require_file(path)
    try:
        _refuse_bombs(path)
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            found = {f"W_{name[2:]}" if name.startswith("w_") else name: name for name in archive.files}
            if sorted(found) != sorted(names):
                raise FormatError(f"{str(path)!r} holds {sorted(found)[:12]}; expected {sorted(names)}")
            return {ours: _from_numpy(archive[theirs], theirs) for ours, theirs in found.items()}
    except UNREADABLE as error:
        raise FormatError(
            f"cannot read {str(path)!r}: {_reason(error)}; expected an intact npz archive of numbers"
        ) from None


def widened(tensor: Tensor) -> Tensor:
    """Floating point numbers of fewer than 32 bits as float32; everything else as it is."""
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    return tensor.to(torch.float32) if tensor.is_floating_point() and tensor.itemsize < 4 else tensor


def require_settings(settings: dict[str, Any], expected: dict[str, Any], where: str) -> None:
    """Refuse the first setting that asks for something unbraid's inference form does not do.

    Args:
        settings: as read; an absent setting is fine.
        expected: setting -> the acceptable value, or a tuple of acceptable values.
        where: the file, for messages.

    Raises:
        FormatError: naming the setting and its value.
    """
    for name, acceptable in expected.items():
        values = acceptable if isinstance(acceptable, tuple) else (acceptable,)
        if name in settings and not any(settings[name] == v and type(settings[name]) is type(v) for v in values):
            raise FormatError(
                f"{where}: {name} is {shown(settings[name])}, which unbraid cannot hold; "
                f"expected {' or '.join(repr(value) for value in values)}; convert the SAE where it was trained"
            )


def wanted(settings: dict[str, Any], name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """A setting that must be there with this type; whole numbers are counts, from 1 to what 64 bits hold.

    Raises:
        FormatError: it is absent or of another type.
    """
    value = settings.get(name)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    fits = isinstance(value, kinds) and not isinstance(value, bool)
    if isinstance(value, int) and not is_count(value, 1):
        fits = False
    if isinstance(value, float) and not is_number(value):
        fits = False
    if not fits:
        raise FormatError(
            f"{where}: {name} is {shown(value)}; expected {' or '.join(KINDS[k] for k in kinds)}; add or correct it"
        )
    return value


def flag(settings: dict[str, Any], name: str, default: bool, where: str) -> bool:
    """A setting that is true or false, `default` where it is absent or null.

    Raises:
        FormatError: it is anything else.
    """
    value = settings.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise FormatError(f"{where}: {name} is {shown(value)}; expected true or false; correct it")
    return value


def text(settings: dict[str, Any], name: str, where: str) -> str | None:
    """A setting that is text; None where it is absent or null.

    Raises:
        FormatError: it is anything else.
    """
    value = settings.get(name)
    if value is not None and not isinstance(value, str):
        raise FormatError(f"{where}: {name} is {shown(value)}; expected text; correct it")
    return value


def section(settings: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    """A setting that is an object; an empty one where it is absent or null.

    Raises:
        FormatError: it is anything else.
    """
    value = settings.get(name)
    if value is not None and not isinstance(value, dict):
        raise FormatError(f"{where}: {name} is {shown(value)}; expected an object; correct it")
    return value or {}


def require_widths(settings: dict[str, Any], widths: dict[str, int], where: str) -> None:
    """Refuse widths that the weights contradict.

    Args:
        settings: as read; an absent or null setting is fine.
        widths: setting -> what the weights say.
        where: the file, for messages.

    Raises:
        FormatError: naming the setting, its value and the weights'.
    """
    for name, actual in widths.items():
        said = settings.get(name)
        if said is not None and not (is_count(said, 1) and said == actual):
            raise FormatError(
                f"{where}: {name} is {shown(said)}, but the weights are {actual} wide there; expected the same; one of "
                "the two files belongs to another SAE"
            )


def require_dtype(settings: dict[str, Any], where: str) -> None:
    """Refuse a dtype that names no floating point type; which one it is changes nothing, all are read as float32.

    Raises:
        FormatError: naming it.
    """
    said = settings.get("dtype")
    name = said.removeprefix("torch.") if isinstance(said, str) else said
    if said is not None and (not isinstance(name, str) or ALIASES.get(name, name) not in DTYPES):
        raise FormatError(f"{where}: dtype is {shown(said)}; expected one of {', '.join(DTYPES)}; correct it")


def shown(value: Any) -> str:
    """A value as a message quotes it."""
    quoted = repr(value)
    return quoted if len(quoted) <= 80 else f"{quoted[:77]}..."


def _require_file(path: Path) -> None:
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError) as error:
        raise FormatError(f"cannot read {str(path)!r}: {_reason(error)}; expected a file of weights") from None
    if not regular:
        raise FormatError(f"{str(path)!r} is no regular file; expected a file of weights")


def _refuse_bombs(path: Path) -> None:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > LARGEST_EXPANSION * path.stat().st_size + (1 << 20):
            raise ValueError(f"it would grow to {size:,} bytes when opened")


def _from_numpy(array: np.ndarray, name: str) -> Tensor:
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name} holds {array.dtype}, which are no numbers")
    kind = f"f{min(array.dtype.itemsize, 8)}" if array.dtype.kind == "f" else array.dtype.newbyteorder("=")
    return widened(torch.from_numpy(np.array(array, dtype=kind)))


def _reason(error: BaseException) -> str:
    """What went wrong, without the readers' advice to open pickles after all."""
    message = str(error).strip()
    if "weights_only" in message.lower() or "Weights only load failed" in message:
        return "it is damaged, or holds more than tensors and plain containers"
    if "allow_pickle" in message:
        return "it is damaged, or a pickle"
    return message.splitlines()[0][:300] if message else type(error).__name__
