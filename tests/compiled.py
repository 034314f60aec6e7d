"""Compiles the kernels of a decode step for GPUs that are not here, at the sizes of Llama-3.1-8B in bf16.

The step runs on tensors without data, where each launch is written down instead of carried out. Each kind of launch is
compiled with the arguments it was given, and ptxas says what the kernel needs. test_kernels.py reads the output.

    python tests/compiled.py [sm ...]      JSON: launches of a step, and per kernel registers, spilled bytes, …
"""

import collections
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

torch.version.cuda = torch.version.cuda or "none here"  # otherwise kernels.py would not import Triton
sys.path.insert(0, str(Path(__file__).parent.parent))

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

import kernels  # noqa: E402
import model as models  # noqa: E402
import rollout  # noqa: E402
from run import lora  # noqa: E402

TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64", torch.bool: "*i1"}
NAMES = [name for name in vars(kernels) if name.endswith("_kernel")]


class Count(TorchDispatchMode):
    """Counts torch's operations that launch a kernel: all but views and empty tensors."""

    def __init__(self):
        super().__init__()
        self.seen = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.seen[name] += not func.is_view and "empty" not in name
        return func(*args, **(kwargs or {}))


class Noted:
    """In place of a kernel: kernel[grid](...) is written down."""

    def __init__(self, kernel, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((self.kernel, grid, args, options))


QWEN2 = {
    "model_type": "qwen2",
    "num_hidden_layers": 1,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "vocab_size": 151936,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "tie_word_embeddings": True,
}  # of 0.5B


def launches(P: int, G: int, rank: int, shape: dict | None = None, step: str = "fused_step") -> tuple[list, dict]:
    """The launches of Triton's kernels in a step, and the number of torch's operations by name."""
    raw, noted = json.loads((Path(kernels.__file__).parent / "configs" / "llama-3.1-8b.json").read_text()), []
    raw, T, N = raw | (shape or {}) | ({"rope_scaling": None} if shape else {}), 448, 200
    with torch.device("meta"):
        network = models.Transformer(models.Config.from_json(raw), torch.bfloat16)
        if rank:
            lora.attach(network, rank, 2.0 * rank)
            lora.stack(network)
        slots = rollout.Slots(network.config, P, G, T, N, "meta", network.dtype)
        end = torch.tensor([1, 2, 3], device="meta")
    held = {name: getattr(kernels, name) for name in NAMES}
    for name, kernel in held.items():
        setattr(kernels, name, Noted(kernel, noted))
    with torch.inference_mode(), Count() as count:
        getattr(rollout, step)(network, slots, end, P, P * G, T, N)
    for name, kernel in held.items():
        setattr(kernels, name, kernel)
    return noted, dict(+count.seen)


def source(kernel, args: tuple, options: dict) -> ASTSource:
    """What Triton makes of a launch: the type of each argument, constants, and which are multiples of 16."""
    given, signature, constants, aligned = dict(zip(kernel.arg_names, args, strict=False)) | options, {}, {}, {}
    for i, param in enumerate(kernel.params):
        value = given[param.name]
        if param.is_constexpr or value is None:
            signature[param.name], constants[param.name] = "constexpr", value
        else:
            kind = TYPES[value.dtype] if isinstance(value, torch.Tensor) else "fp32"
            signature[param.name] = "i32" if isinstance(value, int) else kind
            if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
                aligned[(i,)] = [["tt.divisibility", 16]]  # torch allocates so, and offsets into caches are multiples
    return ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)


def measure(src: ASTSource, options: dict, sm: int) -> dict:
    compiled = triton.compile(src, target=GPUTarget("cuda", sm, 32), options=options)
    ptx, name = compiled.asm["ptx"], f"sm_{sm}" + "a" * (sm >= 90)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(sm).path, "-v", f"--gpu-name={name}", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    known = {"registers": r"Used (\d+) registers", "spilled": r"(\d+) bytes spill stores",
             "stack": r"(\d+) bytes stack frame"}  # fmt: skip
    numbers = {what: int(re.search(pattern, said)[1]) for what, pattern in known.items()}
    return numbers | {"shared": compiled.metadata.shared, "warps": compiled.metadata.num_warps,
                      "wide loads": len(re.findall(r"ld\.global\S*\.v4|cp\.async\S* \[[^]]*\], \[[^]]*\], 0x10", ptx)),
                      "loads": len(re.findall(r"ld\.global|cp\.async\.c[ag]", ptx)),
                      "mma": ptx.count("mma.sync") + ptx.count("wgmma.mma_async.sync.aligned")}  # fmt: skip


def main(targets: list[str]) -> None:
    seen, result = {}, {"launches": {}, "kernels": []}
    for P, G, rank, *shape in ((16, 8, 0), (32, 16, 0), (16, 8, 16), (32, 16, 0, QWEN2)):
        noted, torchs = launches(P, G, rank, *shape)
        rows = f"{P} x {G}" + " of Qwen2" * bool(shape)
        result["launches"][f"{rows}, rank {rank}"] = {"triton": len(noted), "torch": torchs}
        for kernel, grid, args, options in noted:
            src = source(kernel, args, options)
            options = {k: v for k, v in options.items() if k not in kernel.arg_names}
            seen.setdefault(f"{kernel.__name__} {src.hash()}", (kernel.__name__, rows, grid, src, options))
    result["plain"] = sum(launches(16, 8, 0, step="decode_step")[1].values())
    for name, rows, grid, src, options in seen.values():
        for sm in map(int, targets or ("80", "90")):
            numbers = measure(src, options, sm)
            result["kernels"].append({"kernel": name, "sm": sm, "rows": rows, "grid": grid, **numbers})
            print(*result["kernels"][-1].values(), file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
