"""JSON, JSON lines, text and folders, written whole: under another name first, then renamed.

NaN and infinity become null, since JSON has neither.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path

import numpy as np


def write_text(path, text):
    """Text in UTF-8, whole or not at all."""
    part = Path(f"{path}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        if part.exists():
            part.unlink()
        raise ValueError(f"{path}: cannot be written ({error.strerror})") from error


@contextlib.contextmanager
def whole_folder(path):
    """A folder to fill; it gets the name `path` at the end. After an error nothing is left of it.

    ValueError where `path` is a file or a folder that holds something.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} is already there; choose another folder or remove it")
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_jsonl(path, values, indent=None):
    """One value per line, whole or not at all; NumPy values become Python's."""
    texts = [json.dumps(value, default=lambda x: x.tolist()) for value in values]
    texts = [json.dumps(json.loads(t, parse_constant=lambda _: None), indent=indent) + "\n" for t in texts]
    write_text(path, "".join(texts))


def write_json(path, value):
    write_jsonl(path, [value], indent=1)


def append_jsonl(path, records):
    """Adds one line per record (a dict) in a single write, so that a reader sees no half lines.

    ValueError where that fails; then the last line may be torn.
    """
    lines = []
    for record in records:
        finite = {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in record.items()}
        lines.append(json.dumps(finite) + "\n")
    try:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write("".join(lines))
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror})") from error


def cut_jsonl(path, keep):
    """Drops the lines of a JSON-lines file from the first one that is torn, or for which keep(value) is false."""
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True) if Path(path).exists() else []
    kept = []
    for line in lines:
        try:
            if not line.endswith("\n") or not keep(json.loads(line)):
                break
        except ValueError:
            break
        kept.append(line)
    if len(kept) < len(lines):
        write_text(path, "".join(kept))


def read_json(path: Path) -> dict:
    """The JSON object in a file; ValueError names the file where it is missing, unreadable or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; fetch it") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object; fetch it again")
    return value


def read_jsonl(path):
    """The values of a JSON-lines file; ValueError names the file and the line that is not JSON."""
    values, where = [], path
    try:
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
            where = f"{path}, line {number}"
            values += [json.loads(line)] if line.strip() else []
    except (OSError, ValueError) as error:
        raise ValueError(f"{where}: {getattr(error, 'strerror', None) or error}") from error
    return values


def check_writable(*paths):
    """ValueError, before long work, for a file whose folder is not there. None is skipped."""
    for path in filter(None, paths):
        if not Path(path).absolute().parent.is_dir():
            raise ValueError(f"{path} cannot be written: make the folder {Path(path).parent} first")
