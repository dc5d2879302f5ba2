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
traceback. Each row below is a test, and `docs/reliability.py` writes the table from the tests' docstrings.

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
