"""Bytes that a run holds on each GPU, for plan.py: what stays, and what comes and goes with a micro-batch.

The network is built on the meta device, where tensors have shapes and no storage, and a micro-batch goes through the
very code that trains: every operation's new storage is counted until it is freed (`Live`), so that there is no formula
of activations for the code to outgrow. Blocks are alike, so one and two of them tell of any number.

Attention stays one kernel here, which keeps q, k, v, its output and a log-sum per query: in bf16 FlashAttention, which
wants what a prompt's samples share once for each of them; in fp32 a CPU's, with the mask as numbers. What torch falls
back on where it has neither, as on GPUs before Ampere, keeps all scores (--attention math).
"""

import contextlib
import dataclasses
import functools
import inspect
import math
import weakref

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import grpo
import model as models
from kernels import over_parts
from rollout import Sampler, Slots, cache_length
from run import lora

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


# ---- what comes and goes -------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """Bytes of the storages that operations make, as long as they live: `now`, and `peak`, their highest."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, {}

    def free(self, key: int) -> None:
        self.now -= self.seen.pop(key)

    def watch(self, values, made: bool) -> None:
        for tensor in tree_leaves(values):
            if isinstance(tensor, torch.Tensor) and (key := (s := tensor.untyped_storage())._cdata) not in self.seen:
                self.seen[key] = s.nbytes() if made else 0  # what comes from outside was there before
                self.now += self.seen[key]
                weakref.finalize(s, self.free, key)
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.watch((args, kwargs), made=False)
        out = operation(*args, **(kwargs or {}))
        self.watch(out, made=True)
        if operation is torch.ops.aten._flash_attention_backward.default:
            self.peak = max(self.peak, self.now + flash_workspace(*args[1:3], args[6]))
        return out


def flash_workspace(q: torch.Tensor, k: torch.Tensor, ends: torch.Tensor) -> int:
    """Bytes the kernel takes for itself: q's gradient in fp32, each run rounded up; those of k and v per query head."""
    (_, H, D), (S, K, _), runs = q.shape, k.shape, len(ends) - 1
    return 4 * (q.shape[0] + 128 * runs) * H * D + 2 * k.itemsize * S * H * D * (H > K)


