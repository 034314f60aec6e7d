"""LoRA by hand (Hu et al. 2106.09685): small trained matrices beside frozen weights, never merged into them.

    y = W x + (alpha / r) · B A x,   A (r, in) random, B (out, r) zero at first, both fp32

So a step changes, and AdamW remembers, a few per cent of the numbers or less, and sampler and trainer share the one
copy of the frozen weights. Added to bf16 weights and taken off again, updates would drift; unmerged they cannot. The
reference model of a KL is the same model `without` its adapters.

q, k and v are one matrix here (model.py), as are gate and up; in files each has its A and B, as PEFT writes them.
`save` writes a PEFT adapter, `load` reads one; PEFT and transformers read it too.
"""

import contextlib
import json
import math
import shutil
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

import model as models
from chat import read_json
from run.files import whole_folder

# In each block, the fused layers and what they hold, in the order of their rows.
LAYERS = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "self_attn.o_proj": ("o_proj",),
          "mlp.gate_up_proj": ("gate_proj", "up_proj"), "mlp.down_proj": ("down_proj",)}  # fmt: skip
TARGETS = tuple(part for parts in LAYERS.values() for part in parts)


class LoRA(nn.Module):
    """A frozen linear layer and the updates of some of its parts."""

    def __init__(self, base: nn.Linear, rows: dict[str, int], targets, rank: int, scale: float):
        """rows: the output rows of each part, in order; those in `targets` get an update, scaled by `scale`."""
        super().__init__()
        self.base, self.rows, self.scale, self.on = base.requires_grad_(False), rows, scale, True
        some = dict(dtype=torch.float32, device=base.weight.device)
        self.A = nn.ParameterDict({p: nn.Parameter(torch.zeros(rank, base.in_features, **some)) for p in targets})
        self.B = nn.ParameterDict({p: nn.Parameter(torch.zeros(rows[p], rank, **some)) for p in targets})

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if not self.on:
            return y
        # One product for the A of all parts; each part's B then adds to its rows.
        low = (x @ torch.cat(list(self.A.values())).to(x.dtype).T * self.scale).split(
            [a.shape[0] for a in self.A.values()], -1
        )
        updates = {part: z @ b.to(x.dtype).T for z, (part, b) in zip(low, self.B.items(), strict=True)}
        pieces = y.split(list(self.rows.values()), -1)
        pairs = zip(self.rows, pieces, strict=True)
        return torch.cat([piece + updates[part] if part in updates else piece for part, piece in pairs], -1)


def attach(network: models.Transformer, rank: int, alpha: float, targets=TARGETS, seed: int = 0) -> models.Transformer:
    """Freezes the network and puts adapters beside the `targets` of every block, in place; they change nothing yet."""
    if unknown := set(targets) - set(TARGETS):
        raise ValueError(f"no layer is called {sorted(unknown)[0]!r}; there are {', '.join(TARGETS)}")
    c, generator = network.config, torch.Generator().manual_seed(seed)
    sizes = {"q_proj": c.heads * c.head_dim, "k_proj": c.kv_heads * c.head_dim, "v_proj": c.kv_heads * c.head_dim,
             "gate_proj": c.intermediate_size, "up_proj": c.intermediate_size}  # fmt: skip
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


def adapters(network: models.Transformer) -> list[LoRA]:
    return [module for module in network.modules() if isinstance(module, LoRA)]


@contextlib.contextmanager
def without(network: models.Transformer):
    """The network as it was before `attach`, for a while."""
    some = adapters(network)
    for adapter in some:
        adapter.on = False
    try:
        yield
    finally:
        for adapter in some:
            adapter.on = True


def named(network: models.Transformer) -> dict[str, Tensor]:
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


def name_of(folder: Path) -> str:
    """How others find the base: the hub id where `folder` lies in the hub's cache, else its absolute path."""
    hub = [part for part in folder.parts if part.startswith("models--")]
    return hub[-1].removeprefix("models--").replace("--", "/") if hub else str(folder.resolve())


def save(network: models.Transformer, path: str | Path, card: str = "", also=()) -> None:
    """Writes a PEFT adapter of the model that the network was loaded from, with its tokenizer; whole or not at all.

    also: (name, text) of further files in it.
    """
    some = adapters(network)
    rank = next(iter(some[0].A.values())).shape[0]
    tensors = {name: tensor.cpu().contiguous() for name, tensor in named(network).items()}
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": name_of(network.source), "r": rank,
        "lora_alpha": some[0].scale * rank, "target_modules": sorted({part for a in some for part in a.A}),
        "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "use_rslora": False, "inference_mode": True,
    }  # fmt: skip
    with whole_folder(path) as partial:
        models.write_tensors(tensors, partial / "adapter_model.safetensors")
        (partial / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        for name in models.COMPANIONS:
            if (network.source / name).exists():
                shutil.copyfile(network.source / name, partial / name)
        (partial / "README.md").write_text(card or "A LoRA adapter saved by faith's lora.save.\n")
        for name, text in also:
            (partial / name).write_text(text)


def load(folder: Path, device="cpu", dtype: torch.dtype | None = None) -> models.Transformer:
    """The base model that a PEFT adapter names, with the adapter beside it. ValueError for what cannot be done here."""
    settings, file = read_json(folder / "adapter_config.json"), f"{folder}: adapter_config.json"
    plain = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, False, "gaussian")}
    for key in ("use_rslora", "use_dora", "use_qalora", "fan_in_fan_out", "modules_to_save", "rank_pattern",
                "alpha_pattern", "layers_to_transform", "layer_replication", "target_parameters",
                "alora_invocation_tokens", "lora_bias"):  # fmt: skip
        plain[key] = ()
    for key, fine in plain.items():
        if settings.get(key) and settings[key] not in fine:
            raise ValueError(f"{file} asks for {key} {settings[key]!r}, which is not done here; merge it with PEFT")
    base, rank, alpha, targets = (
        settings.get(key) for key in ("base_model_name_or_path", "r", "lora_alpha", "target_modules")
    )
    for key, good in (
        ("base_model_name_or_path", isinstance(base, str) and bool(base)),
        ("r", isinstance(rank, int) and rank >= 1),
        ("lora_alpha", isinstance(alpha, (int, float)) and 0 < alpha < math.inf),
        ("target_modules", isinstance(targets, list) and bool(targets) and all(isinstance(t, str) for t in targets)),
    ):
        if not good:
            raise ValueError(f"{file}: {key} cannot be {settings.get(key)!r}; mend it, or fetch the adapter again")
    if (models.locate(base) / "adapter_config.json").exists():
        raise ValueError(f"{file}: its base {base} is an adapter too; merge that into its own base first, with PEFT")
    network = attach(models.load(base, device, dtype), rank, alpha, targets)
    places = named(network)
    try:
        found = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{folder / 'adapter_model.safetensors'} cannot be read ({error}); fetch it again") from None
    if odd := sorted(found.keys() ^ places.keys()):
        where = "holds" if odd[0] in found else "lacks"
        raise ValueError(f"{folder}: adapter_model.safetensors {where} {odd[0]}, against its config; fetch both again")
    for name, place in places.items():
        if found[name].shape != place.shape:
            raise ValueError(
                f"{folder}: {name} has shape {tuple(found[name].shape)}, not {tuple(place.shape)}; fetch both again"
            )
        place.copy_(found[name])
    return network
