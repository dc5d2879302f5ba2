"""Write the README's reliability table from the docstrings of `tests/faults/`: one row a fault, so it cannot drift.

python docs/reliability.py          rewrites the table in README.md
python docs/reliability.py --check  fails when the table is out of date
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- reliability: written by docs/reliability.py -->", "<!-- /reliability -->"


def rows() -> list[str]:
    """One table row for each fault test whose docstring reads `fault | what you see | what is kept`."""
    found = []
    for path in sorted((ROOT / "tests" / "faults").glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            words = " ".join((ast.get_docstring(node) or "").split()) if isinstance(node, ast.FunctionDef) else ""
            if words.count(" | ") == 2:
                found.append(f"| {words} | `{node.name}` |")  # pyright: ignore[reportAttributeAccessIssue]
    return found


def table() -> str:
    """The whole table, between its markers."""
    head = ["| what goes wrong | what you see | what is kept | the test |", "|---|---|---|---|"]
    return "\n".join([BEGIN, *head, *rows(), END])


def main() -> None:
    """Rewrite or check the table."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    wanted = before + table() + after
    if "--check" in sys.argv and wanted != text:
        sys.exit("README.md: the reliability table is out of date; run python docs/reliability.py")
    readme.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
