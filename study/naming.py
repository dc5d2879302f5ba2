"""Do features mean something to a reader? Twenty features of `smollm2-demo`, named blind and judged blind.

    python study/naming.py draw     # the sheets: results/naming.json
    python study/naming.py sheet naming | judging      # what a reader is given, printed
    python study/naming.py page     # docs/naming.md from the sheets and results/naming_answers.json

Twenty live features are drawn with seed 0 (live: firing in at least `CONTEXTS` rows of each half). One
reader sees each feature's strongest contexts of the first half of the held-out text, and nothing else, and names it.
Another reader sees the name beside three sets of contexts of the second half, one of the feature and two of features
drawn as distractors, and says which set the name belongs to. By chance a third are right.
"""

import argparse
import html
import json
from pathlib import Path
from typing import Any

import numpy as np

import unbraid
from unbraid.feature_model.dictionaries import Feature
from unbraid.feature_model.held_out import Context, HeldOut
from unbraid.feature_model.tables import visible

NAME = "smollm2-demo"
SEED = 0
FEATURES, CONTEXTS, JUDGED = 20, 6, 4
TOKENS = 65_536
RESULTS = Path(__file__).parent / "results"
SHEETS, ANSWERS = RESULTS / "naming.json", RESULTS / "naming_answers.json"
PAGE = Path(__file__).parents[1] / "docs" / "naming.md"
LETTERS = "ABC"
HEAD = f"""# Twenty features, named blind

**{{right}} of {FEATURES} names were matched to their feature by a reader who had not given them**; by chance
a third would be.

The features were drawn with seed {SEED} from the {{live:,}} features of `{NAME}` that fire in at least {CONTEXTS}
rows of each half of {{rows:,}} held-out tokens. One reader saw the contexts below, of the first half of the text, and
nothing else, and named each feature. Another saw the names, each beside three sets of contexts of the second half, of
the feature and of two others drawn at random, and chose. Both readers were language models, and most of these
features fire on one word or token, which makes names easy. «» mark the token that fires most. `python
study/naming.py` draws them again; both sheets and the answers are in `study/results/`.

| | feature | name | verdict |
|---|---|---|---|"""


def shown(context: Context) -> str:
    """A context in one line; «» stand around the token that fires most."""
    marked = [f"«{token}»" if place == context.peak else token for place, token in enumerate(context.tokens)]
    return visible("".join(marked)).strip()


def half_of(held_out: HeldOut, rows: np.ndarray) -> np.ndarray:
    """0 for tokens of the first half of the text, 1 for the second: no document but one is in both."""
    return (held_out.seen.context_R[rows] * 2 >= len(held_out.seen.tokens_CT)).astype(int)


def strongest(fm: Any, held_out: HeldOut, index: int, half: int, k: int) -> list[str]:
    """The strongest firings in one half of the text, one a row of the text."""
    fires = held_out.firing(Feature(fm.dictionaries[NAME], index))
    here = half_of(held_out, fires.rows) == half
    rows = fires.rows[here][np.argsort(-fires.values[here], kind="stable")]
    _, first = np.unique(held_out.seen.context_R[rows], return_index=True)
    return [shown(held_out.context(fm, int(row), [fires])) for row in rows[np.sort(first)][:k]]


def draw() -> None:
    """Draw the features and write the sheets."""
    fm = unbraid.features(NAME, tokens=TOKENS)
    held_out = fm.held_out
    codes = held_out.seen.codes[NAME]
    live = []
    for index in range(codes.shape[1]):
        rows = codes.indices[codes.indptr[index] : codes.indptr[index + 1]]
        _, first = np.unique(held_out.seen.context_R[rows], return_index=True)
        if min(np.bincount(half_of(held_out, rows[first]), minlength=2)) >= CONTEXTS:
            live.append(index)
    generator = np.random.default_rng(SEED)
    chosen = generator.choice(live, FEATURES, replace=False)
    sheets = []
    for index in map(int, chosen):
        others = generator.choice([one for one in live if one != index], 2, replace=False)
        order = generator.permutation(3)
        sets = [strongest(fm, held_out, int(one), 1, JUDGED) for one in (index, *others)]
        sheets.append(
            {
                "feature": f"{NAME}/{index}",
                "fires": int(codes.indptr[index + 1] - codes.indptr[index]),
                "contexts": strongest(fm, held_out, index, 0, CONTEXTS),
                "distractors": [f"{NAME}/{int(one)}" for one in others],
                "sets": [sets[place] for place in order],
                "answer": LETTERS[int(np.flatnonzero(order == 0)[0])],
            }
        )
    rows = len(held_out.seen.context_R)
    SHEETS.write_text(
        json.dumps({"rows": rows, "live": len(live), "sheets": sheets}, indent=1, ensure_ascii=False) + "\n"
    )


def sheet(kind: str) -> str:
    """What a reader is given: contexts to name, or names to judge."""
    parts = []
    names = json.loads(ANSWERS.read_text())["names"] if kind == "judging" else []
    for number, one in enumerate(json.loads(SHEETS.read_text())["sheets"], 1):
        if kind == "naming":
            parts.append("\n".join([f"Feature {number}", *(f"  - {text}" for text in one["contexts"])]))
        else:
            lines = [f"Feature {number}: {names[number - 1]}"]
            for letter, texts in zip(LETTERS, one["sets"], strict=True):
                lines += [f"  {letter}", *(f"    - {text}" for text in texts)]
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def code(text: str) -> str:
    """Text in a Markdown list, as it is."""
    return f"`` {text} ``" if "``" not in text else f"``` {text} ```"


def page() -> str:
    """docs/naming.md."""
    drawn, answers = json.loads(SHEETS.read_text()), json.loads(ANSWERS.read_text())
    sheets, choices = drawn["sheets"], answers["choices"]
    names = [html.escape(name, quote=False) for name in answers["names"]]
    right = [choice == one["answer"] for one, choice in zip(sheets, choices, strict=True)]
    lines = [HEAD.format(right=sum(right), live=drawn["live"], rows=drawn["rows"])]
    for number, (one, name, ok) in enumerate(zip(sheets, names, right, strict=True), 1):
        lines.append(f"| {number} | `{one['feature']}` | {name} | {'right' if ok else '**wrong**'} |")
    for number, (one, name, choice) in enumerate(zip(sheets, names, choices, strict=True), 1):
        verdict = "right" if choice == one["answer"] else "**wrong**: the contexts of another feature were chosen"
        lines += ["", f"## {number}. {name}", "", f"`{one['feature']}`, on {one['fires']:,} tokens; {verdict}.", ""]
        lines += [f"* {code(text)}" for text in one["contexts"]]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Draw, print a sheet, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["draw", "sheet", "page"])
    parser.add_argument("kind", nargs="?", choices=["naming", "judging"], default="naming")
    asked = parser.parse_args()
    if asked.what == "draw":
        draw()
    elif asked.what == "sheet":
        print(sheet(asked.kind))
    else:
        PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
