"""Writing files. What a run writes is written whole: first under another name, then renamed (run/reading.py reads).

NaN and infinity become null in what is written, because JSON has neither.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path


@contextlib.contextmanager
def errors_named(path):
    """Turns an OSError into a ValueError that names `path`."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror})") from error


def write_text(path, text):
    """Writes text in UTF-8, whole or not at all."""
    part = Path(f"{path}.part")
    with errors_named(path):
        try:
            part.write_text(text, encoding="utf-8")
            part.replace(path)
        finally:
            if part.exists():
                part.unlink()


@contextlib.contextmanager
def whole_folder(path):
    """Yields a folder to fill. It gets the name `path` at the end; after an error nothing is left of it.

    Raises ValueError if `path` is a file, or a folder that is not empty.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} is already there; choose another folder or remove it")
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # a process that was killed may have left it
    partial.mkdir(parents=True)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def json_line(value, indent=None):
    """The value as JSON text with a line end. NumPy values become Python's."""
    text = json.dumps(value, default=lambda x: x.tolist())
    return json.dumps(json.loads(text, parse_constant=lambda _: None), indent=indent) + "\n"


def write_jsonl(path, values):
    """Writes one value per line, whole or not at all."""
    write_text(path, "".join(map(json_line, values)))


def write_json(path, value):
    write_text(path, json_line(value, indent=1))


def append_jsonl(path, values):
    """Adds one line per value in a single write, so that a reader sees no half lines.

    Raises ValueError if that fails; then the last line may be torn.
    """
    with errors_named(path), Path(path).open("a", encoding="utf-8") as file:
        file.write("".join(map(json_line, values)))


def cut_jsonl(path, keep):
    """Drops all lines of a JSON-lines file from the first line that is torn, or whose value fails keep(value)."""
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True) if Path(path).exists() else []
    kept = 0
    with contextlib.suppress(ValueError):
        while kept < len(lines) and lines[kept].endswith("\n") and keep(json.loads(lines[kept])):
            kept += 1
    if kept < len(lines):
        write_text(path, "".join(lines[:kept]))


def check_writable(*paths):
    """Raises ValueError, before long work, for a file whose folder does not exist. None is skipped."""
    for path in filter(None, paths):
        if not Path(path).absolute().parent.is_dir():
            raise ValueError(f"{path} cannot be written: make the folder {Path(path).parent} first")
