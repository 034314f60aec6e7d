"""Plans a run: bytes per GPU, whether they fit, which change makes them fit, and the fewest seconds of a step.

Bytes per weight in bf16 (in fp32, as on a CPU, there are no masters):

    replicate   weights 2, fp32 masters 4, Adam's moments 8, fp32 sum of gradients 4, gradients of one pass 2
    shard       masters 4, moments 8, gradients 4, each divided by the number of GPUs; a whole copy for sampling 2
    LoRA        frozen weights 2, shared by sampler and trainer; masters 4, moments 8, gradients 4 of the adapters; a
                copy of them for sampling

The KL's reference is one more copy, except with LoRA. The KV cache stays: CUDA graphs hold its address.

Activations need no formula. The code that trains runs on the meta device, where tensors have no storage, and `Live`
counts each new storage until it is freed. All blocks are alike, so one and two blocks give the bytes of any number.
Attention is one kernel, which keeps q, k, v, its output and a log-sum per query: FlashAttention in bf16, the CPU's
kernel in fp32, with the mask as numbers. GPUs before Ampere have neither; torch keeps all scores there (--attention
math).

GB are 1e9 bytes. On a GPU sold as 80 GB torch finds about 85 GB; we count 80 GB, minus the headroom. Seconds are the
time of the matrix products at an H100's peak rate, or the time to read the bytes where that is longer.

    python -m lab.plan --model configs/llama-3.1-8b.json --gpus 8 --kl --anchor --recompute
"""

import contextlib
import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import grpo
import model as models
from rollout import Slots, sized
from run import files, lora, reading
from run.args import check_options, option
from run.attention import over_parts
from run.hub import locate
from run.progress import Parser, command

HEADROOM = 0.05  # share of the memory left for CUDA's context, NCCL, fragments, the sampler's working tensors
RATE, BANDWIDTH, LINK = 990e12, 3.35e12, 0.45e12  # an H100's operations a second; bytes a second of memory, of NVLink


