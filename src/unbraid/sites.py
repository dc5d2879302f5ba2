"""Where activations are read and written: the names of sites and what each means in a model.

A site is written `KIND.LAYER`, `embed`, `module:PATH` (a module's output) or `module:PATH:input`, and SAELens' hook
names are understood. `KINDS` is the only list of kinds: name, hook name and place in a block stand in one line each.
A dictionary stands on a `Route`: an SAE on one site, a transcoder on two, written `A -> B`. Either end may be several
sites: `A + B + C` is a crosscoder, `A -> B + C` one layer of a cross-layer transcoder.
"""

import re
from typing import NamedTuple

from unbraid.errors import ConfigError
from unbraid.files import folder_name


class Kind(NamedTuple):
    """A kind of site that every layer has.

    Attributes:
        meaning: what it is, for the docs.
        hook: TransformerLens' name for it inside `blocks.LAYER.`.
        place: the method of `BlockTrace` that finds it in a block that has been run, given the site's name.
    """

    meaning: str
    hook: str
    place: str


KINDS = {
    "resid_pre": Kind("the residual stream before a block", "hook_resid_pre", "stream_in"),
    "resid_mid": Kind("between attention and MLP", "hook_resid_mid", "stream_between"),
    "resid_post": Kind("after a block", "hook_resid_post", "stream_out"),
    "attn_in": Kind("what attention reads, after the norm", "attn.hook_in", "attention_read"),
    "attn_z": Kind("all heads before the output projection", "attn.hook_z", "attention_heads"),
    "attn_out": Kind("what attention adds to the stream", "hook_attn_out", "attention_added"),
    "mlp_in": Kind("what the MLP reads, after the norm", "mlp.hook_in", "mlp_read"),
    "mlp_normed": Kind("the same before the norm's gain", "ln2.hook_normalized", "mlp_normed"),
    "mlp_act": Kind("the MLP's neurons", "mlp.hook_post", "mlp_neurons"),
    "mlp_out": Kind("what the MLP adds to the stream", "hook_mlp_out", "mlp_added"),
}
OTHER_HOOKS = {"hook_mlp_in": "resid_mid", "attn.hook_attn_in": "attn_in"}
"""Further names that TransformerLens has for a kind."""
EMBED, EMBED_HOOK, MODULE, HANDED_IN = "embed", "hook_embed", "module", "handed_in"
ARROW, AND = " -> ", " + "
"""Between what a transcoder reads and what it predicts, and between the sites of one end."""


class Site(NamedTuple):
    """Where activations are read: a `kind`, in a `layer` (0-based), or at a module's `path`."""

    kind: str
    layer: int | None = None
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> "Site":
        """`"resid_post.6"` -> `Site("resid_post", 6)`; SAELens' `"blocks.6.hook_resid_post"` gives the same.

        Raises:
            ConfigError: the text names no site.
        """
        site = cls.of_hook(text)
        if site is not None:
            return site
        kind, separator, rest = text.partition(":")
        if kind == MODULE and separator and re.fullmatch(r"[\w.]+(:input)?", rest):
            return cls(MODULE, None, rest)
        if text == EMBED:
            return cls(EMBED)
        if kind == HANDED_IN and cls.is_handed_in_name(rest):
            return cls.handed_in(rest)
        match = re.fullmatch(r"(\w+)\.(\d{1,6})", text)
        if match is None or match[1] not in KINDS:
            raise ConfigError(
                f"site {text!r} is not understood; expected KIND.LAYER with KIND one of {', '.join(KINDS)}, such as "
                "resid_post.6, or embed, module:PATH or module:PATH:input; change model.sites"
            )
        return cls(match[1], int(match[2]))

    @classmethod
    def handed_in(cls, name: str) -> "Site":
        """No place in a model: activations that a caller hands in under a name."""
        return cls(HANDED_IN, None, name)

    @staticmethod
    def is_handed_in_name(name: str) -> bool:
        """Whether activations may be called this."""
        return re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", name) is not None

    @classmethod
    def of_hook(cls, hook: str) -> "Site | None":
        """The site that SAELens calls `hook`; None for one that is no site of unbraid's."""
        if hook == EMBED_HOOK:
            return cls(EMBED)
        match = re.fullmatch(r"blocks\.(\d{1,6})\.(.+)", hook)
        kinds = {kind.hook: name for name, kind in KINDS.items()} | OTHER_HOOKS
        return cls(kinds[match[2]], int(match[1])) if match and match[2] in kinds else None

    @property
    def hook(self) -> str:
        """What SAELens calls it: a TransformerLens hook, or the path of a module."""
        if self.kind in (MODULE, HANDED_IN):
            return self.path
        return EMBED_HOOK if self.kind == EMBED else f"blocks.{self.layer}.{KINDS[self.kind].hook}"

    @property
    def folder(self) -> str:
        """The name as part of a folder's name, safe on every system."""
        return self.path if self.kind == HANDED_IN else re.sub(r"[:/]", ".", str(self))

    def __str__(self) -> str:
        if self.kind in (MODULE, HANDED_IN):
            return f"{self.kind}:{self.path}"
        return self.kind if self.layer is None else f"{self.kind}.{self.layer}"


