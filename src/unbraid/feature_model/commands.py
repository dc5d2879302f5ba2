"""The command line of working with features: read, feature, steer, attribute and live."""

import dataclasses
import re
from typing import Any

import tyro
from rich.console import Console
from rich.markup import escape

from unbraid.errors import FeatureError
from unbraid.feature_model.edits import Ablate, Clamp, Edit, Scale, Steer
from unbraid.feature_model.tables import visible
from unbraid.flags import Trust
from unbraid.owned_files import json_text

console = Console(soft_wrap=True, emoji=False)


@dataclasses.dataclass
class _Read:
    run: tyro.conf.Positional[str]
    """A run folder, or an SAE folder or a published SAE's name that say their model and site."""
    prompt: tyro.conf.Positional[str]
    """The text to read."""
    sae: str | None = None
    """Only this dictionary."""
    k: int = 3
    """Features per token."""
    json: bool = False
    """Print JSON."""
    trust_remote_code: Trust = False


def read(arguments: list[str]) -> None:
    """Show which features a prompt makes fire, token by token."""
    options = tyro.cli(_Read, args=arguments, prog="unbraid read")
    fm = _open(options.run, options.trust_remote_code)
    _shares(fm)
    reading = fm.read(options.prompt)
    if options.sae is not None:
        reading = reading.of(fm.dictionaries[options.sae].name)
    _show(reading.to_dict() if options.json else reading.to_table(options.k), options.json)


@dataclasses.dataclass
class _Feature:
    run: tyro.conf.Positional[str]
    """A run folder, or an SAE folder or a published SAE's name that say their model and site."""
    feature: tyro.conf.Positional[str]
    """NAME/index."""
    k: int = 8
    """Contexts, partners and words."""
    alone_from: str | None = None
    """Only contexts where this feature is silent."""
    json: bool = False
    """Print JSON."""
    trust_remote_code: Trust = False


def feature(arguments: list[str]) -> None:
    """Show where a feature fires, its partners and the words it promotes."""
    options = tyro.cli(_Feature, args=arguments, prog="unbraid feature")
    fm = _open(options.run, options.trust_remote_code)
    contexts = fm.contexts(options.feature, options.k, alone_from=options.alone_from)
    found = {"contexts": contexts, "pairs": fm.pairs(options.feature, options.k)}
    if fm.tokenizer is not None:
        found["lens"] = fm.lens(options.feature, options.k)
    if options.json:
        _show({name: one.to_dict() for name, one in found.items()}, True)
        return
    for one in found.values():
        _show(one, False)
        console.print()


@dataclasses.dataclass
class _Steer:
    run: tyro.conf.Positional[str]
    """A run folder, or an SAE folder or a published SAE's name that say their model and site."""
    prompt: tyro.conf.Positional[str]
    """The text to continue."""
    edits: tyro.conf.Positional[list[str]]
    """NAME/index=+2 steers by 2 of its maximum, =2 clamps, =0 ablates, =x2 scales; @5: from position 5 on, @-1 the last
    prompt token."""
    without: list[str] = dataclasses.field(default_factory=list)
    """Features that steering must not move: NAME/index, or an index of the same dictionary."""
    tokens: int = 40
    """New tokens."""
    seed: int = 0
    """Of the sampling."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    json: bool = False
    """Print JSON."""
    trust_remote_code: Trust = False


def steer(arguments: list[str]) -> None:
    """Continue a prompt with and without edits of features."""
    # Tyro would take an edit such as `-1` for an option, so options are left to it and edits hold a `=`.
    options = tyro.cli(_Steer, args=arguments, prog="unbraid steer")
    edits = [parse_edit(text, options.without) for text in options.edits]
    fm = _open(options.run, options.trust_remote_code)
    sampling: dict[str, Any] = {"do_sample": options.temperature > 0}
    if options.temperature > 0:
        sampling["temperature"] = options.temperature
    made = fm.generate(options.prompt, edits, max_new_tokens=options.tokens, seed=options.seed, **sampling)
    effect = fm.run(options.prompt, [edit for edit in edits if _touches(fm, options.prompt, edit)])
    if options.json:
        _show(made.to_dict() | effect.to_dict(), True)
        return
    kl = float(effect.kl.mean())
    console.print(f"[dim]plain  [/] {escape(visible(options.prompt + made.plain))}", highlight=False)
    console.print(f"[bold]steered[/] {escape(visible(options.prompt + made.text))}", highlight=False)
    console.print(f"KL {kl:.3g} per prompt token", highlight=False)
    if len(effect.partners):
        _show(effect.partners, False)


def _touches(fm: Any, prompt: str, edit: Any) -> bool:
    """Whether an edit acts on the prompt itself, not only on text to come."""
    from unbraid.feature_model.positions import chosen

    return bool(chosen(edit.at, fm.prompt(prompt).span).any())


EDIT = re.compile(r"(?P<feature>.+/(\d+|all))=(?P<kind>[+x]?)(?P<number>-?\d*\.?\d+)(@(?P<at>[^@]+))?")


def parse_edit(text: str, without: list[str]) -> Edit:
    """An edit from its form on the command line.

    Raises:
        FeatureError: it has another form.

    Example:
        >>> parse_edit("resid_post.5/3=+2@5:", [])
        Steer(feature='resid_post.5/3', by=2.0, unit='max', without=(), at=slice(5, None, None))
    """
    found = EDIT.fullmatch(text)
    if found is None:
        raise FeatureError(
            f"{text!r} is no edit; expected NAME/index=+2 (steer by 2 of the maximum), =-2, =2 (clamp), =0 (ablate) or "
            "=x2 (scale), and perhaps @POSITIONS such as @5: or @-1"
        )
    address, number = found["feature"], float(found["number"])
    at = "content" if found["at"] is None else parse_positions(found["at"])
    if found["kind"] == "x":
        return Scale(address, number, at)
    if found["kind"] == "+" or number < 0:
        name = address.rpartition("/")[0]
        held = tuple(one if "/" in one else f"{name}/{one}" for one in without)
        return Steer(address, number, without=held, at=at)
    return Ablate(address, at) if number == 0 else Clamp(address, number, at)


def parse_positions(text: str) -> Any:
    """Positions from their form on the command line: a number, `5:`, `:5`, `2:5`, or a word.

    Raises:
        FeatureError: it has another form.
    """
    if text in ("content", "last", "all"):
        return text
    parts = text.split(":")
    if len(parts) <= 3 and all(re.fullmatch(r"-?\d+|", part) for part in parts) and text.strip(":"):
        numbers = [int(part) if part else None for part in parts]
        return numbers[0] if len(numbers) == 1 else slice(*numbers)
    raise FeatureError(f"{text!r} names no positions; expected a number, a slice such as 5:, content, last or all")


@dataclasses.dataclass
class _Attribute:
    run: tyro.conf.Positional[str]
    """A run folder, or an SAE folder or a published SAE's name that say their model and site."""
    prompt: tyro.conf.Positional[str]
    """The text whose next token is asked about."""
    metric: str | None = None
    """A token, or two as in " Paris - London"; by default the likeliest token less the second."""
    method: str = "gradient"
    """gradient, ig or ablate."""
    sae: str | None = None
    """Only this dictionary."""
    k: int = 10
    """Contributions shown."""
    json: bool = False
    """Print JSON."""
    trust_remote_code: Trust = False


