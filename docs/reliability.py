"""Write docs/reliability.md from the docstrings of `tests/faults/`: one row a fault, so it cannot drift.

python docs/reliability.py          rewrites docs/reliability.md
python docs/reliability.py --check  fails when it is out of date
"""

import ast
import sys
from pathlib import Path

PAGE = Path(__file__).with_name("reliability.md")
FAULTS = Path(__file__).parents[1] / "tests" / "faults"
HEAD = """# When something goes wrong

Every mistake ends in one message that says what was wrong, what was expected and what to change; `--debug` adds the
traceback. Each row below is a test, and `docs/reliability.py` writes the table from the tests' docstrings.

| what goes wrong | what you see | what is kept | the test |
|---|---|---|---|
"""


def rows() -> list[str]:
    """One table row for each fault test whose docstring reads `fault | what you see | what is kept`."""
    found = []
    for path in sorted(FAULTS.glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            words = " ".join((ast.get_docstring(node) or "").split()) if isinstance(node, ast.FunctionDef) else ""
            if words.count(" | ") == 2:
                found.append(f"| {words} | `{node.name}` |\n")  # pyright: ignore[reportAttributeAccessIssue]
    return found


def main() -> None:
    """Rewrite or check the page."""
    wanted = HEAD + "".join(rows())
    if "--check" in sys.argv:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != wanted:
            sys.exit("docs/reliability.md is out of date; run python docs/reliability.py")
        return
    PAGE.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
