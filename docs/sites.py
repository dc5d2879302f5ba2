"""Write docs/sites.md: the kinds of sites, and which of them every family of models has, found by running each.

python docs/sites.py          rewrites docs/sites.md, in about a minute
python docs/sites.py --check  fails when it is out of date
With --rows-as-they-are no model is run: every family keeps its row, which is only checked for its form.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from generated import write_or_check
from tests.support.model_families import FAMILIES, HIDDEN, Findings, examine

from unbraid.sites import KINDS, Site

HEAD = """# Sites

A site is a place in the model where activations are read and edited. `model.sites` takes any number of them; all are
read in one pass that stops after the deepest.

| site | what it is | SAELens' hook |
|---|---|---|
"""
REST = """| `embed` | what the token embedding gives | `hook_embed` |
| `module:PATH` | the output of any module, such as `module:model.layers.3.mlp.gate_proj` | the path |
| `module:PATH:input` | its input | |

SAELens' hook names are accepted wherever a site is asked for. `A -> B` is a transcoder, which reads A and predicts B:
see [recipes](recipes.md#transcoders); `A + B` is a [crosscoder](recipes.md#crosscoders-and-cross-layer-transcoders).

```python
from unbraid.activations.language_model import load_language_model
from unbraid.config import ModelConfig

lm = load_language_model(ModelConfig(name="random:gemma2", sites=["mlp_act.1", "blocks.1.hook_resid_mid"]))
tokens = lm.tokenizer("bade gale tape", return_tensors="pt").input_ids
neurons, middle = lm.activations(tokens)
assert lm.widths == [128, 64]
with lm.visiting({"resid_mid.1": lambda x: 0 * x}):  # the model continues with what a visit returns
    logits = lm.logits(tokens)
```

Module names are not reliable: the same name means a norm after attention in one family and the norm before the MLP in
another. So a loaded model is first run on a few tokens. The outputs of attention and MLP must add up to the change of
the block, and a projection is the linear layer whose output is that of its sublayer. A site that does not exist is
refused with the reason, and so is a model in which tokens see later tokens, unless `model.bidirectional` is true.

## Families

Tiny random models of each family. **yes**: every layer has the site, and its sums and changes were checked; numbers:
only these layers have it; a letter: refused, for the reason below. *Hidden states* compares `resid_post` with the
hidden states that the model itself reports, bit for bit, below the last layer (the last entry comes after the final
norm). *Apart* says whether `text.separate_documents` can keep the documents of a packed context apart; elsewhere it is
refused.

"""
COLUMNS = ["family", *(f"`{kind}`" for kind in KINDS), "hidden states", "apart"]
REASONS = {
    "do not add up": (
        "a",
        "attention and MLP outputs do not add up to the change of the block (scaled or normed again)",
    ),
    "read the same input": ("b", "attention and MLP run side by side, so there is no stream between them"),
    "in a linear layer": ("c", "the sublayer does not end in a linear layer (a mixture of experts)"),
    "output of a norm": ("d", "the MLP reads the stream itself; the norm comes after it"),
    "has none of": ("e", "the layer has no attention or no MLP"),
}


def page(row_of: Callable[[str], str]) -> str:
    """The whole page; `row_of` gives the row of a family."""
    kinds = "".join(f"| `{name}.L` | {kind.meaning} | `{Site(name, 0).hook}` |\n" for name, kind in KINDS.items())
    head = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"
    rows = "".join(map(row_of, FAMILIES))
    notes = "".join(f"* **{letter}**: {meaning}.\n" for letter, meaning in REASONS.values())
    return f"{HEAD}{kinds}{REST}{head}{rows}\n{notes}"


def row_as_it_is(family: str) -> str:
    """A family's row on the page, if it has one of the right form."""
    letters = "".join(letter for letter, _ in REASONS.values())
    cell_form = rf"(?:yes|(?:\d+(?:, \d+)*; )?[{letters}])"
    hidden = "|".join(HIDDEN)
    form = rf"\| {re.escape(family)} \|(?: {cell_form} \|){{{len(KINDS)}}} (?:{hidden}) \| (?:yes|no) \|\n"
    found = re.search(f"^{form}", Path(__file__).with_name("sites.md").read_text(encoding="utf-8"), re.MULTILINE)
    return found[0] if found else f"| {family} |\n"


def row(family: str) -> str:
    """One family's row, from a model of it."""
    found = examine(family)
    cells = [cell(found, kind) for kind in KINDS]
    return f"| {family} | {' | '.join(cells)} | {found.hidden} | {'yes' if found.apart else 'no'} |\n"


def cell(found: Findings, kind: str) -> str:
    """Yes, the layers that have it, or the letter of the reason."""
    layers = found.layers[kind]
    if len(layers) == found.n_layers:
        return "yes"
    letter = next(letter for words, (letter, _) in REASONS.items() if words in found.reasons[kind])
    return f"{', '.join(map(str, layers))}; {letter}" if layers else letter


if __name__ == "__main__":
    as_they_are = "--rows-as-they-are" in sys.argv
    write_or_check("sites.md", page(row_as_it_is if as_they_are else row))
