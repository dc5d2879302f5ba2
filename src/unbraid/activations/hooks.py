"""The one place that hooks a module: to read its input or output, or to put another tensor in its place.

A `Place` says which side of which module holds a site's activations and how they become a tensor [C, T, W]: some
modules work on flattened tokens, some sites are a sum or lack a gain. `visited` calls a function with that tensor for
the length of a `with` block; what the function returns, unless None, is what the model goes on with.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unbraid.errors import ModelError
from unbraid.sites import EMBED, Site

Visit = Callable[[Tensor], Tensor | None]
"""Called with activations [C, T, W]; a returned tensor of the same shape replaces them, None leaves them."""
INPUT_NAMES = ("hidden_states", "hidden_state", "x", "input", "inputs_embeds")


class NormGain:
    """A norm's gain and bias: `apply(normed) = normed * gain + bias` is the norm's output.

    Families store the gain as it is (Llama) or less one (Gemma); which of the two is seen by trying.
    """

    def __init__(self, norm: nn.Module, sample: Tensor) -> None:
        self.plain = copy.deepcopy(norm).requires_grad_(False)
        weight, bias = (getattr(norm, name, None) for name in ("weight", "bias"))
        with torch.inference_mode(False), torch.no_grad():
            for parameter in self.plain.parameters():
                parameter.zero_()
            offset = 1.0 if weight is not None and bool(self.plain(sample.clone()).any()) else 0.0
            if weight is not None and not offset:
                self.plain.weight.fill_(1.0)  # pyright: ignore[reportCallIssue]
        self.gain = 1.0 if weight is None else weight.detach() + offset
        self.bias = 0.0 if bias is None else bias.detach()

    def apply(self, normed: Tensor) -> Tensor:
        """The norm's output for activations without gain."""
        return normed * self.gain + self.bias


@dataclass(frozen=True, eq=False)
class Place:
    """Where a site's activations pass.

    Attributes:
        name: the site, for messages.
        module: the module that is hooked.
        side: whether its input or its output holds the activations.
        frame: a module around it whose input is [C, T, D]; needed where `module` sees tokens flattened to [C * T, W].
        adds_to_frame: the site is the frame's input plus what `module` gives (the residual stream between two parts).
        norm_gain: the site is the output of a norm without this gain.
    """

    name: str
    module: nn.Module
    side: Literal["input", "output"]
    frame: nn.Module | None = None
    adds_to_frame: bool = False
    norm_gain: NormGain | None = None


@contextmanager
def visited(place: Place, visit: Visit) -> Iterator[None]:
    """Call `visit` with the activations of `place` at every pass made in the `with` block.

    Raises:
        ModelError: the place gave no tensor, or `visit` returned another shape (while a pass runs).
    """
    frames: list[Tensor] = []

    def keep_frame(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = input_tensor(args, kwargs)
        frames[:] = [kwargs["input_ids"] if found is None else found]

    def changed(found: Tensor | None, given: Tensor | None) -> Tensor | None:
        """What takes the place of the module's own tensor, or None."""
        if found is None:
            raise ModelError(f"site {place.name} gave no tensor; expected activations; change model.sites")
        x = _as_contexts(found, frames[0] if frames else None)
        base = frames[0] if place.adds_to_frame else None
        if base is not None:
            x = base + x
        elif place.norm_gain is not None:
            assert given is not None
            x = place.norm_gain.plain(given).reshape(x.shape)
        new = visit(x)
        if new is None or new is x:
            return None
        if new.shape != x.shape:
            raise ModelError(
                f"the replacement for site {place.name} has shape {tuple(new.shape)}; expected activations "
                f"[contexts, tokens, width] = {list(x.shape)}"
            )
        if base is not None:
            new = new - base
        elif place.norm_gain is not None:
            new = place.norm_gain.apply(new)
        return new.to(found.dtype).reshape(found.shape)

    def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = changed(input_tensor(args, kwargs), None)
        return None if new is None else _with_input(args, kwargs, new)

    def on_output(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        new = changed(first_tensor(output), input_tensor(args, kwargs))
        return None if new is None else _with_first(output, new)

    handles = []
    try:
        if place.frame is not None:
            handles.append(place.frame.register_forward_pre_hook(keep_frame, with_kwargs=True))
        if place.side == "input":
            handles.append(place.module.register_forward_pre_hook(on_input, with_kwargs=True))
        else:
            handles.append(place.module.register_forward_hook(on_output, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_tensor(output: object) -> Tensor | None:
    """A module's activations, whether it returns a tensor or a tuple or mapping that begins with one."""
    if isinstance(output, Mapping):
        output = next(iter(output.values()), None)
    elif isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def input_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The activations among a module's arguments."""
    name = _input_name(args, kwargs)
    return args[0] if isinstance(name, int) else kwargs[name] if name else None


def _input_name(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | str | None:
    if args and isinstance(args[0], Tensor):
        return 0
    names = [name for name in (*INPUT_NAMES, *kwargs) if isinstance(kwargs.get(name), Tensor)]
    return next((name for name in names if kwargs[name].is_floating_point()), None)


def _with_input(args: tuple[Any, ...], kwargs: dict[str, Any], new: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    name = _input_name(args, kwargs)
    return ((new, *args[1:]), kwargs) if isinstance(name, int) else (args, kwargs | {str(name): new})


def _with_first(output: Any, new: Tensor) -> Any:
    if isinstance(output, Tensor):
        return new
    if isinstance(output, Mapping):
        changed: Any = copy.copy(output)
        changed[next(iter(output))] = new
        return changed
    return getattr(output, "_make", type(output))([new, *output[1:]])


def _as_contexts(x: Tensor, frame: Tensor | None) -> Tensor:
    if frame is None or x.ndim != 2 or len(x) != frame.shape[0] * frame.shape[1]:
        return x
    return x.reshape(*frame.shape[:2], -1)


def place_outside_blocks(site: Site, model: nn.Module) -> Place:
    """Where a site without a layer is.

    Raises:
        ModelError: the model has no such module.
    """
    if site.kind == EMBED:
        return Place(str(site), model.get_input_embeddings(), "output")  # pyright: ignore
    path = site.path.removesuffix(":input")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        known = [name for name, _ in model.named_modules() if name.count(".") <= path.count(".") and name]
        raise ModelError(
            f"site {site}: {type(model).__name__} has no module {path!r}; expected one such as "
            f"{', '.join(_closest(path, known))}; change model.sites"
        ) from None
    return Place(str(site), module, "input" if site.path.endswith(":input") else "output", frame=model)


def _closest(path: str, known: list[str]) -> list[str]:
    return get_close_matches(path, known, n=3, cutoff=0.3) or known[:3]
