"""Writing files. What a run writes is written whole: first under another name, then renamed (run/reading.py reads).

NaN and infinity become null in what is written, because JSON has neither.
"""

import contextlib
import json
import os
import shutil
import socket
from pathlib import Path

from run.progress import say
from run.reading import errors_named

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt


def write_text(path, text):
    """Writes text in UTF-8, whole or not at all."""
    part = Path(f"{path}.part")
    with errors_named(path, "written"):
        try:
            part.write_text(text, encoding="utf-8", errors="backslashreplace")  # a path may hold other bytes
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def in_use(folder):
    """Holds `folder`, made where it is missing, for this process alone. ValueError if another process holds it.

    The system lets go of the lock when the process ends, however it ends. A new folder that stays empty is removed.
    """
    folder, lock = Path(folder), Path(folder) / "in-use.lock"
    made = not folder.exists()
    with errors_named(folder, "written"):
        folder.mkdir(parents=True, exist_ok=True)
        file = lock.open("a+b", buffering=0)
    with file:
        file.seek(0)
        holder = file.read(200).decode()
        try:
            if os.name == "nt":
                file.seek(1000)  # Windows locks bytes, and the first ones are read above
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.fstat(file.fileno()).st_nlink:
                    raise BlockingIOError  # the holder has removed it since; others make a new one
        except (BlockingIOError, PermissionError):
            raise ValueError(f"{folder} is in use by another process ({holder}); wait for its end, or choose another "
                             "--out") from None  # fmt: skip
        except OSError as error:  # some network file systems know no locks
            say(f"{folder} cannot be locked ({error.strerror}); start nothing else there meanwhile")
        try:
            with contextlib.suppress(OSError):
                file.truncate(0)
                file.write(f"{os.getpid()} on {socket.gethostname()}".encode())
            yield
        finally:
            with contextlib.suppress(OSError):
                lock.unlink()
                if made:
                    folder.rmdir()


def holds_something(folder):
    """Is it a file, or a folder with more than the remains of a process that was killed?"""
    folder, remains = Path(folder), (".part", ".lock")
    return folder.exists() and (not folder.is_dir() or any(file.suffix not in remains for file in folder.iterdir()))


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
    with errors_named(path, "written"), Path(path).open("a", encoding="utf-8") as file:
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
    """Raises ValueError, before long work, for a file that cannot be written where it should be. A path may be None."""
    for path in map(Path, filter(None, paths)):
        if not path.absolute().parent.is_dir():
            raise ValueError(f"{path} cannot be written: make the folder {path.parent} first")
        if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
            raise ValueError(f"{path} cannot be written: it is a folder, or is in one that is read-only")
