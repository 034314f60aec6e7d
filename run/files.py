"""Files. What a run writes is written whole: first under another name, then renamed. What it reads is checked.

NaN and infinity become null in what is written, because JSON has neither.
"""

import contextlib
import csv
import io
import json
import os
import shutil
from collections.abc import Sequence
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


def read_json(path: Path) -> dict:
    """The JSON object in a file. ValueError names the file if it is missing, unreadable or holds no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; fetch it") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object; fetch it again")
    return value


def read_jsonl(path):
    """The values of a JSON-lines file. ValueError names the file, and the line if it is not JSON."""
    values, where = [], path
    try:
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
            where = f"{path}, line {number}"
            values += [json.loads(line)] if line.strip() else []
    except (OSError, ValueError) as error:
        raise ValueError(f"{where}: {getattr(error, 'strerror', None) or error}") from error
    return values


def check_writable(*paths):
    """Raises ValueError, before long work, for a file whose folder does not exist. None is skipped."""
    for path in filter(None, paths):
        if not Path(path).absolute().parent.is_dir():
            raise ValueError(f"{path} cannot be written: make the folder {Path(path).parent} first")


# ---- published data files: every fault is a ValueError that names the file and the line ----


def text_of(file: Path) -> str:
    """The text of the file without a byte-order mark."""
    data = file.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{file}, line {line}: not UTF-8; save the file as UTF-8") from None
    if not text.strip():
        raise ValueError(f"{file}: the file is empty; download it again")
    return text


def lines_of(file: Path) -> list[str]:
    """The lines, split at LF alone (CR may remain): splitlines also splits at U+2028, which JSON allows in a text."""
    return text_of(file).rstrip("\r\n").split("\n")


def csv_rows(file: Path) -> list[tuple[int, list[str]]]:
    """The rows of a CSV file that are not blank, each with the line where it begins. Line ends become LF."""
    reader, rows, line = csv.reader(io.StringIO(text_of(file), newline=None), strict=True), [], 1
    try:
        for cells in reader:
            if cells:
                rows.append((line, cells))
            line = reader.line_num + 1  # not the number of the row: a quoted cell may hold line breaks
    except csv.Error as error:
        raise ValueError(f"{file}, line {line}: not a CSV row ({error}); check its quotes") from None
    return rows


def csv_table(file: Path, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """The rows below the header by column name, each with its line."""
    (_, header), *rows = csv_rows(file)
    if missing := [name for name in columns if name not in header]:
        raise ValueError(f"{file}, line 1: no column {' or '.join(missing)}; give the published file")
    if not rows:
        raise ValueError(f"{file}: no rows below the header; download it again")
    for line, cells in rows:
        if len(cells) != len(header):
            raise ValueError(f"{file}, line {line}: {len(cells)} cells, {len(header)} columns; correct the row")
    return [(line, dict(zip(header, cells, strict=True))) for line, cells in rows]


def json_of(text: str, file: Path, line: int) -> object:
    """The value of a JSON text that begins at this line of the file."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line, why = line + getattr(error, "lineno", 1) - 1, getattr(error, "msg", error)
        raise ValueError(f"{file}, line {line}: not JSON ({why}); download the file again") from None
