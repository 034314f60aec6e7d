"""Reading what others wrote: text, JSON with types, CSV, parquet, tensors. Every fault is a ValueError of one line.

The line names the file, then the line or the key in it, and says what to change. A file that holds something else (a
git-LFS pointer, a compressed file, a web page) is called what it is.
"""

import contextlib
import csv
import io
import json
import math
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path

import safetensors

STARTS = {  # the first bytes, in lower case, of what people put in a file's place
    (b"version https://git-lfs",): "a git-LFS pointer, not the file itself; fetch the file with git lfs pull",
    (b"\x1f\x8b",): "compressed with gzip; unpack it",
    (b"pk\x03\x04",): "a zip archive; unpack it",
    (b"bzh",): "compressed with bzip2; unpack it",
    (b"\xfd7zxz",): "compressed with xz; unpack it",
    (b"\x28\xb5\x2f\xfd",): "compressed with zstd; unpack it",
    (b"par1",): "a parquet file; give a file of text",
    (b"arrow1", b"\xff\xff\xff\xff"): "an Arrow file; write it with to_parquet or to_json of Hugging Face's datasets",
    (b"<!doctype html", b"<html"): "a web page, not the file itself; download it again",
    (b"\xff\xfe", b"\xfe\xff"): "text in UTF-16; save it as UTF-8",
}
MUST = object()


def check_start(file: Path) -> None:
    """Raises ValueError if the file is missing, cannot be read, or begins like something else in its place."""
    with errors_named(file), file.open("rb") as data:
        start = data.read(64).lstrip().lower()
    if what := next((what for begins, what in STARTS.items() if start.startswith(begins)), None):
        raise ValueError(f"{file} is {what}")


@contextlib.contextmanager
def errors_named(file, done="read"):
    """Turns an OSError into a ValueError that names the file. done: read or written."""
    try:
        yield
    except OSError as error:
        if done == "read" and isinstance(error, FileNotFoundError):
            gone = "is a link to a file that is gone" if Path(file).is_symlink() else "is missing"
            raise ValueError(f"{file} {gone}; fetch it") from None
        raise ValueError(f"{file} cannot be {done} ({error.strerror})") from None


def text_of(file: Path) -> str:
    """The text of the file without a byte-order mark."""
    check_start(file)
    with errors_named(file):
        data = file.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{file}, line {line}: not UTF-8; save the file as UTF-8") from None
    if not text.strip():
        raise ValueError(f"{file}: the file is empty; fetch it again")
    return text


def lines_of(file: Path) -> list[str]:
    """The lines, split at LF alone (CR may remain): splitlines also splits at U+2028, which JSON allows in a text."""
    return text_of(file).rstrip("\r\n").split("\n")


# ---- JSON ------------------------------------------------------------------------------------------------------


def json_of(text: str, file: Path, line: int = 1) -> object:
    """The value of a JSON text that begins at this line of the file."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also for numbers of thousands of digits
        line, why = line + getattr(error, "lineno", 1) - 1, getattr(error, "msg", error)
        raise ValueError(f"{file}, line {line}: not JSON ({why}); correct it, or fetch the file again") from None


NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", dict: "an object",
         list: "a list", types.NoneType: "null"}  # fmt: skip


def name_of(kind) -> str:
    """A type in words: "a list, each a whole number"."""
    if isinstance(kind, types.UnionType):
        return " or ".join(map(name_of, typing.get_args(kind)))
    origin, parts = typing.get_origin(kind) or kind, typing.get_args(kind)
    return NAMES[origin] + (f", each {name_of(parts[-1])}" if parts else "")


def fits(value, kind) -> bool:
    """Is it of this type? kind: int, float (accepts whole numbers, refuses infinity), str, bool, None, list, dict,
    list[…], dict[str, …], or several joined by |."""
    if isinstance(kind, types.UnionType):
        return any(fits(value, part) for part in typing.get_args(kind))
    origin, parts = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (int, float):
        number = isinstance(value, (int, float) if origin is float else int) and not isinstance(value, bool)
        return number and abs(value) < 2**63 and math.isfinite(value)
    if not isinstance(value, origin):
        return False
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return all(fits(item, parts[-1]) for item in inside) if parts else True


class Record(dict):
    """A JSON object that knows where it stands. `take` gives the value of a key once its type is right."""

    def __init__(self, values: dict, where: str):
        super().__init__(values)
        self.where = where

    def take(self, key: str, kind, default=MUST, above: float = -math.inf, most: float = math.inf):
        """The value of `key`, of type `kind` (see `fits`). default: for a key that is absent or null.

        ValueError if the key is needed and absent, or if the value has another type, is not above `above`, or is more
        than `most`.
        """
        value = self.get(key)
        if value is None and default is not MUST:
            return default
        if value is None or not fits(value, kind):
            self.refuse(key, f"{name_of(kind)}, {short(value)}" if key in self else f"{name_of(kind)}; it is absent")
        if isinstance(value, int | float) and not above < value <= most:
            self.refuse(key, f"{f'at most {most:,}' if value > above else f'above {above:g}'}, {short(value)}")
        return Record(value, f"{self.where}: {key}") if isinstance(value, dict) else value

    def refuse(self, key: str, must: str) -> typing.NoReturn:
        raise ValueError(f"{self.where}: {key} must be {must}; correct it, or fetch the file again")


def short(value) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return f"not {text[:60]}" + "…" * (len(text) > 60)


def record_of(value: object, where: str) -> Record:
    """The value as a Record. One that knows where it stands stays as it is."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds no JSON object; fetch it again")
    return value if isinstance(value, Record) else Record(value, where)


