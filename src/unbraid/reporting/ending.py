"""What a finished run says in the terminal: a table of its SAEs, the pairs that changed most, what to type next.

The table puts each SAE beside its twin at one glance and warns where the comparison is not at equal sparsity, because
a sparser SAE reconstructs less and overlaps less whatever its penalty does. The pairs are those the twin entangles
most: the place where a penalty has something to show.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor

from unbraid import formats
from unbraid.activations.language_model import LanguageModel
from unbraid.activations.source import ActivationSource
from unbraid.config import RunConfig
from unbraid.reporting.dashboard.entangled import Pair, pair_contexts, pairs_here_or_in_twin
from unbraid.reporting.dashboard.features import Excerpt
from unbraid.reporting.dashboard.passes import Csc, HeldOutPass, held_out_pass, token_texts
from unbraid.training.run_folder import RunFolder

PAIR_TOKENS = 8192
"""Held-out rows on which pairs are looked for."""
SAME_L0 = 0.05
"""Largest relative difference of L0 at which an SAE and its twin are compared without a warning."""
WORTH_SAYING = 0.005
"""Share of dead features from which they are shown."""
COLUMNS = {
    "L0": "l0",
    "R²": "r2",
    "CE score": "ce_loss_score",
    "top corr.": "correlation_top",
    "max cosine": "max_decoder_cosine",
    "dead": "dead_fraction",
}
BESIDE_THE_TWIN = ("correlation_top", "max_decoder_cosine")
LEGEND = (
    "R²: variance explained. CE score: 1 if the model predicts as well with the reconstruction spliced in, 0 if as "
    "badly as with zeros. top corr.: mean correlation of the most correlated pairs. max cosine: mean largest cosine "
    "of a decoder row with another. Arrows compare with the twin, trained alike without a penalty: ↓ less entangled."
)


def end_table(saes: Mapping[str, Mapping[str, Any]], twins: Mapping[str, str]) -> Iterator[Table | str]:
    """A row per SAE, entanglement beside the twin's, and a warning wherever L0 differs from the twin's.

    Args:
        saes: name -> metrics, as `summary.json` has them; a metric that was not measured is None or absent.
        twins: name -> name of the SAE that differs in nothing but lambda2 = 0.
    """
    shown = {title: key for title, key in COLUMNS.items() if any(row.get(key) is not None for row in saes.values())}
    if max(row.get("dead_fraction") or 0.0 for row in saes.values()) < WORTH_SAYING:
        shown.pop("dead", None)
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("SAE", overflow="fold")
    for title in shown:
        table.add_column(title, justify="right", no_wrap=True)
    for name, row in saes.items():
        twin = saes.get(twins.get(name, ""), {})
        table.add_row(name, *(_cell(key, row.get(key), twin.get(key)) for key in shown.values()))
    yield table
    yield LEGEND
    for name, twin in twins.items():
        own, other = saes[name]["l0"], saes[twin]["l0"]
        if abs(own - other) > SAME_L0 * max(own, other):
            yield (
                f"warning: {name} has L0 {own:.1f}, its twin {twin} {other:.1f}: this is not a comparison at equal "
                "sparsity"
            )


def _cell(key: str, value: float | None, twin: float | None) -> str:
    if value is None:
        return "-"
    number = f"{value:.1f}" if key == "l0" else f"{value:.0%}" if key == "dead_fraction" else f"{value:.3f}"
    if key not in BESIDE_THE_TWIN or twin is None:
        return number
    return f"{number} {'↓' if value < twin else '↑' if value > twin else '='} {twin:.3f}"


def most_changed(codes: Csc, W_dec: Tensor, twin_codes: Csc, twin_W_dec: Tensor, count: int = 3) -> list[Pair]:
    """The pairs, entangled here or in the twin, whose correlation differs most between the two; no feature twice.

    Features that never fire on these rows are left out.

    Args:
        codes, W_dec: `[R, N]` codes of held-out rows, and the decoder.
        twin_codes, twin_W_dec: the same of the twin, on the same rows.
        count: how many.
    """
    chosen: list[Pair] = []
    seen: set[int] = set()
    pairs = pairs_here_or_in_twin(codes, W_dec, twin_codes, twin_W_dec)
    for pair in sorted(pairs, key=lambda pair: -abs(pair.change)):
        if not seen & set(pair.features):
            chosen.append(pair)
            seen.update(pair.features)
    return chosen[:count]


def pair_lines(
    name: str, pair: Pair, held_out: HeldOutPass, codes: Csc, texts: Sequence[Sequence[str]]
) -> Iterator[Text]:
    """A pair in a few lines: the correlation here and in the twin, and a stretch of text for each of its features."""
    one, other = pair.features
    yield Text(
        f"{name}/{one} and {name}/{other}: correlation {pair.correlation:.2f}, in the twin "
        f"{pair.twin_correlation or 0.0:.2f}; cosine of their decoder rows {pair.decoder_cosine:.2f}"
    )
    contexts = pair_contexts(held_out, codes, pair)
    for label, key in (("both", "both"), (f"only {one}", "first"), (f"only {other}", "second")):
        if contexts[key]:
            yield Text(f"  {label:>10}  ") + _marked(contexts[key][0], texts)


def _marked(found: Excerpt, texts: Sequence[Sequence[str]]) -> Text:
    """An excerpt on one line, the tokens where a feature fires in bold."""
    fires = np.sum([values > 0 for values in found.activations], axis=0)
    line = Text()
    for position in range(found.start, found.stop):
        token = " ".join(texts[found.context][position].split("\n"))
        line.append(token, style="bold" if fires[position - found.start] else "dim")
    line.truncate(100, overflow="ellipsis")
    return line


def next_commands(run: Path, feature: str, several_sites: bool = False) -> list[str]:
    """What to type after a run; `feature` is one of its features' addresses."""
    commands = {f"unbraid dashboard {run} --serve": "its features and pairs in a browser"}
    commands |= (
        {}
        if several_sites
        else {
            f'unbraid read {run} "The capital of France is"': "which features fire on a prompt",
            f"unbraid feature {run} {feature}": "where one of them fires, and its entangled partners",
            f'unbraid steer {run} "I think that" {feature}=+2': "text with and without it",
            f"unbraid eval {run}": "probing, absorption, contexts and geometry, beside controls",
        }
    )
    width = max(map(len, commands))
    return [f"  {command:{width}}   # {what}" for command, what in commands.items()]