def attribute(arguments: list[str]) -> None:
    """Show which features a logit comes from."""
    options = tyro.cli(_Attribute, args=arguments, prog="unbraid attribute")
    fm = _open(options.run, options.trust_remote_code)
    metric = parse_metric(fm, options.prompt, options.metric)
    sites = None if options.sae is None else [options.sae]
    found = fm.attribute(options.prompt, metric, method=options.method, sites=sites)
    if options.json:
        _show(found.to_dict(), True)
        return
    console.print(f"metric: {escape(visible(describe(fm, metric)))}", highlight=False)
    _show(found.top(options.k), False)


def parse_metric(fm: Any, prompt: Any, text: str | None) -> Any:
    """A metric from its form on the command line; without one, the likeliest next token less the second."""
    from unbraid.feature_model.logit_metric import logit

    if text is not None:
        token, separator, minus = text.partition(" -")
        return logit(token, minus=minus if separator else None)
    first, second = fm.run(prompt, []).logits[0, -1].topk(2).indices.tolist()
    return logit(first, minus=second)


def describe(fm: Any, metric: Any) -> str:
    """A metric's tokens as text."""
    tokens = [one for one in (metric.token, metric.minus) if one is not None]
    texts = [one if isinstance(one, str) or fm.tokenizer is None else fm.tokenizer.decode([one]) for one in tokens]
    return " - ".join(f"logit of {text!r}" for text in texts)


@dataclasses.dataclass
class _Live:
    run: tyro.conf.Positional[str]
    """A run folder, or an SAE folder or a published SAE's name that say their model and site."""
    port: int = 0
    """0 takes a free one."""
    trust_remote_code: Trust = False


def live(arguments: list[str]) -> None:
    """Serve a page to read and steer features, for this machine and this user alone."""
    options = tyro.cli(_Live, args=arguments, prog="unbraid live")
    from unbraid.feature_model.live.server import serve

    fm = _open(options.run, options.trust_remote_code)
    _shares(fm)
    serve(fm, options.port, str(options.run), lambda url: console.print(f"{url} (Ctrl-C ends it)", highlight=False))


def _open(run: str, trust_remote_code: bool) -> Any:
    from unbraid.feature_model.opening import features

    return features(run, trust_remote_code=trust_remote_code)


def _shares(fm: Any) -> None:
    """Have maxima ready, so that codes are shown as shares of them."""
    if fm.has_held_out:
        _ = fm.held_out.maxima


def _show(result: Any, as_json: bool) -> None:
    if as_json:
        print(json_text(result))
    else:
        console.print(result)
