"""LoRA by hand (Hu et al. 2106.09685): small trained matrices beside frozen weights, never merged into them.

    y = W x + (alpha / r) · B A x,   A (r, in) random, B (out, r) zero at first, both fp32

Usually a few per cent of the weights are trained, and the sampler and the trainer share the frozen weights. They are
not merged, because adding the update to bf16 weights and subtracting it again would drift. The reference model of a KL
is the same model `without` its adapters.

q, k and v are one matrix here (model.py), and so are gate and up. In files each has its own A and B, as PEFT writes
them. model.load and model.save read and write PEFT adapters with the functions below.
"""

import contextlib
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from run import reading
from run.hub import cache

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRA(nn.Module):
    """A frozen linear layer and the updates of some of its parts."""

    def __init__(self, base: nn.Linear, rows: dict[str, int], targets, rank: int, scale: float):
        """rows: the number of output rows of each part, in order. The parts in `targets` get an update, times scale."""
        super().__init__()
        self.base, self.rows, self.scale, self.on = base.requires_grad_(False), rows, scale, True
        kind = dict(dtype=torch.float32, device=base.weight.device)
        self.A = nn.ParameterDict({part: torch.zeros(rank, base.in_features, **kind) for part in targets})
        self.B = nn.ParameterDict({part: torch.zeros(rows[part], rank, **kind) for part in targets})
        self.stacked = None  # see `stack`

    def forward(self, x: Tensor) -> Tensor:  # (…, in) -> (…, out)
        if not self.on:
            return self.base(x)
        # One product with the A of all parts, and one with their B, each in its own rows and columns. The second adds
        # to the output in place.
        A = torch.cat([self.A[p] for p in self.rows if p in self.A])  # (parts · r, in)
        B = torch.block_diag(*(self.B[p] if p in self.B else x.new_zeros(n, 0) for p, n in self.rows.items()))
        flat = x.flatten(0, -2)
        y = self.base(flat).addmm_(flat @ A.to(x.dtype).T, B.to(x.dtype).T, alpha=self.scale)
        return y.view(*x.shape[:-1], -1)

    def decode(self, x: Tensor) -> Tensor:  # (R, in) -> (R, out), without bias
        """`forward` in two products, with the adapters as they were in the last call of `stack`."""
        weight, B = self.stacked
        y, low = F.linear(x, weight).split((len(B), B.shape[1]), -1)
        return y.addmm_(low, B.T)


def attach(network: nn.Module, rank: int, alpha: float, targets=TARGETS, seed: int = 0) -> nn.Module:
    """Freezes a Transformer and puts adapters beside `targets` in its blocks, in place; at first without effect.

    targets: q_proj is that layer of every block, layers.0.self_attn.q_proj that of one block.
    """
    layers = {name.rpartition(".")[0] for name in network.named_tensors()}
    layers = {layer for layer in layers if layer.rpartition(".")[2] in TARGETS}
    if unknown := sorted(set(targets) - layers - set(TARGETS)):
        raise ValueError(f"no layer is called {unknown[0]!r}; there are {', '.join(TARGETS)}")
    generator, network = torch.Generator().manual_seed(seed), network.requires_grad_(False)
    for i, block in enumerate(network.layers):
        for path in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
            place, _, name = path.partition(".")
            parent, base = block.get_submodule(place), block.get_submodule(path)
            rows = network.config.fused.get(name, {name: base.out_features})
            if some := [part for part in rows if {part, f"layers.{i}.{place}.{part}"} & set(targets)]:
                adapter = LoRA(base, rows, some, rank, alpha / rank)
                for a in adapter.A.values():  # as PEFT draws them: uniform within 1 / √in
                    a.data.copy_((torch.rand(a.shape, generator=generator) * 2 - 1) / math.sqrt(base.in_features))
                setattr(parent, name, adapter)
    return network


def adapters(network: nn.Module) -> list[LoRA]:
    return [module for module in network.modules() if isinstance(module, LoRA)]


@contextlib.contextmanager
def without(network: nn.Module):
    """Turns the adapters of a network off inside a `with`."""
    try:
        for adapter in adapters(network):
            adapter.on = False
        yield
    finally:
        for adapter in adapters(network):
            adapter.on = True


def stack(network: nn.Module) -> None:
    """Prepares adapters for `LoRA.decode`. Call it again after they have changed; the addresses stay the same.

    In each layer A of all parts lies below W in one matrix (out + n, in), and B is block-diagonal and scaled (out, n),
    both in W's dtype. Rows and columns beyond parts · r are zero, so that 16 divides out + n. W is moved, not copied.
    """
    with torch.inference_mode(False), torch.no_grad():  # the weights are for training too
        for adapter in adapters(network):
            weight, out, scale = adapter.base.weight, len(adapter.base.weight), adapter.scale * adapter.on
            if not adapter.stacked or adapter.stacked[0].data_ptr() != weight.data_ptr():
                n = -(out + sum(map(len, adapter.A.values()))) // 16 * -16 - out
                whole = torch.cat((weight, weight.new_zeros(n, weight.shape[1])))
                adapter.stacked, weight.data = (whole, weight.new_zeros(out, n)), whole[:out]
            row, column, (whole, wide) = 0, out, adapter.stacked
            for part, rows in adapter.rows.items():
                if part in adapter.A:
                    a, b = adapter.A[part], adapter.B[part]
                    whole[column : column + len(a)] = a
                    wide[row : row + rows, column - out : column - out + len(a)] = b * scale
                    column += len(a)
                row += rows


