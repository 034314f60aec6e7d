"""LoRA by hand (Hu et al. 2106.09685): small trained matrices beside frozen weights, never merged into them.

    y = W x + (alpha / r) · B A x,   A (r, in) random, B (out, r) zero at first, both fp32

At most a few per cent of the weights are trained, and the sampler and the trainer share the frozen weights. They are
not merged, because adding the update to bf16 weights and subtracting it again would drift. The reference model of a KL
is the same model `without` its adapters.

q, k and v are one matrix here (model.py), and so are gate and up. In files each has its own A and B, as PEFT writes
them. model.load and model.save read and write PEFT adapters with the functions below.
"""

import contextlib
import math
import re
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from run import reading

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

    def forward(self, x: Tensor) -> Tensor:  # (…, in) -> (…, out)
        y = self.base(x)
        if not self.on:
            return y
        # The A of all parts in one product (…, parts · r); then each B adds to the rows of its part.
        A = torch.cat(list(self.A.values())).to(x.dtype)
        low = (x @ A.T * self.scale).split([a.shape[0] for a in self.A.values()], -1)
        updates = {part: z @ b.to(x.dtype).T for z, (part, b) in zip(low, self.B.items(), strict=True)}
        pieces = zip(self.rows, y.split(list(self.rows.values()), -1), strict=True)
        return torch.cat([piece + updates[part] if part in updates else piece for part, piece in pieces], -1)


def attach(network: nn.Module, rank: int, alpha: float, targets=TARGETS, seed: int = 0) -> nn.Module:
    """Freezes a Transformer and puts adapters beside `targets` in its blocks, in place; at first without effect."""
    if unknown := sorted(set(targets) - set(TARGETS)):
        raise ValueError(f"no layer is called {unknown[0]!r}; there are {', '.join(TARGETS)}")
    generator, network = torch.Generator().manual_seed(seed), network.requires_grad_(False)
    for block in network.layers:
        attention, mlp = block.self_attn, block.mlp
        for parent, name in ((attention, "qkv_proj"), (attention, "o_proj"), (mlp, "gate_up_proj"), (mlp, "down_proj")):
            base = getattr(parent, name)
            rows = network.config.fused.get(name, {name: base.out_features})
            if some := [part for part in rows if part in targets]:
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


def peft_tensors(network: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors under the names of PEFT's files."""
    pattern = re.compile(r"(.+)\.\w+\.([AB])\.(\w+)")  # layers.0.mlp.gate_up_proj.A.up_proj
    found = ((pattern.fullmatch(name), weight.data) for name, weight in network.named_parameters())
    return {f"base_model.model.model.{m[1]}.{m[3]}.lora_{m[2]}.weight": weight for m, weight in found if m}


def peft_config(network: nn.Module) -> dict:
    """adapter_config.json of a network with adapters."""
    some, base = adapters(network), network.source
    rank = next(iter(some[0].A.values())).shape[0]
    hub = [part for part in base.parts if part.startswith("models--")]  # a model in the hub's cache is known by its id
    name = hub[-1].removeprefix("models--").replace("--", "/") if hub else str(base.resolve())
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": name, "r": rank,
        "lora_alpha": some[0].scale * rank, "target_modules": sorted({part for a in some for part in a.A}),
        "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "use_rslora": False, "inference_mode": True,
    }  # fmt: skip


def read_config(folder: Path) -> tuple[str, int, float, list[str]]:
    """(base model, rank, alpha, targets) of a PEFT adapter; ValueError for what is not implemented here."""
    settings, file = reading.read_json(folder / "adapter_config.json"), f"{folder}: adapter_config.json"
    known = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, False, "gaussian")}
    refused = ("use_rslora use_dora use_qalora fan_in_fan_out modules_to_save rank_pattern alpha_pattern lora_bias "
               "layers_to_transform layer_replication target_parameters alora_invocation_tokens").split()  # fmt: skip
    for key in (*known, *refused):
        if settings.get(key) and settings[key] not in known.get(key, ()):
            raise ValueError(f"{file} asks for {key} {settings[key]!r}, which is not implemented; merge it with PEFT")
    keys = ("base_model_name_or_path", "r", "lora_alpha", "target_modules")
    base, rank, alpha, targets = values = [settings.get(key) for key in keys]
    right = (isinstance(base, str) and base, isinstance(rank, int) and rank >= 1,
             isinstance(alpha, int | float) and 0 < alpha < math.inf,
             isinstance(targets, list) and targets and all(isinstance(t, str) for t in targets))  # fmt: skip
    for key, value, good in zip(keys, values, right, strict=True):
        if not good:
            raise ValueError(f"{file}: {key} cannot be {value!r}; correct it, or fetch the adapter again")
    return base, rank, alpha, targets


def read_tensors(network: nn.Module, folder: Path) -> None:
    """Copies adapter_model.safetensors into the adapters; ValueError where the two do not match."""
    places, file = peft_tensors(network), folder / "adapter_model.safetensors"
    try:
        found = safetensors.torch.load_file(file)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{file} cannot be read ({error}); fetch it again") from None
    if odd := sorted(found.keys() ^ places.keys()):
        verb = "holds" if odd[0] in found else "lacks"
        raise ValueError(f"{folder}: adapter_model.safetensors {verb} {odd[0]}, unlike its config; fetch both again")
    for name, place in places.items():
        if (shape := tuple(found[name].shape)) != (wanted := tuple(place.shape)):
            raise ValueError(f"{folder}: {name} has shape {shape}, not {wanted}; fetch both again")
        place.copy_(found[name])