def read_json(file: str | Path) -> Record:
    """The JSON object in a file."""
    return record_of(json_of(text_of(Path(file)), file), str(file))


def read_jsonl(file: str | Path) -> list[Record]:
    """The JSON objects of a file, one per line. Blank lines are skipped; an empty file gives an empty list."""
    file = Path(file)
    check_start(file)
    if not file.stat().st_size:
        return []
    lines = [(number, line) for number, line in enumerate(lines_of(file), 1) if line.strip()]
    return [record_of(json_of(line, file, number), f"{file}, line {number}") for number, line in lines]


# ---- rows ------------------------------------------------------------------------------------------------------


class BadRows(list):
    """`with bad:` stands around the reading of each row. A ValueError inside names the row, and ends the reading.

    skip: the row is left out instead, and the message is kept here.
    """

    def __init__(self, skip: bool = False):
        super().__init__()
        self.skip = skip

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace) -> bool:
        skipped = self.skip and isinstance(error, ValueError)
        self.extend([str(error)] * skipped)
        return skipped


def csv_rows(file: Path, width: int | None, bad: BadRows) -> list[tuple[int, list[str]]]:
    """The rows of a CSV file that are not blank, each with the line where it begins. Line ends become LF.

    width: how many cells a row has; 0: as many as the first; None: any number. A quote that is not closed can run over
    many lines, so after a bad row the reading goes on with the next line.
    """
    lines, rows, at = io.StringIO(text_of(file), newline=None).readlines(), [], 0
    while at < len(lines):
        reader, at = csv.reader(map(lines.__getitem__, range(at, len(lines))), strict=True), at + 1
        line = at
        with bad:
            try:
                cells = next(reader, [])
            except csv.Error as error:
                raise ValueError(f"{file}, line {line}: not a CSV row ({error}); check its quotes") from None
            width = len(cells) if width == 0 else width
            if cells and len(cells) != (width or len(cells)):
                raise ValueError(f"{file}, line {line}: {len(cells)} cells, not {width}; correct the row")
            rows += [(line, cells)] if cells else []
            at += reader.line_num - 1
    return rows


def rows_of(file: Path, bad: BadRows, *columns: Sequence[str]) -> Iterator[tuple[int, Record]]:
    """The rows of a CSV file, of JSON lines, of a JSON list or of parquet, each with its place: its line or its number.

    columns: the names that a CSV header or a parquet file must have, or several such sets, one of which it must have.
    Blank lines are passed over.
    """
    with errors_named(file), file.open("rb") as data:
        parquet = data.read(4) == b"PAR1"
    if parquet:
        yield from parquet_rows(file, columns)
    elif (text := text_of(file).lstrip()).startswith("["):
        for number, value in enumerate(json_of(text_of(file), file), 1):
            with bad:
                yield number, record_of(value, f"{file}, entry {number}")
    elif text.startswith("{") or file.suffix in (".json", ".jsonl"):
        for number, line in enumerate(lines_of(file), 1):
            if line.strip():
                with bad:
                    yield number, record_of(json_of(line, file, number), f"{file}, line {number}")
    else:
        (line, header), *rows = csv_rows(file, 0, bad) or [(1, [])]
        check_columns(header, columns, f"{file}, line {line}")
        if not rows and not bad:
            raise ValueError(f"{file}: no rows below the header; download it again")
        for line, cells in rows:
            yield line, Record(dict(zip(header, cells, strict=True)), f"{file}, line {line}")


def parquet_rows(file: Path, columns: Sequence[Sequence[str]]) -> Iterator[tuple[int, Record]]:
    """The rows of a parquet file, counted from 1. pyarrow is needed for this alone."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(f"{file} is a parquet file; pip install pyarrow to read it, or give JSON lines") from None
    try:
        table = ParquetFile(file)
        check_columns(table.schema_arrow.names, columns, str(file))
        rows = (row for batch in table.iter_batches() for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield number, Record(row, f"{file}, row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read ({str(error).splitlines()[0]}); fetch it again") from None


def check_columns(header: list[str], columns: Sequence[Sequence[str]], where: str) -> None:
    """ValueError unless the header has each name of one set once: of the set that it matches best."""
    nearest = max(columns, key=lambda names: sum(name in header for name in names))
    if wrong := [name for name in nearest if header.count(name) != 1]:
        raise ValueError(f"{where}: not one column {' or '.join(wrong)}; give the published file")


# ---- tensors ---------------------------------------------------------------------------------------------------


def copy_tensors(file: Path, place_of) -> None:
    """Copies each tensor of a safetensors file to place_of(its name, file), a tensor; None there skips it.

    ValueError for another shape, integers (quantized weights would need their scales), or a value that is not finite.
    """
    try:
        with safetensors.safe_open(file, framework="pt") as found:
            for name in found.keys():  # noqa: SIM118 (a safe_open is not a dict)
                if (place := place_of(name, file)) is None:
                    continue
                header, wanted = found.get_slice(name), list(place.shape)
                shape, kind = header.get_shape(), header.get_dtype()
                if shape != wanted:
                    raise ValueError(f"{file}: {name} has shape {shape}, its config says {wanted}; fetch both again")
                if kind not in ("F64", "F32", "F16", "BF16"):
                    raise ValueError(f"{file}: {name} holds {kind}, quantized weights are not implemented; use others")
                place.copy_(found.get_tensor(name))
                if not all(end.isfinite() for end in place.aminmax()):
                    raise ValueError(f"{file}: {name} is not finite everywhere; fetch it again, or train anew")
    except (OSError, safetensors.SafetensorError) as error:
        check_start(file)
        raise ValueError(f"{file} cannot be read ({error}); it may be cut short, fetch it again") from None
