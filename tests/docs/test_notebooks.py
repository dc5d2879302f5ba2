"""The notebook runs from top to bottom, and what is kept in the file is what it shows.

`python tests/docs/test_notebooks.py` runs it and keeps the outputs in the file.
"""

import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def executed(path: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": path.parent}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not is_progress(output)]
    return notebook


def is_progress(output: nbformat.NotebookNode) -> bool:
    """A frame of a live display, of which there are as many as the machine's speed makes, or a warning."""
    frame = output.output_type == "display_data" and set(output.data) == {"text/plain", "text/html"}
    return frame or output.get("name") == "stderr"


def kinds(notebook: nbformat.NotebookNode) -> list[list[str]]:
    """For each cell of code, the kinds of its outputs: text, figure; printed lines come in any number of pieces."""
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    return [sorted({kind for output in cell for kind in output.get("data", {"stream": ""})}) for cell in outputs]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_its_file_keeps_the_outputs_and_a_figure(path: Path):
    kept = nbformat.read(path, as_version=4)
    assert any("image/png" in cell for cell in kinds(kept))
    needs = kept.metadata.get("needs")  # a run that takes too long to train here
    if needs is not None and not (ROOT / needs).exists():
        pytest.skip(f"{path.name} needs {needs}; its first cell says how to train it")
    assert kinds(executed(path)) == kinds(kept)


if __name__ == "__main__":
    for path in NOTEBOOKS:
        notebook = executed(path)
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # when each cell ran
        nbformat.write(notebook, path)
        print(path, file=sys.stderr)
