"""What this machine can do: seconds, rates of matrix products and of reading memory, memory used; made-up prompts."""

import platform
import re
import resource
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import model as models

TEXT = """A woman in a green coat waits at the corner while two boys carry a long wooden ladder past the bakery . The
street is wet , it rained all morning , and a delivery van blocks half of the road . Somebody laughs behind an open
window . Is it true that the boys know the woman ? Say first what speaks for it , then what speaks against it ."""


def make_prompts(tokenizer: models.Tokenizer, count: int, length: int) -> list[list[int]]:
    """Chat prompts of about `length` tokens each, from 16 % shorter to 16 % longer, all different."""
    words, prompts = TEXT.split(), []
    for i in range(count):
        target = round(length * (0.84 + 0.32 * i / max(1, count - 1)))
        turned, prompt = words[i % len(words) :] + words[: i % len(words)], []
        for n in range(1, target):
            text = " ".join((turned * (n // len(turned) + 1))[:n])
            longer = tokenizer.encode(tokenizer.render([{"role": "user", "content": text}]))
            if prompt and len(longer) > target:
                break
            prompt = longer
        prompts.append(prompt)
    return prompts


def seconds(work, device: torch.device) -> float:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    started = now()
    work()
    return now() - started


def repeated(work, device: torch.device):
    """`work` to be run again and again: on CUDA as a graph, so that no launch is timed."""
    if device.type != "cuda":
        return work
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def product_rate(config: models.Config, rows: int, device, dtype, head: bool) -> tuple[float, float]:
    """(seconds, operations) of a layer's products with `rows` rows, times the layers, and the head's; best of five."""
    E, M, D = config.hidden_size, config.intermediate_size, config.head_dim
    H, K = config.heads * D, config.kv_heads * D
    shapes = [(H + 2 * K, E), (E, H), (2 * M, E), (E, M)]
    total, operations = 0.0, 0.0
    for n, (out, inner) in [(config.layers, s) for s in shapes] + ([(1, (config.vocab_size, E))] if head else []):
        x = torch.randn(rows, inner, device=device, dtype=dtype)
        # One weight after another, as in a model: a few alone would stay in the processor's cache.
        some = min(n, max(1, int(2e9 / (out * inner * 4))))
        weights = [torch.randn(out, inner, device=device, dtype=dtype) for _ in range(some)]
        enough = 2e9 if device.type == "cpu" else 5e11  # operations that take a millisecond or more
        repeats = min(max(1, round(enough / (2 * rows * out * inner * len(weights)))), max(1, 2000 // len(weights)))

        def products():
            for _ in range(repeats):  # noqa: B023
                for weight in weights:  # noqa: B023
                    F.linear(x, weight)  # noqa: B023

        run = repeated(products, device)
        best = min(seconds(run, device) for _ in range(5)) / repeats / len(weights)
        total, operations = total + n * best, operations + n * 2.0 * rows * out * inner
    return total, operations


def read_rate(device) -> float:
    """Bytes per second at which memory is read, best of five."""
    x = torch.ones(2**26 if device.type == "cpu" else 2**28, device=device)  # 256 MiB or 1 GiB: no cache holds it
    return x.nbytes / min(seconds(x.sum, device) for _ in range(5))


def random_network(path: str, device: torch.device) -> models.Transformer:
    """A network of the folder's config with weights drawn at random: for what hangs on sizes only."""
    network, generator = models.empty(models.locate(path), device), torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.02, generator=generator)
            else:
                weight.fill_(not name.endswith("bias"))
    return network


def peak_memory(device: torch.device) -> float:
    """GB: of this process since it began, on CUDA of its tensors."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")  # on Linux, where ru_maxrss begins at what the parent held
    if status.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(found[1]) * 1024 / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def introduce(network: models.Transformer, prompts: list[list[int]], samples: int, new: int) -> str:
    """Prints what is measured and where; returns the device's name."""
    cuda = network.device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {network.dtype}")
    sizes = f"{len(prompts)} prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens"
    print(f"{sizes}, {samples} samples each, at most {new} new tokens, T = 1")
    return name