@dataclass(frozen=True)
class Setup:
    """What a plan depends on besides the model. Each field is a flag."""

    gpus: int = option(1, "number of GPUs", least=1)
    gpu_memory_bytes: float = option(80e9, "memory of each GPU; the flag is in GB (1e9 bytes)", above=0)
    prompts: int = option(64, "prompts per step, over all GPUs", least=2)
    samples: int = option(16, "samples per prompt", least=2, most=2**20)
    prompt_tokens: int = option(300, "tokens of a prompt", least=1)
    new: int = option(200, "tokens of a sample; all samples count as this long", least=1)
    rows: int = option(0, "samples decoded together; 0: by memory, as train.py does", least=0, most=2**20)
    micro: int = option(4, "groups per forward and backward pass", least=1)
    lora: int = option(0, "rank of the adapters; 0: all weights are trained", least=0, most=2**16)
    kl: bool = option(False, "with a KL to the initial model")
    anchor: bool = option(False, "with train.py's --anchor (X and X' of --micro questions in a pass)")
    recompute: bool = option(False, "activation checkpointing")
    parallel: str = option("auto", "replicate, shard, or whichever fits", ("auto", "replicate", "shard"))
    dtype: str = option("bf16", "type of the weights: bf16 on GPUs, fp32 on a CPU", tuple(models.DTYPES))
    attention: str = option("fused", "a fused kernel, or math, which keeps all scores", ("fused", "math"))

    def __post_init__(self):
        check_options(self, flag)
        if self.parallel == "shard" and self.gpus == 1:
            raise ValueError("--parallel shard needs several GPUs, and there is one; raise --gpus or use replicate")

    @property
    def share(self) -> int:
        """Prompts of the GPU that has the most."""
        return -(-self.prompts // self.gpus)


def flag(field: dataclasses.Field) -> str:
    return "--" + field.name.removesuffix("_bytes").replace("_", "-")


class Live(TorchDispatchMode):
    """Bytes of the storages that operations make, while they live: `now`, and `peak`, the most so far."""

    def __init__(self):
        super().__init__()
        self.storages, self.peak = WeakIdKeyDictionary(), 0

    @property
    def now(self) -> int:
        return sum(self.storages.values())

    def watch(self, values, made: bool) -> None:
        for storage in (x.untyped_storage() for x in tree_leaves(values) if isinstance(x, Tensor)):
            self.storages.setdefault(storage, storage.nbytes() if made else 0)  # weights and inputs count elsewhere
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.watch((args, kwargs), made=False)
        out = operation(*args, **(kwargs or {}))
        self.watch(out, made=True)
        if operation is torch.ops.aten._flash_attention_backward.default:
            self.peak = max(self.peak, self.now + flash_workspace(*args[1:3], args[6]))
        return out

    def pack(self, prompts: int, prompt_tokens: int, samples: int, new: int) -> grpo.Packed:
        """Groups of these sizes on the meta device, counted."""
        packed = grpo.pack([(range(prompt_tokens), [range(new)] * samples)] * prompts, "meta")
        self.watch((packed.tokens, packed.positions, packed.sources), made=True)
        return packed


def flash_workspace(q: Tensor, k: Tensor, ends: Tensor) -> int:
    """Bytes that the backward kernel takes for itself. q (T, H, D), k (S, K, D); ends: of the runs, and a 0.

    These are q's gradient in fp32, with each run rounded up, and where K < H the gradients of k and v per query head.
    """
    (T, H, D), (S, K, _), runs = q.shape, k.shape, len(ends) - 1
    return 4 * (T + 128 * runs) * H * D + 2 * k.itemsize * S * H * D * (H > K)


class Fused(TorchFunctionMode):
    """Keeps fp32 attention as one kernel. On the meta device torch would split it into products."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        mask = kwargs["attn_mask"]
        bias = None if mask is None else torch.where(mask, 0.0, -math.inf).to(args[0].dtype)  # made in each layer
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(*args, is_causal=kwargs["is_causal"], attn_mask=bias)[0]


def meta_network(config: models.Config, setup: Setup, **changes) -> models.Transformer:
    """The network on the meta device, with the setup's adapters. changes: overrides of its config."""
    with torch.device("meta"):
        network = models.Transformer(dataclasses.replace(config, **changes), models.DTYPES[setup.dtype])
    network.recompute = setup.recompute
    return lora.attach(network, setup.lora, setup.lora) if setup.lora else network


def hidden_bytes(config: models.Config, setup: Setup, sizes: tuple[int, int, int, int]) -> tuple[int, int]:
    """Activation bytes of a pass up to the head. sizes: as `Live.pack` takes them.

    Returns what the forward pass keeps for the backward pass, and how much more the backward pass needs at its peak.
    """
    kept, peaks, fused = [], [], setup.attention == "fused"
    for layers in (1, 2):
        network = meta_network(config, setup, layers=layers, vocab_size=1)
        embedding = network.embed_tokens.weight.requires_grad_()
        with Live() as live:
            packed = live.pack(*sizes)
            over = over_parts(packed.parts, "meta", flash=fused)

            def attend(*qkv, over=over) -> Tensor:  # the mode is set in here, since recomputation calls this again
                with Fused() if fused else contextlib.nullcontext():
                    return over(*qkv)

            states = network.hidden(packed.tokens, packed.positions, attend=attend)[0, packed.sources]
            kept.append(live.now)
            torch.autograd.grad(states, embedding, torch.ones_like(states))  # other weights' gradients count elsewhere
        peaks.append(live.peak)
    peak, keep = (one + (config.layers - 1) * (two - one) for one, two in (peaks, kept))
    return keep, peak - keep


def micro_batch_bytes(config: models.Config, setup: Setup) -> dict[str, int]:
    """Bytes that come and go with a micro-batch. They are the same with shards and without."""
    micro, item = min(setup.micro, setup.share), models.DTYPES[setup.dtype].itemsize
    sizes = [(micro, setup.prompt_tokens, setup.samples, setup.new)]
    if setup.anchor:  # the two texts of a question are equal up to the edit; we assume it is half way
        half = setup.prompt_tokens // 2 + 1
        sizes.append((min(setup.micro, -(-(setup.prompts // 2) // setup.gpus)), half, 2, half))
    kept, working = max((hidden_bytes(config, setup, some) for some in sizes), key=sum)
    scored, chunk = micro * setup.samples * setup.new, grpo.CHUNK if item == 4 else grpo.CHUNK_CUDA
    network = meta_network(config, setup, layers=0, tied=False)
    weights = [network.norm.weight.requires_grad_()] + [w for w in [network.lm_head.weight] if w.requires_grad]
    with Live() as live:
        packed = live.pack(1, 1, 1, min(scored, chunk))
        torch.autograd.grad(grpo.token_logprobs(network, packed, 1.0, chunk).sum(), weights)
    # The head's gradient is summed over chunks. In bf16 the sum is already among the gradients of one pass.
    head_sums = 0 if setup.lora else (scored > chunk) - (item < 4)
    logits = live.peak + head_sums * config.vocab_size * config.hidden_size * item
    return {"activations": kept, "a block's backward": working, "logits chunk": logits}


def sampler_slots(config: models.Config, setup: Setup, stay: dict[str, int]) -> Slots:
    """The sampler's cache, as it allocates it, on the meta device. stay: bytes by purpose; some are there before it."""
    there = sum(stay[name] for name in ("weights", "masters", "reference", "inference copy"))
    dtype, free = models.DTYPES[setup.dtype], max(0, round(setup.gpu_memory_bytes) - there)
    call = setup.share, setup.samples, setup.prompt_tokens, setup.new, dtype != torch.float32
    return sized(config, dtype, setup.rows, free, *call)[1]


def stacked_bytes(block: models.Block) -> int:
    """What a block's adapters take for decoding. The weights beside them are moved there."""
    lora.stack(block)
    return sum(sum(x.nbytes for x in a.stacked) - a.base.weight.nbytes for a in lora.adapters(block))


def count(config: models.Config, setup: Setup, parallel: str, micro_batch: dict[str, int]) -> dict:
    """{"bytes": per GPU by purpose, "total": at the peak, "parameters", "trained": how many}."""
    network, item, sharded = meta_network(config, setup), models.DTYPES[setup.dtype].itemsize, parallel == "shard"
    modules = network, network.layers[0]
    parameters, block = (sum(w.numel() for w in module.parameters()) for module in modules)
    trained, block_trained = (sum(w.numel() for w in module.parameters() if w.requires_grad) for module in modules)
    root, root_trained = parameters - config.layers * block, trained - config.layers * block_trained  # not in a block
    copy, N = sum(w.nbytes for w in network.parameters()), setup.gpus if sharded else 1
    decoding = stacked_bytes(network.layers[0]) * config.layers if item < 4 else 0
    masters = trained if item < 4 and not setup.lora and not sharded else 0
    stay = {
        "weights": 4 * parameters // N if sharded else copy, "masters": 4 * masters,
        "reference": copy if setup.kl and not setup.lora else 0, "optimizer": 8 * trained // N,
        "gradients": 4 * trained // N + item * masters, "inference copy": copy * sharded + decoding,
    }  # fmt: skip
    stay["KV cache"] = sampler_slots(config, setup, stay).kv_bytes()
    # The root stays gathered. Of the blocks, the next one is gathered too, and the gradient of one is summed.
    gather = sharded * (item * (root + root_trained + 2 * block) + (item + 4) * block_trained)
    # After the micro-batch the embedding's gradient comes last. Where the head is tied, the head's gradient and the sum
    # are there too. In bf16 one of them is among "gradients". AdamW, fused on a GPU, needs nothing of its own.
    embedding = item * config.vocab_size * config.hidden_size * (root_trained > 0)
    end = embedding * ((3 if config.tied else 1) - (item < 4)) + sharded * (2 * item + 4) * root_trained
    kept, working, logits = micro_batch.values()
    total = sum(stay.values()) + max(kept + max(working, logits) + gather, end)
    rows = stay | micro_batch | {"gather buffers": gather, "end of the update": end}
    return {"bytes": rows, "total": total, "parameters": parameters, "trained": trained}


def seconds(c: models.Config, setup: Setup, parallel: str, made: dict) -> dict[str, float]:
    """The fewest seconds of a step, by phase. made: what `count` returned."""
    parameters, trained = made["parameters"], made["trained"]
    item, N, share, sharded = models.DTYPES[setup.dtype].itemsize, setup.gpus, setup.share, parallel == "shard"
    prompt, new, samples, slots = setup.prompt_tokens, setup.new, setup.samples, sampler_slots(c, setup, made["bytes"])
    head, pair = c.vocab_size * c.hidden_size, 4 * c.layers * c.heads * c.head_dim  # pair: operations of q with k, v
    body = parameters - head * (1 if c.tied else 2)  # two operations per token and weight
    prefill = share * (2 * body * prompt + pair * prompt**2 / 2) / RATE
    rows = min(share * samples, slots.P * slots.G)
    decode_step = rows * (2 * (body + head) + pair * (prompt + new / 2)) / RATE
    reading = (item * (body + head) + slots.prefix.nbytes + slots.own.nbytes / 2) / BANDWIDTH
    # Passes: forward 1, backward 2 (frozen weights: 1), recomputed 1, reference 1. Logits are always computed twice.
    more, back = setup.recompute + setup.kl, 1 if setup.lora else 2
    update = 2 * body * (prompt + samples * (new - 1)) * (1 + back + more)
    update += 2 * body * 0.75 * prompt * (1 + back + setup.recompute) * setup.anchor  # X, half X' of half the questions
    update += 2 * head * samples * new * (2 + back + setup.kl)
    update += pair * (prompt**2 / 2 + samples * new * (prompt + new / 2)) * (3 + more)
    sent = 8 * trained  # gradients, summed and sent back
    if sharded:  # per pass: weights gathered twice, gradients summed. Per step: fp32 weights gathered for the copy
        sent = -(-share // setup.micro) * (2 * item * parameters + 4 * trained) + 4 * parameters
    out = {
        "labels": 4 * prefill, "prefill": prefill,  # two questions are labelled for each one kept, as X and X'
        "decode": -(-share * samples // rows) * (new - 1) * max(decode_step, reading),
        "forward, backward": share * update / RATE,
        "communication": sent * (N - 1) / N / LINK,
        "optimizer": (28 + item) * trained / (N if sharded else 1) / BANDWIDTH,
    }  # fmt: skip
    hidden = min(out["forward, backward"], out["communication"])  # at best they run at the same time
    return out | {"step": sum(out.values()) - hidden}


def plan(config: models.Config, **settings) -> dict:
    """What a run of `Setup(**settings)` needs: {"parallel", "bytes", "total", "headroom", "fits", "seconds", …}.

    "auto" replicates where that fits, and otherwise shards if there are several GPUs. With LoRA it never shards: each
    GPU has the whole frozen weights anyway, to sample. ValueError for what no run can have.
    """
    setup = Setup(**settings)
    if (length := setup.prompt_tokens + setup.new) > config.context:
        raise ValueError(f"--prompt-tokens and --new make {length}, the model's context is {config.context}; lower one")
    usable, micro_batch = (1 - HEADROOM) * setup.gpu_memory_bytes, micro_batch_bytes(config, setup)
    auto = ["replicate", "shard"] if setup.gpus > 1 and not setup.lora else ["replicate"]
    for parallel in auto if setup.parallel == "auto" else [setup.parallel]:
        made = count(config, setup, parallel, micro_batch)
        if made["total"] <= usable:
            break
    return {"parallel": parallel, **made, "headroom": round(HEADROOM * setup.gpu_memory_bytes),
            "fits": made["total"] <= usable,
            "seconds": seconds(config, setup, parallel, made)}  # fmt: skip


def advice(config: models.Config, setup: Setup) -> tuple[str, dict] | None:
    """The first change that makes the run fit, as flags, and its plan. Changes that cost less are tried first."""
    fewer = [{"micro": setup.micro >> i} for i in range(1, setup.micro.bit_length())]
    changes = [{"rows": 128}, {"recompute": True}, *fewer, *({"recompute": True} | change for change in fewer)]
    if setup.parallel == "replicate" and setup.gpus > 1 and not setup.lora:
        changes = [{"parallel": "shard"} | change for change in [{}, *changes]]
    if not setup.lora:
        smallest = {"recompute": True, "micro": 1}
        changes += [{"lora": 16}, {"lora": 16} | smallest, *({"gpus": setup.gpus << i} | smallest for i in range(1, 8))]
    for change in changes:
        made = plan(config, **dataclasses.asdict(setup) | {"parallel": "auto"} | change)
        if made["fits"]:
            return " ".join(f"--{key}" + f" {value}" * (value is not True) for key, value in change.items()), made
    return None


def show(made: dict, setup: Setup) -> str:
    over = made["total"] + made["headroom"] - setup.gpu_memory_bytes
    notes = {"logits chunk": "only the larger of this line and the one above counts",
             "end of the update": "after the four lines above are freed",
             "headroom": f"{HEADROOM:.0%}, kept free"}  # fmt: skip
    rows, trained = made["bytes"] | {key: made[key] for key in ("total", "headroom")}, made["trained"] / 1e9
    return "\n".join([
        f"{made['parameters'] / 1e9:.3f} billion weights, {trained:.3f} of them trained "
        f"({f'LoRA {setup.lora}' if setup.lora else 'all weights'})",
        f"{setup.gpus} x {setup.gpu_memory_bytes / 1e9:g} GB, {made['parallel']}, {setup.dtype}, "
        f"{min(setup.micro, setup.share)} groups a pass, {setup.attention} attention\n\nGB per GPU",
        *(f"  {name:18}{value / 1e9:8.2f}  {notes.get(name, '')}".rstrip() for name, value in rows.items()),
        f"fits, {-over / 1e9:.2f} GB left" if made["fits"] else f"DOES NOT FIT: {over / 1e9:.2f} GB too much",
        "\nseconds, at least", *(f"  {name:18}{value:8.2f}" for name, value in made["seconds"].items()),
    ])  # fmt: skip


def read(path: str) -> models.Config:
    """The config of a model's folder, of a hub id in the local cache, or in a file."""
    if Path(path).is_file():
        return models.Config.from_json(reading.read_json(Path(path)), None, path)
    return models.read_config(locate(path))


@command("lab.plan")
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="lab.plan", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="Hugging Face directory, hub id in the local cache, or a config")
    for field in dataclasses.fields(Setup):
        extra = {"type": type(field.default), "choices": field.metadata["choices"]}
        extra = {"action": "store_true"} if field.default is False else extra
        parser.add_argument(flag(field), dest=field.name, default=field.default, help=field.metadata["help"], **extra)
    parser.set_defaults(gpu_memory_bytes=80.0)
    parser.add_argument("--json", help="write the plan to this file")
    args = vars(parser.parse_args(argv))
    path, file = args.pop("model"), args.pop("json")
    if not 0 < args["gpu_memory_bytes"] < math.inf:
        raise ValueError(f"--gpu-memory must be a finite number of GB above 0, not {args['gpu_memory_bytes']:g}")
    args["gpu_memory_bytes"] *= 1e9
    setup, config = Setup(**args), read(path)
    files.check_writable(file)
    made = plan(config, **args)
    print(show(made, setup))
    if not made["fits"]:
        made["advice"], better = advice(config, setup) or ("", made)
        fits = f"it fits with {made['advice']}: {better['total'] / 1e9:.2f} GB, {better['parallel']}"
        print("\n" + (fits if made["advice"] else "no change tried makes it fit; use larger GPUs or fewer tokens"))
    if file:
        files.write_json(file, {"model": path, **args, **made})


if __name__ == "__main__":
    sys.exit(main())
