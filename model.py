"""Llama and Qwen by hand: one decoder-only Transformer and its files.

Llama 3 / 3.1 / 3.2 (SmolLM2 is one) and Qwen 2 / 2.5 / 3 (dense) are the same network

    x = embed(tokens);   x += attention(norm(x));   x += mlp(norm(x));   logits = head(norm(x))

except for five switches, which config.json sets and `Config` holds: the RoPE scaling, RMSNorm on each head's q and k
(Qwen3), a bias on q, k and v (Qwen2), a head tied to the embedding, and a head_dim that may differ from hidden / heads.
A config that asks for anything else is refused (run/config.py).

Axes: B batch, T time, H heads, K key/value heads, D head dim, V vocabulary, E hidden size, M inner size of the MLP.
Sources: Touvron et al. 2302.13971, Llama-3 2407.21783 (RoPE scaling: Meta's llama-models), Qwen3 2505.09388. Tensors
and keys have the names of Hugging Face's files.

    python model.py DIR      prints what the files hold: family, switches, parameters, end-of-turn tokens
"""

from run import early  # noqa: F401

# isort: split
import contextlib
import json
import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from chat import Tokenizer
from run import lora
from run.config import switches
from run.files import whole_folder
from run.hub import base_of, locate, tokenizer_folder, weight_files
from run.progress import Parser, command
from run.reading import copy_tensors, read_json


@dataclass(frozen=True)
class Config:
    """The sizes and switches, from config.json. Lengths are in tokens."""

    family: str  # "llama", "qwen2" or "qwen3"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    context: int  # the longest prompt + completion
    tied: bool  # the head is the embedding
    qkv_bias: bool
    qk_norm: bool
    rope_theta: float
    rope_scaling: dict | None  # Llama-3.1's, or None
    end_of_turn: tuple[int, ...]  # every token that ends an answer
    raw: dict  # config.json as read; `save` writes it back

    @property
    def fused(self) -> dict[str, dict[str, int]]:
        """The two fused layers: their parts in order, each with its number of output rows."""
        q, kv, M = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.intermediate_size
        return {"qkv_proj": {"q_proj": q, "k_proj": kv, "v_proj": kv}, "gate_up_proj": {"gate_proj": M, "up_proj": M}}

    @classmethod
    def from_json(cls, raw: dict, generation: dict | None = None, where: str = "config.json") -> "Config":
        """The Config of a parsed config.json and generation_config.json. ValueError for anything not implemented."""
        return cls(**switches(raw, generation, where))


