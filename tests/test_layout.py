"""The house: three rooms, one rule of imports (lab → root → run), no circles, budgets, the step on one screen."""

import ast
import contextlib
import importlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {"lab": 2, "root": 1, "run": 0}  # a file imports its own room or one with a smaller number
# The root from the bottom up: a file imports only files that stand before it.
ORDER = ["words", "tasks", "reward", "chat", "kernels", "model", "rollout", "report", "faith", "batches", "grpo", "toy",
         "train"]  # fmt: skip
FILES = {path: (path.parent.name if path.parent != ROOT else "root")
         for path in [*ROOT.glob("*.py"), *(ROOT / "run").glob("*.py"), *(ROOT / "lab").glob("*.py")]
         if path.name != "__init__.py"}  # fmt: skip
LAZY = [("train", "main"), ("faith", "main")]  # the command lines, whose other half is in lab
NAMES = {(room, path.stem): path for path, room in FILES.items()}


def imports(path: Path) -> list[tuple[str, str, str]]:
    """(room, file, the function that imports or "") of each import of the product's own files."""
    found = []

    def visit(node, function=""):
        for child in ast.iter_child_nodes(node):
            inside = child.name if isinstance(child, ast.FunctionDef) else function
            modules = []
            if isinstance(child, ast.Import):
                modules = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: a relative import"
                modules = [child.module, *(f"{child.module}.{alias.name}" for alias in child.names)]
            for module in modules:
                room, _, name = module.rpartition(".")
                if (room or "root", name) in NAMES:
                    found.append((room or "root", name, function))
            visit(child, inside)

    visit(ast.parse(path.read_text()))
    return found


def test_the_order_names_every_file_of_the_root():
    assert sorted(ORDER) == sorted(path.stem for path, room in FILES.items() if room == "root")
    assert len(ORDER) <= 5 + 8  # the five files of the method and at most eight others


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports(path):
    for room, name, function in imports(path):
        if FILES[path] == "root" and room == "lab":  # see LAZY
            assert (path.stem, function) in LAZY, f"{path.name} imports lab.{name}"
            continue
        assert not function, f"{path.name} imports {name} inside {function}"
        if FILES[path] == "run" and room == "root":
            assert name == "model", f"run/{path.name} imports {name}"
            continue
        assert ROOMS[room] <= ROOMS[FILES[path]], f"{path.name} imports {room}/{name}"
        if room == FILES[path] == "root":
            assert ORDER.index(name) < ORDER.index(path.stem), f"{path.name} imports {name}"


def test_no_circles():
    edges = {(room, path.stem): {(r, n) for r, n, function in imports(path) if (path.stem, function) not in LAZY}
             for path, room in FILES.items()}  # fmt: skip
    done, left = set(), set(edges)
    while ready := {file for file in left if edges[file] <= done}:
        done |= ready
        left -= ready
    assert not left, f"circles among {sorted(left)}"


def test_the_step_is_one_screen():
    (step,) = [node for node in ast.parse((ROOT / "train.py").read_text()).body
               if isinstance(node, ast.FunctionDef) and node.name == "step"]  # fmt: skip
    assert step.end_lineno - step.lineno + 1 <= 60


def test_readme_and_help_fit():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


# The results and the log name commands as they were.
DOCUMENTS = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("data", "faq", "guide", "larger"))]
TORCHRUN = {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint"}
FLAG = r"--[a-z][a-z0-9-]*"


@pytest.fixture(scope="module")
def flags():
    """{program: all that its --help names}."""
    found = {}
    for name in ("train", "faith", "model", "tasks", *(f"lab.{name}" for room, name in NAMES if room == "lab")):
        if main := getattr(importlib.import_module(name), "main", None):
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                assert main(["--help"]) == 0 and (name != "faith" or main(["ask", "--help"]) == 0)
            found[name if name.startswith("lab.") else f"{name}.py"] = {*re.findall(FLAG, printed.getvalue())}
    found["train.py"] |= TORCHRUN
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_flags_that_the_documents_name(path, flags):
    """Each is some program's; in a command, that program's."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    assert {*re.findall(FLAG, text)} <= set().union(*flags.values())
    for line in re.findall(r"(?:torchrun|python) [^`\n#&]*", text):
        for program in flags.keys() & {*line.split()}:
            wrong = {*re.findall(FLAG, line)} - flags[program]
            assert not wrong, f"{program} has no {wrong}: {line}"
