"""What this machine is and can do: its name, the rate of matrix products and of copies in memory, peak memory, a clock.

Figures of lab.bench and tests/gpu.py are compared with these, which are measured in the same run.
"""

import platform
import re
import resource
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F


def device() -> torch.device:
    """The GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Clock:
    """clock(phase) adds the seconds since the last call to `spent[phase]`, and returns them."""

    def __init__(self, device: torch.device):
        self.device, self.spent, self.last = device, {}, time.perf_counter()

    def __call__(self, phase: str) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        elapsed, self.last = max(1e-9, now - self.last), now  # a clock may stand still
        self.spent[phase] = self.spent.get(phase, 0.0) + elapsed
        return elapsed


@torch.no_grad()
def seconds_a_row(weights: list[torch.Tensor], rows: int) -> float:
    """Seconds per row of the products with all weights, one after another as in a model: a few would stay in the cache.

    `rows` are multiplied at once, and the best of five runs counts.
    """
    device, inputs = weights[0].device, {w.shape[1]: torch.randn_like(w[:1].expand(rows, -1)) for w in weights}

    def run():
        for weight in weights:
            F.linear(inputs[weight.shape[1]], weight)

    if device.type == "cuda":  # as a graph, so that the time to launch kernels does not count
        run()
        graph, eager = torch.cuda.CUDAGraph(), run
        with torch.cuda.graph(graph):
            eager()
        run = graph.replay
    clock, spent = Clock(device), []
    for _ in range(5):
        run()
        spent.append(clock("run"))
    return min(spent) / rows


def copy_rate(device: torch.device) -> float:
    """Bytes per second that a copy within the device's memory reads and writes: the best of five."""
    source = torch.zeros(2**31 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target, clock, spent = source.clone(), Clock(device), []
    for _ in range(5):
        target.copy_(source)
        spent.append(clock("copy"))
    return 2 * source.nbytes / min(spent)


def facts(device: torch.device) -> dict:
    """Where and when something is measured."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine()
    return {"date": time.strftime("%Y-%m-%d %H:%M"), "device": name, "threads": torch.get_num_threads(),
            "memory, GB": round(torch.cuda.get_device_properties(device).total_memory / 1e9) if cuda else None,
            "torch": str(torch.__version__), "CUDA": torch.version.cuda}  # fmt: skip


def peak_memory(device: torch.device) -> float:
    """Peak memory in GB: of this process, or on CUDA of its tensors."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")  # on Linux ru_maxrss starts at what the parent process held
    if status.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(found[1]) * 1024 / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
