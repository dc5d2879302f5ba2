"""Edits are values: what a call does to features, and at which positions. Nothing stays attached to a model.

Every edit changes codes f to f', and the activations by the difference alone:

    x' = x + (f' - f) W_dec

so what the dictionary does not explain is held without being computed, and an edit that changes nothing changes no bit.
Edits at one site share one encoding and add up; later sites see the edited stream. TopK is not selected anew.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Steer:
    """Add to a feature's code.

    Attributes:
        feature: `"NAME/index"`.
        by: how much, in `unit`; negative values push the other way.
        unit: `"max"` is the feature's largest code on held-out text, `"code"` the code itself, `"norm"` the mean norm
            of the site's activations (the decoder row then has unit norm).
        without: features of the same site whose decoder rows the change is orthogonal to.
        at: positions.

    Example:
        >>> fm = unbraid.features("runs/tiny")
        >>> edits = [Steer("resid_post.1_twin/3", by=2.0, without=["resid_post.1_twin/14"])]
        >>> made = fm.generate("the river", edits, max_new_tokens=4)
        >>> made.plain != made.text
        True
    """

    feature: str
    by: float | int
    unit: str = "max"
    without: str | Sequence[str] = ()
    at: Any = "content"


@dataclass(frozen=True)
class Scale:
    """Multiply a feature's code by `factor`.

    Example:
        >>> fm = unbraid.features("runs/tiny")
        >>> float(fm.run("the river", [Scale("resid_post.1_twin/14", 1.0)]).kl.max())
        0.0
    """

    feature: str
    factor: float | int
    at: Any = "content"


@dataclass(frozen=True)
class Clamp:
    """Set a feature's code to `value`, whatever it was.

    Example:
        >>> fm = unbraid.features("runs/tiny")
        >>> effect = fm.run("the river", [Clamp("resid_post.1_twin/14", 5.0, at=-1)])
        >>> int((effect.kl > 0).sum())
        1
    """

    feature: str
    value: float | int
    at: Any = "content"


@dataclass(frozen=True)
class Ablate:
    """Set a feature's code to zero; `"NAME/all"` (or `"all"` where there is one dictionary) silences all of them.

    Example:
        >>> fm = unbraid.features("runs/tiny")
        >>> reading = fm.read("the river", [Ablate("resid_post.0_twin/3", at="all")])
        >>> float(reading.code("resid_post.0_twin", 3).max())
        0.0
    """

    feature: str
    at: Any = "content"


@dataclass(frozen=True)
class Patch:
    """Give a feature (or `"NAME/all"`) the codes it has in `reading`.

    The positions that `at` names in the reading are matched, in order, to those it names in the prompt, and there must
    be as many. Generated text is not patched.

    Example:
        >>> fm = unbraid.features("runs/tiny")
        >>> effect = fm.run("the river", [Patch("resid_post.1_twin/all", fm.read("the riven"))])
        >>> bool(effect.kl.max() > 0)
        True
    """

    feature: str
    reading: Any
    at: Any = "content"


@dataclass(frozen=True)
class Splice:
    """Put a dictionary's reconstruction in the place of the activations: `x' = decode(f')`.

    Attributes:
        dictionary: NAME.
        error: keep what the reconstruction misses, which changes nothing unless codes are edited too.
        at: positions.

    Example:
        >>> fm = unbraid.features("runs/tiny")
        >>> fm.run("the river", [Splice("resid_post.1_twin")]).kl.shape
        torch.Size([1, 6])
    """

    dictionary: str
    error: bool = False
    at: Any = "content"


Edit = Steer | Scale | Clamp | Ablate | Patch | Splice
