"""LoRA by hand (Hu et al. 2106.09685): small trained matrices beside frozen weights, never merged into them.

    y = W x + (alpha / r) · B A x,   A (r, in) random, B (out, r) zero at first, both fp32

An update changes a few per cent of the numbers or fewer, and the sampler and the trainer share the frozen weights.
Adding the update to bf16 weights and subtracting it again would drift. The reference model of a KL is the same model
`without` its adapters.

q, k and v are one matrix here (model.py), and so are gate and up; in files each has its own A and B, as PEFT writes
them. model.load and model.save read and write PEFT adapters with the functions below.
"""

import contextlib
import math
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from run import files

# The fused layers of a block and their parts, in the order of their rows.
LAYERS = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "self_attn.o_proj": ("o_proj",),
          "mlp.gate_up_proj": ("gate_proj", "up_proj"), "mlp.down_proj": ("down_proj",)}  # fmt: skip
TARGETS = tuple(part for parts in LAYERS.values() for part in parts)


class LoRA(nn.Module):
    """A frozen linear layer and the updates of some of its parts."""

    def __init__(self, base: nn.Linear, rows: dict[str, int], targets, rank: int, scale: float):
        """rows: the output rows of each part, in order; the parts in `targets` get an update, scaled by `scale`."""
        super().__init__()
        self.base, self.rows, self.scale, self.on = base.requires_grad_(False), rows, scale, True
        kind = dict(dtype=torch.float32, device=base.weight.device)
        self.A = nn.ParameterDict({p: nn.Parameter(torch.zeros(rank, base.in_features, **kind)) for p in targets})
        self.B = nn.ParameterDict({p: nn.Parameter(torch.zeros(rows[p], rank, **kind)) for p in targets})

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
    """Freezes a Transformer and puts adapters beside the `targets` of each block, in place; they change nothing yet."""
    if unknown := set(targets) - set(TARGETS):
        raise ValueError(f"no layer is called {sorted(unknown)[0]!r}; there are {', '.join(TARGETS)}")
    generator, sizes = torch.Generator().manual_seed(seed), network.config.part_rows
    network.requires_grad_(False)
    for block in network.layers:
        for path, parts in LAYERS.items():
            if some := [part for part in parts if part in targets]:
                parent, name = path.split(".")
                base = getattr(getattr(block, parent), name)
                rows = {part: sizes.get(part, base.out_features) for part in parts}
                adapter = LoRA(base, rows, some, rank, alpha / rank)
                for a in adapter.A.values():  # as PEFT draws them: uniform within 1 / √in
                    drawn = torch.rand(a.shape, generator=generator) * 2 - 1
                    a.data.copy_(drawn / math.sqrt(base.in_features))
                setattr(getattr(block, parent), name, adapter)
    return network


def adapters(network: nn.Module) -> list[LoRA]:
    return [module for module in network.modules() if isinstance(module, LoRA)]


@contextlib.contextmanager
def without(network: nn.Module):
    """The network without its adapters, for a while."""
    some = adapters(network)
    for adapter in some:
        adapter.on = False
    try:
        yield
    finally:
        for adapter in some:
            adapter.on = True


# ---- PEFT's files ----------------------------------------------------------------------------------------------


def peft_tensors(network: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors under PEFT's names."""
    tensors = {}
    for i, block in enumerate(network.layers):
        for path in LAYERS:
            parent, name = path.split(".")
            layer = getattr(getattr(block, parent), name)
            for letter, parts in (("A", layer.A), ("B", layer.B)) if isinstance(layer, LoRA) else ():
                for part, tensor in parts.items():
                    tensors[f"base_model.model.model.layers.{i}.{parent}.{part}.lora_{letter}.weight"] = tensor.data
    return tensors


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
    settings, file = files.read_json(folder / "adapter_config.json"), f"{folder}: adapter_config.json"
    allowed = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, False, "gaussian")}
    refused = ("use_rslora", "use_dora", "use_qalora", "fan_in_fan_out", "modules_to_save", "rank_pattern",
               "alpha_pattern", "layers_to_transform", "layer_replication", "target_parameters",
               "alora_invocation_tokens", "lora_bias")  # fmt: skip
    for key, values in (allowed | dict.fromkeys(refused, ())).items():
        if settings.get(key) and settings[key] not in values:
            raise ValueError(f"{file} asks for {key} {settings[key]!r}, which is not implemented; merge it with PEFT")
    base, rank, alpha, targets = (
        settings.get(key) for key in ("base_model_name_or_path", "r", "lora_alpha", "target_modules")
    )
    for key, good in (
        ("base_model_name_or_path", isinstance(base, str) and bool(base)),
        ("r", isinstance(rank, int) and rank >= 1),
        ("lora_alpha", isinstance(alpha, int | float) and 0 < alpha < math.inf),
        ("target_modules", isinstance(targets, list) and bool(targets) and all(isinstance(t, str) for t in targets)),
    ):
        if not good:
            raise ValueError(f"{file}: {key} cannot be {settings.get(key)!r}; correct it, or fetch the adapter again")
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
        if found[name].shape != place.shape:
            raise ValueError(
                f"{folder}: {name} has shape {tuple(found[name].shape)}, not {tuple(place.shape)}; fetch both again"
            )
        place.copy_(found[name])