class RMSNorm(nn.RMSNorm):
    """x / rms(x) · weight over the last axis. fp32 inside, cast back *before* the weight, as Hugging Face does."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x, x.shape[-1:], None, self.eps)


def rope_frequencies(config: Config) -> Tensor:
    """Angular frequencies (D/2,) in radians per token, fp32. Llama-3.1's scaling lowers the low ones."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies, s = 1.0 / (config.rope_theta**exponent), config.rope_scaling
    if s is None:
        return frequencies
    turns = s["original_max_position_embeddings"] / (2 * math.pi / frequencies)  # within the original context
    # 0 below low_freq_factor turns (frequency divided by the factor), 1 above high_freq_factor (unchanged).
    smooth = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
    return (1 - smooth) * frequencies / s["factor"] + smooth * frequencies


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (B, ·, T, D); cos, sin (B, 1, T, D/2). Pairs d with d + D/2, as the weights expect."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def plain_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention within each row of a batch: q (B, H, T, D), k, v (B, K, T, D) -> (B, H, T, D).

    Every layer calls such an `attend`. run/attention.py has others: for texts laid end to end, and for the KV cache.
    """
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class Attention(nn.Module):
    """q, k and v are one weight matrix (rows in this order), so one product gives all three. Files store them apart."""

    def __init__(self, config: Config, layer: int, dtype=None):
        super().__init__()
        self.config, self.layer = config, layer
        E, H, K, D = config.hidden_size, config.heads, config.kv_heads, config.head_dim
        self.qkv_proj = nn.Linear(E, (H + 2 * K) * D, bias=config.qkv_bias, dtype=dtype)
        self.o_proj = nn.Linear(H * D, E, bias=False, dtype=dtype)
        if config.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(D, config.norm_eps, dtype=dtype) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend) -> Tensor:
        B, T, _ = x.shape
        H, K, D = self.config.heads, self.config.kv_heads, self.config.head_dim
        qkv = self.qkv_proj(x).view(B, T, H + 2 * K, D).transpose(1, 2)  # (B, H + 2K, T, D)
        qk, v = qkv.split((H + K, K), dim=1)  # (B, H + K, T, D), (B, K, T, D)
        if self.config.qk_norm:
            qk = torch.cat((self.q_norm(qk[:, :H]), self.k_norm(qk[:, H:])), dim=1)
        q, k = rotate(qk, cos, sin).split((H, K), dim=1)
        out = attend(self.layer, q, k, v)  # (B, H, T, D)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, H * D))  # (B, T, E)


class MLP(nn.Module):
    """gate and up are one matrix, gate's rows first."""

    def __init__(self, config: Config, dtype=None):
        super().__init__()
        E, M = config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Linear(E, 2 * M, bias=False, dtype=dtype)
        self.down_proj = nn.Linear(M, E, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)  # (B, T, M) each
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: Config, layer: int, dtype=None):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.self_attn = Attention(config, layer, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.mlp = MLP(config, dtype)

    def forward(self, x, *args) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), *args)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """The network. Parameters have Hugging Face's names without "model.", except fused ones: see `named_tensors`."""

    def __init__(self, config: Config, dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        self.recompute = False  # activation checkpointing: keep only each block's input, and run it again in backward
        self.source: Path | None = None  # the directory that `load` read, of an adapter its base's
        self.tokenizer_source: Path | None = None  # `save` copies the tokenizer from it
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(Block(config, i, dtype) for i in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        if not config.tied:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)
        # Computed, never loaded. It must stay fp32: never cast the whole module.
        self.register_buffer("frequencies", rope_frequencies(config), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    def named_tensors(self, of=lambda parameter: parameter) -> dict[str, Tensor]:
        """{Hugging Face's name without "model.": tensor}; parts of fused parameters are views of them.

        of(parameter): what to take, e.g. its .grad; by default the parameter.
        """
        tensors = {}
        for name, parameter in self.named_parameters():
            layer = name.split(".")[-2]
            if rows := self.config.fused.get(layer):
                pieces = of(parameter).split(list(rows.values()))
                tensors |= {name.replace(layer, part): piece for part, piece in zip(rows, pieces, strict=True)}
            else:
                tensors[name] = of(parameter)
        return tensors

    def hidden(self, tokens, positions=None, attend=None) -> Tensor:
        """Final normalised states (B, T, E) of tokens (B, T) int64.

        positions (B, T): each token's position in its text; default 0, 1, … attend: see `plain_attention`.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        angles = positions[:, None, :, None].float() * self.frequencies  # (B, 1, T, D/2), fp32
        args = angles.cos(), angles.sin(), attend or plain_attention
        x = self.embed_tokens(tokens)
        again = {"use_reentrant": False, "preserve_rng_state": False}  # nothing in a block is random
        for block in self.layers:
            recompute = self.recompute and torch.is_grad_enabled()
            x = checkpoint(block, x, *args, **again) if recompute else block(x, *args)
        return self.norm(x)

    def head(self, states: Tensor) -> Tensor:
        """Logits (…, V) of final states (…, E), in the model's dtype."""
        return F.linear(states, self.embed_tokens.weight if self.config.tied else self.lm_head.weight)

    def forward(self, tokens, positions=None, attend=None) -> Tensor:
        """Logits (B, T, V) of tokens (B, T); arguments as in `hidden`."""
        return self.head(self.hidden(tokens, positions, attend))


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def read_config(folder: Path) -> Config:
    raw, generation = read_json(folder / "config.json"), folder / "generation_config.json"
    there = generation.exists() or generation.is_symlink()
    return Config.from_json(raw, read_json(generation) if there else None)


def empty(folder: Path, device: str | torch.device, dtype: torch.dtype | str = "auto") -> Transformer:
    """A Transformer of the folder's config with undefined weights. dtype: as in `load`."""
    if dtype == "auto":
        dtype = "fp32" if torch.device(device).type == "cpu" else "bf16"
    dtype = DTYPES.get(dtype, dtype)
    config = read_config(folder)
    try:
        with torch.device("meta"):
            model = Transformer(config, dtype)
        model.to_empty(device=device)
    except RuntimeError as error:  # also torch.OutOfMemoryError
        why = str(error).splitlines()[0]
        raise ValueError(f"{folder}: no memory for such weights ({why}); use a smaller model") from None
    model.frequencies = rope_frequencies(config).to(device)
    return model


def load(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | str = "auto"):
    """A Transformer from a Hugging Face directory or cached hub id, weights from safetensors only.

    For a PEFT adapter: its base model with the adapter attached. dtype: of torch, or fp32, bf16 or auto (fp32 on a CPU,
    else bf16). ValueError names a tensor that is missing, stored twice, unknown to the model, quantized or not finite.
    """
    folder = locate(path)
    if base := base_of(folder):
        if both := [file.name for file in folder.glob("model*.safetensors")]:
            raise ValueError(f"{folder} holds an adapter and a whole model, {both[0]}; move one away, or use the base")
        if base_of(base):
            raise ValueError(f"{folder}: its base {base} is an adapter too; merge that with PEFT into its own base")
        network = lora.read(load(base, device, dtype), folder)
        network.tokenizer_source = tokenizer_folder(folder)
        return network
    model = empty(folder, device, dtype)
    places, seen = model.named_tensors(lambda parameter: parameter.data), set()
    embedding = places["embed_tokens.weight"]  # old files of a tied model hold the head too, or the head alone
    head = {"lm_head.weight": torch.empty_like(embedding)} if model.config.tied else {}

    def place_of(name: str, file: Path) -> Tensor | None:
        short = name.removeprefix("model.")
        if name.endswith("rotary_emb.inv_freq"):
            return None  # in old files; we compute it
        if short in seen:
            raise ValueError(f"{file} holds {name} a second time; fetch the weights again")
        if (place := places.get(short, head.get(short))) is None:
            raise ValueError(f"{folder} holds {short}, which config.json's model lacks; fetch both again")
        seen.add(short)
        return place

    for file in weight_files(folder):
        copy_tensors(file, place_of)
    if head.keys() & seen:
        if "embed_tokens.weight" not in seen:
            embedding.copy_(head["lm_head.weight"])
            seen.add("embed_tokens.weight")
        elif not torch.equal(head["lm_head.weight"], embedding):
            raise ValueError(f"{folder}: config.json ties the head, but lm_head.weight differs; fetch both again")
    if missing := [f"{name} {tuple(place.shape)}" for name, place in places.items() if name not in seen]:
        raise ValueError(f"{folder} lacks the tensor {missing[0]}; fetch the weights again")
    model.source = model.tokenizer_source = folder
    return model


# Tokenizer files, which `save` copies.
COMPANIONS = ("tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt "
              "tokenizer.model chat_template.jinja chat_template.json additional_chat_templates").split()  # fmt: skip


def write_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Writes a safetensors file; ValueError where that fails, as on a full disk."""
    try:
        save_file(tensors, file, metadata={"format": "pt"})
        with contextlib.suppress(OSError):  # safetensors lets only the owner read (its issue 782)
            file.chmod(file.parent.stat().st_mode & 0o666)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{file} cannot be written ({error})") from None


def save(model: Transformer, path: str | Path, card: str = "", shard_bytes: float = 5e9, also=()) -> None:
    """Writes a whole Hugging Face directory: weights, configs, tokenizer, chat template, model card.

    A model with adapters is written as a PEFT adapter with the tokenizer. `path` must be new or an empty folder; it
    gets its name only when it is complete. also: further text files, as (name, text).
    """
    if lora.adapters(model):
        tensors = {"adapter_model.safetensors": lora.peft_tensors(model)}
        values = {"adapter_config.json": lora.peft_config(model)}
    else:
        tensors, values = whole_model(model, shard_bytes)
    values["generation_config.json"] = generation_config(model)
    with whole_folder(path) as partial:
        for name, shard in tensors.items():
            write_tensors({key: tensor.cpu().contiguous() for key, tensor in shard.items()}, partial / name)
        for name, value in values.items():
            (partial / name).write_text(json.dumps(value, indent=2) + "\n")
        for name in COMPANIONS if model.tokenizer_source else ():
            if (file := model.tokenizer_source / name).exists():
                (shutil.copytree if file.is_dir() else shutil.copyfile)(file, partial / name)
        for name, text in [("README.md", card or "A model saved by faith's model.save.\n"), *also]:
            (partial / name).write_text(text, encoding="utf-8", errors="backslashreplace")


def generation_config(model: Transformer) -> dict:
    """The source's generation_config.json, with all tokens that ended an answer: the model's, and the template's."""
    settings, ends = {}, list(model.config.end_of_turn)
    if model.source and (model.source / "generation_config.json").exists():
        settings = read_json(model.source / "generation_config.json")
    if (home := model.tokenizer_source) and (home / "tokenizer.json").exists():
        ends.append(Tokenizer(home).end_of_turn)
    return settings | {"eos_token_id": list(dict.fromkeys(ends))}


def whole_model(model: Transformer, shard_bytes: float) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict]]:
    """What files to write: {safetensors file: its tensors}, {JSON file: its value}."""
    shards, size = [{}], 0
    for name, tensor in model.named_tensors(torch.Tensor.detach).items():
        if size and size + tensor.nbytes > shard_bytes:
            shards, size = [*shards, {}], 0
        shards[-1][name if name == "lm_head.weight" else "model." + name] = tensor
        size += tensor.nbytes
    files = {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}
    config = dict(model.config.raw)
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(model.dtype).removeprefix("torch.")
    values = {"config.json": config}
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}, values
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    where = {name: file for file, shard in files.items() for name in shard}
    return files, values | {"model.safetensors.index.json": {"metadata": {"total_size": total}, "weight_map": where}}


@command("model.py")
def main(argv: list[str]) -> None:
    parser = Parser(prog="model.py", description="Says what a model's files hold.")
    parser.add_argument("model", help="a Hugging Face directory, or a hub id in the local cache")
    path = parser.parse_args(argv).model
    network, tok = load(path, "cpu"), Tokenizer(path)
    shown = {k: v for k, v in vars(network.config).items() if k != "raw"}
    size = sum(p.numel() for p in network.parameters())
    shown["end_of_turn"] = {i: tok.tokenizer.id_to_token(i) for i in {*network.config.end_of_turn, tok.end_of_turn}}
    shown |= {"parameters": size, "a prompt": repr(tok.render([{"role": "user", "content": "Hello"}]))}
    print(*(f"{k:18} {v}" for k, v in shown.items()), sep="\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