def ending(
    folder: RunFolder, config: RunConfig, source: ActivationSource, summary: Mapping[str, Any], device: torch.device
) -> Iterator[Table | Text | str]:
    """Everything a finished run shows; pairs only where there is a twin, and text to show them on."""
    yield from end_table(summary["saes"], config.twins)
    name, feature = next(iter(summary["saes"])), 0
    model = getattr(source, "model", None)
    if config.twins and isinstance(model, LanguageModel):
        name, twin = list(config.twins.items())[-1]
        sites = tuple(map(config.sites.index, config.dictionaries[name][0].inputs))
        folders = folder.finished_saes()
        saes = {which: formats.load(folders[which]).to(device) for which in (name, twin)}
        placed = {which: (sites, sae) for which, sae in saes.items()}
        held_out = held_out_pass(config, source, placed, PAIR_TOKENS, device)
        texts = [token_texts(model.tokenizer, tokens.tolist()) for tokens in held_out.tokens_CT]
        codes, rows = held_out.codes, {which: sae.W_dec.detach().cpu() for which, sae in saes.items()}
        pairs = most_changed(codes[name], rows[name], codes[twin], rows[twin])
        if pairs:
            feature = pairs[0].features[0]
            yield f"\npairs of {name} that differ most from its twin {twin}:"
        for pair in pairs:
            yield from pair_lines(name, pair, held_out, codes[name], texts)
    yield "\nnext:"
    several = any(route.has_several_sites for route in config.routes)
    yield from next_commands(folder.path, f"{name}/{feature}", several)