def peft_tensors(network: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors under the names of PEFT's files."""
    pattern = re.compile(r"(.+)\.\w+\.([AB])\.(\w+)")  # layers.0.mlp.gate_up_proj.A.up_proj
    found = ((pattern.fullmatch(name), weight.data) for name, weight in network.named_parameters())
    return {f"base_model.model.model.{m[1]}.{m[3]}.lora_{m[2]}.weight": weight for m, weight in found if m}


def peft_config(network: nn.Module) -> dict:
    """adapter_config.json of a network with adapters."""
    some, base = adapters(network), network.source
    rank = next(iter(some[0].A.values())).shape[0]
    layers = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in peft_tensors(network)}
    short = {layer.rpartition(".")[2] for layer in layers}  # these names are enough where every block has them
    targets = short if len(layers) == len(short) * len(network.layers) else layers
    repo, above, commit = ("", "", *base.resolve().parts)[-3:]  # in the hub's cache a model has an id and a revision
    hub = above == "snapshots" and repo.startswith("models--") and base.resolve().parents[2] == cache().resolve()
    name = repo.removeprefix("models--").replace("--", "/") if hub else str(base.resolve())
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": name,
        "revision": commit if hub else None, "r": rank,
        "lora_alpha": some[0].scale * rank, "target_modules": sorted(targets),
        "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "use_rslora": False, "inference_mode": True,
    }  # fmt: skip


# Of adapter_config.json: keys with the values that are implemented, and keys that `read` handles or that do not matter.
# Every other key must be null, false or empty.
IMPLEMENTED = {"task_type": ("CAUSAL_LM",), "bias": ("none",), "init_lora_weights": (True, "gaussian")}
FREE = ("peft_type base_model_name_or_path revision r lora_alpha target_modules exclude_modules use_rslora "
        "peft_version auto_mapping inference_mode lora_dropout megatron_core qalora_group_size").split()  # fmt: skip


def read(network: nn.Module, folder: Path) -> nn.Module:
    """Attaches the PEFT adapter in a folder to its base; ValueError for what is not implemented or does not match."""
    settings, file = reading.read_json(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
    if settings.take("peft_type", str) != "LORA":
        settings.refuse("peft_type", "LORA")
    for key, value in settings.items():
        neutral = value is False or value in (None, "", [], {}) or value in IMPLEMENTED.get(key, ())
        if key not in FREE and not neutral:
            raise ValueError(f"{settings.where} asks for {key} {value!r}, which is not implemented; merge it with PEFT")
    rank, alpha = settings.take("r", int, above=0, most=2**16), settings.take("lora_alpha", float, above=0)
    if settings.take("use_rslora", bool, False):
        alpha *= rank**0.5
    attach(network, rank, alpha, targets_of(settings, network))
    if not file.exists() and (folder / "adapter_model.bin").exists():
        raise ValueError(f"{folder}: adapter_model.bin is a pickle, which is not read; convert it with PEFT")
    places, seen = peft_tensors(network), set()
    unlike = "unlike target_modules and exclude_modules in adapter_config.json; fetch both again"

    def place_of(name: str, _) -> Tensor:
        if name not in places:
            raise ValueError(f"{file} holds {name}, {unlike}")
        seen.add(name)
        return places[name]

    reading.copy_tensors(file, place_of)
    if missing := sorted(places.keys() - seen):
        raise ValueError(f"{file} lacks {missing[0]}, {unlike}")
    return network


def targets_of(settings: reading.Record, network: nn.Module) -> set[str]:
    """The layers that target_modules names and exclude_modules does not, matched as PEFT matches them."""
    names = {"model." + name.rpartition(".")[0] for name in network.named_tensors()} - {"model.lm_head"} | {"lm_head"}
    known = {name for name in names if name.rpartition(".")[2] in TARGETS}
    names |= {name[:dot] for name in names for dot, letter in enumerate(name) if letter == "."}

    def matching(key: str, default) -> set[str]:
        wanted = settings.take(key, str | list[str], default)
        if isinstance(wanted, list):
            return {name for name in names if f".{name}".endswith(tuple(f".{end}" for end in wanted))}
        if key == "target_modules" and wanted.lower() == "all-linear":
            return known
        try:
            return {name for name in names if re.fullmatch(wanted, name)}
        except re.error as error:
            settings.refuse(key, f"a list or a regular expression ({error}), {reading.short(wanted)}")

    chosen = matching("target_modules", reading.MUST) - matching("exclude_modules", [])
    if odd := sorted(chosen - known):
        raise ValueError(f"{settings.where}: adapters of {odd[0]} are not implemented; merge it with PEFT")
    if not chosen:
        settings.refuse("target_modules", f"names of the base's layers, such as {', '.join(TARGETS)}")
    return {name.removeprefix("model.") for name in chosen}
