"""Write docs/reliability.md from the docstrings of `tests/faults/`: one row a fault, so it cannot drift.

python docs/reliability.py          rewrites docs/reliability.md
python docs/reliability.py --check  fails when it is out of date
"""

import ast
from pathlib import Path

from generated import write_or_check

FAULTS = Path(__file__).parents[1] / "tests" / "faults"
HEAD = """# When something goes wrong

Every mistake ends in one message that says what was wrong, what was expected and what to change; `--debug` adds the
traceback.

**What is replaced.** unbraid writes a marker, `.unbraid.json`, into the folders it makes: runs, caches, dashboards,
comparisons, exported SAEs. Only a folder with the marker of its own kind is written over, and only with `--overwrite`
where a command has that flag; a single file such as `evaluation.json` only where its content shows that unbraid wrote
it. The old content stays whole until the new one is, and everything else is refused. Symbolic links inside these
folders are not followed.

**Whose code runs.** Code that comes with a model runs only with `--model.trust_remote_code` in that very command,
whatever a run folder, a settings file or a cache says. Pickles are opened for tensors only. The pages that unbraid
serves answer on this machine alone, to requests that carry their token.

**What a run is measured on.** A run that was handed a model or text in Python says so in `config.json` (`handed_in`),
and nothing is measured on other text or another model by accident: `unbraid resume` needs the same again, and
`unbraid eval` takes `--text...` or `--model` in their place. `unbraid compare` counts runs as seeds of one setting only
where the model and text they read are the same to the checksum, too.

Each row below is a test, and `docs/reliability.py` writes the table from the tests' docstrings.

| what goes wrong | what you see | what is kept | the test |
|---|---|---|---|
"""


def page() -> str:
    """The whole page."""
    return HEAD + "".join(rows())


def rows() -> list[str]:
    """One table row for each fault test whose docstring reads `fault | what you see | what is kept`."""
    found = []
    for path in sorted(FAULTS.glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            words = " ".join((ast.get_docstring(node) or "").split()) if isinstance(node, ast.FunctionDef) else ""
            if words.count(" | ") == 2:
                found.append(f"| {words} | `{node.name}` |\n")  # pyright: ignore[reportAttributeAccessIssue]
    return found


if __name__ == "__main__":
    write_or_check("reliability.md", page())
