"""How much memory this process can still allocate, according to the system; caches it can reclaim count as free."""

import ctypes
import re
import subprocess
import sys
from pathlib import Path

import torch


def free_bytes(device: torch.device) -> int:
    """Of the device: on CUDA also what torch holds and would use again."""
    if device.type != "cuda":
        return available()
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def available(root: Path = Path("/")) -> int:
    """Bytes; sys.maxsize on a system that does not say. root: where Linux's files are."""
    if sys.platform == "linux":
        return min([meminfo(text_of(root / "proc/meminfo")), *limits(root)])
    if sys.platform == "darwin":
        return vm_stat(subprocess.run(["vm_stat"], capture_output=True, text=True, check=True).stdout)
    if sys.platform == "win32":
        status = (ctypes.c_ulonglong * 8)(64)  # MEMORYSTATUSEX: two 32-bit numbers, of which the first is its size, …
        ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
        return status[2]  # … then the total and the available bytes
    return sys.maxsize


def text_of(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def meminfo(text: str) -> int:
    """Available bytes, from the text of Linux's /proc/meminfo."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else sys.maxsize


def vm_stat(text: str) -> int:
    """Available bytes, from what macOS's vm_stat prints; it counts pages."""
    size, pages = re.search(r"page size of (\d+) bytes", text), re.findall(r"Pages (?:free|inactive):\s+(\d+)", text)
    return int(size[1]) * sum(map(int, pages)) if size and pages else sys.maxsize


def limits(root: Path) -> list[int]:
    """What each control group of this process, such as its container, leaves it (cgroups v2 and v1)."""
    left = []
    for line in text_of(root / "proc/self/cgroup").splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds in ("", "memory"):
            home = root / "sys/fs/cgroup" / kinds
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if kinds else ("memory.max", "memory.current")
            group = home / path.lstrip("/")  # in a container it may be the path outside, but its parents hold
            for folder in [group, *group.parents][: len(group.parts) - len(home.parts) + 1]:
                most, used = (text_of(folder / name).strip() for name in names)
                cache = re.search(r"^(?:total_)?inactive_file (\d+)", text_of(folder / "memory.stat"), re.MULTILINE)
                if most.isdigit() and used.isdigit():  # not "max"
                    left.append(max(0, int(most) - int(used) + int(cache[1] if cache else 0)))
    return left