class Fused(TorchFunctionMode):
    """On the meta device torch would take attention apart into products; here it stays one kernel."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        mask = kwargs["attn_mask"]
        bias = None if mask is None else torch.where(mask, 0.0, -math.inf).to(args[0].dtype)  # anew in each layer
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(*args, is_causal=kwargs["is_causal"], attn_mask=bias)[0]


def groups(count: int, prompt: int, samples: int, new: int) -> grpo.Packed:
    """What grpo.pack makes of `count` prompts with `samples` completions of `new` tokens each."""

    def meta(*shape, dtype=torch.int64):
        return torch.empty(shape, dtype=dtype, device="meta")

    n, parts = samples * (new - 1), []
    for a in range(0, count * (prompt + n), prompt + n):
        b = a + prompt
        parts += [(a, b, a, a, [prompt])] + [(b, b + n, a, b, [new - 1] * samples)] * (n > 0)
    tokens, scored = meta(1, count * (prompt + n)), meta(count * samples * new)
    return grpo.Packed(tokens, meta(*tokens.shape), parts, scored, scored)


def hidden_bytes(build, layers: int, sizes: tuple[int, int, int, int], fused: bool = True) -> tuple[int, int]:
    """Bytes that the forward pass of `groups(*sizes)` up to the head keeps for the backward pass, and what that adds.

    Both beside weights and gradients. build(layers=, vocab_size=): such a network on the meta device.
    """
    kept, peaks = [], []
    for some in (1, 2):
        network = build(layers=some, vocab_size=1)
        first = network.embed_tokens.weight.requires_grad_()
        with Live() as live:
            packed = groups(*sizes)
            look = over_parts(packed.parts, "meta", flash=fused)

            def attend(*qkv) -> torch.Tensor:
                with Fused() if fused else contextlib.nullcontext():
                    return look(*qkv)  # noqa: B023

            states = network.hidden(packed.tokens, packed.positions, attend=attend)[0, packed.sources]
            kept.append(live.now)
            torch.autograd.grad(states, first, torch.ones_like(states))  # of no other weight
        peaks.append(live.peak)
    most, keep = (some[0] + (layers - 1) * (some[1] - some[0]) for some in (peaks, kept))
    return keep, most - keep


def logits_bytes(build, tokens: int) -> int:
    """Most bytes alive while so many tokens are scored, forward and backward, the gradient of the head included."""
    network = build(layers=0, tied=False)
    firsts = [network.norm.weight.requires_grad_()] + [w for w in [network.lm_head.weight] if w.requires_grad]
    with Live() as live:
        torch.autograd.grad(grpo.token_logprobs(network, groups(1, 1, 1, tokens), 1.0).sum(), firsts)
    return live.peak


# ---- all of it -----------------------------------------------------------------------------------------------


def build(config: models.Config, setup, **changes) -> models.Transformer:
    """The network of a plan.Setup on the meta device, with its adapters, with `changes` to its config."""
    with torch.device("meta"):
        network = models.Transformer(dataclasses.replace(config, **changes), DTYPES[setup.dtype])
    network.recompute = setup.recompute
    return lora.attach(network, setup.lora, setup.lora) if setup.lora else network


def usual(function, name: str):
    return inspect.signature(function).parameters[name].default


def passing(config: models.Config, setup) -> dict[str, int]:
    """Bytes that come and go with a micro-batch, however the weights are kept."""
    make, micro = functools.partial(build, config, setup), min(setup.micro, setup.share)
    sizes = [(micro, setup.prompt_tokens, setup.samples, setup.new)]
    if setup.anchor:  # the two texts of a question are the same up to the edit: say half way
        half = setup.prompt_tokens // 2 + 1
        sizes.append((-(-(setup.prompts // 2) // setup.gpus), half, 2, half))
    both = [hidden_bytes(make, config.layers, some, setup.attention == "fused") for some in sizes]
    kept, working = max(both, key=sum)
    scored, chunk = micro * setup.samples * setup.new, usual(grpo.token_logprobs, "chunk")
    # The head's gradient is summed over chunks. In bf16 the sum is among the gradients of one backward pass already.
    sums = 0 if setup.lora else (scored > chunk) - (DTYPES[setup.dtype].itemsize < 4)
    head = config.vocab_size * config.hidden_size * DTYPES[setup.dtype].itemsize
    logits = logits_bytes(make, min(scored, chunk)) + sums * head
    return {"activations": kept, "a block's backward": working, "logits chunk": logits}


def slots(config: models.Config, setup) -> Slots:
    """The sampler's, as it allocates them."""
    rows = usual(Sampler, "rows")
    G = min(setup.samples, usual(Sampler, "lanes"), rows)
    P = min(setup.share, rows // G)
    dtype = DTYPES[setup.dtype]
    T = cache_length(setup.prompt_tokens, static=dtype != torch.float32)
    return Slots(config, P, G, T, setup.new, "meta", dtype)


def count(config: models.Config, setup, parallel: str, passing: dict[str, int]) -> dict:
    """{"bytes": per GPU by purpose, "total": at the peak, "parameters", "trained": how many}."""
    outside, one = (list(build(config, setup, layers=n).parameters()) for n in (0, 1))

    def size(what) -> tuple[int, int, int]:  # outside the blocks, of a block, of all
        root, both = (sum(map(what, some)) for some in (outside, one))
        return root, both - root, root + config.layers * (both - root)

    item, cut = DTYPES[setup.dtype].itemsize, parallel == "shard"
    N, copy = setup.gpus if cut else 1, size(lambda p: p.nbytes)[2]
    root, block, parameters = size(torch.Tensor.numel)
    root_trained, block_trained, trained = size(lambda p: p.numel() * p.requires_grad)
    masters = trained if item < 4 and not setup.lora and not cut else 0
    stay = {
        "weights": 4 * parameters // N if cut else copy,
        "masters": 4 * masters,
        "reference": copy if setup.kl and not setup.lora else 0,
        "optimizer": 8 * trained // N,
        "gradients": 4 * trained // N + item * masters,
        "inference copy": copy if cut else 0,
        "KV cache": slots(config, setup).kv_bytes(),
    }
    # What lies outside the blocks stays gathered; of blocks the next is there too, and one's gradient is summed.
    gather = cut * (item * (root + root_trained + 2 * block) + (item + 4) * block_trained)
    # When all that is gone: the embedding's gradient comes last; then AdamW on a GPU takes all tensors at once.
    # Tied, it meets the head's, and their sum; in bf16 one of them is among the gradients above.
    embedding = item * config.vocab_size * config.hidden_size * (root_trained > 0)
    last = embedding * ((3 if config.tied else 1) - (item < 4)) + cut * (2 * item + 4) * root_trained
    end = max(last, 4 * trained // N * (item < 4))
    kept, working, logits = passing.values()
    total = sum(stay.values()) + max(kept + max(working, logits) + gather, end)
    rows = stay | passing | {"gather buffers": gather, "end of the update": end}
    return {"bytes": rows, "total": total, "parameters": parameters, "trained": trained}
