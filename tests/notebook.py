"""Runs the code cells of a notebook in this process, without Jupyter, and keeps what they print and draw.

Each cell's text and pictures become its outputs, as in Jupyter.

    python tests/notebook.py docs/tour.ipynb      runs it and stores its outputs in it
"""

import base64
import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")


def run(file: Path) -> dict:
    """The notebook, with the outputs of its cells as Jupyter would store them. It runs in the current folder."""
    from matplotlib import pyplot

    book, names = json.loads(file.read_text(encoding="utf-8")), {"__name__": "__main__"}
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(code, 1):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile("".join(cell["source"]), f"{file.name}, cell {number}", "exec"), names)
        text = printed.getvalue().splitlines(keepends=True)
        cell |= {"execution_count": number, "outputs": []}
        cell["outputs"] += [{"output_type": "stream", "name": "stdout", "text": text}] if text else []
        for figure in map(pyplot.figure, pyplot.get_fignums()):
            figure.savefig(drawn := io.BytesIO(), dpi=72)
            data = {"image/png": base64.b64encode(drawn.getvalue()).decode()}
            cell["outputs"].append({"output_type": "display_data", "data": data, "metadata": {}})
        pyplot.close("all")
    return book


def check_alike(stored: dict, made: dict, tolerance: float) -> None:
    """Asserts that cells give the same text, decimal numbers within the tolerance, and as many pictures."""
    for old, new in zip(stored["cells"], made["cells"], strict=True):
        (a, b), number = (told(cell) for cell in (old, new)), r"-?\d+\.\d+"
        assert re.sub(number, "#", b) == re.sub(number, "#", a), "run python tests/notebook.py docs/tour.ipynb"
        assert pictures(new) == pictures(old)
        for x, y in zip(re.findall(number, b), re.findall(number, a), strict=True):
            assert abs(float(x) - float(y)) <= tolerance, f"{x}, but {y} is stored: {b}"


def told(cell: dict) -> str:
    return "".join(line for output in cell.get("outputs", []) for line in output.get("text", []))


def pictures(cell: dict) -> int:
    return sum(output["output_type"] == "display_data" for output in cell.get("outputs", []))


if __name__ == "__main__":
    path = Path(sys.argv[1]).absolute()
    os.chdir(path.parent)
    path.write_text(json.dumps(run(path), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
