"""Run tour.ipynb from top to bottom and keep what it prints:

    pip install nbclient ipykernel
    python -m toy.make_tour

What differs from one machine to the next is left out: times, paths and the version of Python.
"""
from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOUR = ROOT / "tour.ipynb"


def run_tour():
    """The notebook, executed and cleaned. An exception of nbclient if a cell fails."""
    import nbformat
    from nbclient import NotebookClient
    notebook = nbformat.read(TOUR, as_version=4)
    # python3 is the kernel of the Python that runs this.
    NotebookClient(notebook, timeout=600, kernel_name="python3",
                   resources={"metadata": {"path": str(ROOT)}}).execute()
    return clean(notebook)


def clean(notebook):
    """Leave the cells, their numbers and their outputs."""
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3",
                                        "language": "python"},
                         "language_info": {"name": "python"}}
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
    return notebook


def main():
    import nbformat
    nbformat.write(run_tour(), TOUR)


if __name__ == "__main__":
    main()