class Route(NamedTuple):
    """What a dictionary reads and what it predicts: the same site for an SAE, `A -> B` for a transcoder.

    Where an end is several sites their activations stand side by side, in this order.

    >>> Route.parse("mlp_in.6 -> mlp_out.6").folder
    'mlp_in.6--to--mlp_out.6'
    >>> len(Route.parse("resid_post.2 + resid_post.5 + resid_post.8").inputs)
    3
    """

    inputs: tuple[Site, ...]
    outputs: tuple[Site, ...]

    @classmethod
    def parse(cls, text: str) -> "Route":
        """`"resid_post.6"`, `"mlp_in.6 -> mlp_out.6"`, `"resid_post.2 + resid_post.5"`.

        Raises:
            ConfigError: the text names no site, a site twice at one end, an end twice, or more than two ends.
        """
        ends = [_end(end, text) for end in text.split(ARROW.strip())]
        if len(ends) > 2:
            raise ConfigError(f"site {text!r} has {len(ends)} ends; expected one, or two as in A -> B")
        inputs, outputs = ends[0], ends[-1]
        if len(ends) == 2 and set(inputs) == set(outputs):
            alone = AND.join(map(str, inputs))
            raise ConfigError(
                f"site {text!r} has the same two ends; expected different ones, or {alone} alone for a dictionary "
                "that reconstructs what it reads; change model.sites"
            )
        return cls(inputs, outputs)

    @property
    def is_transcoder(self) -> bool:
        """Whether what is predicted is not what is read."""
        return self.inputs != self.outputs

    @property
    def has_several_sites(self) -> bool:
        """Whether an end is several sites."""
        return len(self.inputs) > 1 or len(self.outputs) > 1

    @property
    def ends(self) -> list[Site]:
        """Every site of it, once."""
        return list(dict.fromkeys((*self.inputs, *self.outputs)))

    @property
    def reads(self) -> Site:
        """The only site that is read.

        Raises:
            ConfigError: there are several.
        """
        return self._only(self.inputs)

    @property
    def writes(self) -> Site:
        """The only site that is predicted.

        Raises:
            ConfigError: there are several.
        """
        return self._only(self.outputs)

    def _only(self, end: tuple[Site, ...]) -> Site:
        if len(end) != 1:
            raise ConfigError(
                f"{self} stands on several sites; expected a dictionary that reads one site and predicts one here; "
                "use its codes in Python, with unbraid.load"
            )
        return end[0]

    @property
    def folder(self) -> str:
        """The name as part of a folder's name, safe on every system."""
        ends = [self.inputs, *([self.outputs] if self.is_transcoder else [])]
        return folder_name(ARROW.join(AND.join(site.folder for site in end) for end in ends))

    def __str__(self) -> str:
        ends = [self.inputs, *([self.outputs] if self.is_transcoder else [])]
        return ARROW.join(AND.join(map(str, end)) for end in ends)


def _end(text: str, whole: str) -> tuple[Site, ...]:
    """The sites of one end."""
    sites = tuple(Site.parse(part.strip()) for part in text.split(AND.strip()))
    if len(set(sites)) < len(sites):
        raise ConfigError(f"site {whole!r} names a site twice at one end; expected distinct sites; change model.sites")
    return sites


def hooks(end: tuple[Site, ...]) -> str:
    """What SAELens calls the sites of one end, written as one name."""
    return AND.join(site.hook for site in end)


def predicts_several(text: str) -> bool:
    """Whether several sites are predicted, as by a crosscoder."""
    return AND.strip() in text.rpartition(ARROW.strip())[2]


def has_layers(text: str) -> bool:
    """Whether a site is written as those of a whole cross-layer transcoder, A + B -> C + D in the order of layers."""
    try:
        inputs, outputs = Route.parse(text)
    except ConfigError:  # It is complained of where sites are read.
        return False
    layers = [[site.layer for site in end if site.layer is not None] for end in (inputs, outputs)]
    forward = all(read <= written for read, written in zip(*layers, strict=False))
    ordered = layers == [sorted(end) for end in layers]
    return len(inputs) == len(outputs) > 1 and inputs != outputs and ordered and forward


def is_transcoder(text: str) -> bool:
    """Whether a site is written as one of a transcoder, A -> B."""
    return ARROW.strip() in text
