"""The policy: the trained weights, wherever they are. A step calls passes, run, reference, backward and step.

whole     an fp32 model, as on a CPU: AdamW updates its own weights
masters   a bf16 model, as on a GPU: AdamW updates fp32 copies, which are cast back after each update. On bf16
          weights it would lose updates smaller than 2^-8 of a weight
LoRA      the adapters beside a frozen model; they are fp32 themselves
sharded   fp32 weights in shards, one per rank (FSDP2, run/shard.py); the sampler has a bf16 copy of its own
"""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import model as models
from run import lora, shard
from run.args import Args
from run.hub import base_of, locate
from run.ranks import Ranks


def learning_rate(n: int, args: Args) -> float:
    """At step n (from 0): linear warm-up, then constant, or decay to 10 % of the peak at the last step."""
    if n < args.warmup:
        return args.lr * (n + 1) / args.warmup
    done = (n - args.warmup) / max(1, args.steps - 1 - args.warmup)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[args.decay]
    return args.lr * (0.1 + 0.9 * shape)


class Policy:
    """The trained weights and their AdamW. `model` is what the sampler runs: every update is copied into it in place.

    sharded: the same model in shards, or None. reference: the initial model of the KL, or None; with new adapters it is
    the trained model, run without them.
    """

    def __init__(self, model: models.Transformer, args: Args, ranks: Ranks, sharded=None, reference=None):
        self.model, self.args, self.ranks, self.sharded = model, args, ranks, sharded
        self.trained, self.initial = sharded or model, reference
        self.before_update: Callable[[], None] = lambda: None  # the loop holds back signals while weights change
        named = dict(model.named_parameters())
        trained = {n: w for n, w in (sharded.model if sharded else model).named_parameters() if w.requires_grad}
        self.names, self.weights = list(trained), [named[name] for name in trained]
        self.masters = [w if w.dtype == torch.float32 else torch.nn.Parameter(w.detach().float())
                        for w in trained.values()]  # fmt: skip
        how = {"betas": (0.9, args.beta2), "weight_decay": args.weight_decay, "fused": model.device.type == "cuda"}
        self.adam = torch.optim.AdamW(self.masters, lr=args.lr, **how)

    def run(self, work: Callable[[models.Transformer], Tensor]) -> Tensor:
        """work(model) with gradients."""
        return shard.run(self.trained, work)

    @torch.no_grad()
    def reference(self, work: Callable[[models.Transformer], Tensor]) -> Tensor:
        """work(model) under the initial model."""
        with lora.without(self.initial) if self.initial is self.trained else contextlib.nullcontext():
            return shard.run(self.initial, work)

    def passes(self, count: int, size: int, with_reference: bool = True) -> Iterator[slice]:
        """Slices that cut `count` groups into passes of `size`.

        With shards each pass is a collective, so a rank with fewer groups adds empty passes. with_reference: in a pass
        the KL's reference, if there is one, runs too.
        """
        for start in range(0, max(self.ranks.gather([count])) if self.sharded else count, size):
            if self.sharded:
                self.ranks.meet()  # the ranks may agree to stop here
            if start < count:
                yield slice(start, start + size)
            else:
                shard.empty_pass(self.sharded, with_reference and self.initial is self.sharded)

    def backward(self, loss: Tensor) -> None:
        """Adds the loss's gradient to the fp32 sum. Ranks are summed in `step`, or here by FSDP."""
        (loss * self.ranks.world if self.sharded else loss).backward()  # FSDP takes the mean over ranks
        for weight, master in zip(self.weights, self.masters, strict=True):
            if weight is not master and weight.grad is not None:
                master.grad = weight.grad.float() if master.grad is None else master.grad.add_(weight.grad)
                weight.grad = None

    def step(self, lr: float, finite: bool = True) -> tuple[float, bool]:
        """Sums gradients over ranks, clips them, updates. Returns their norm before clipping, and whether it updated.

        Nothing changes where the norm is not finite, or the loss was not (`finite`). All ranks decide alike.
        """
        self.before_update()
        for master in self.masters:
            if master.grad is None:  # a rank without work takes part all the same
                master.grad = torch.zeros_like(master)
        if not self.sharded:
            self.ranks.sum_([master.grad for master in self.masters])
        norm = shard.whole(torch.nn.utils.clip_grad_norm_(self.masters, self.args.clip_norm))
        updated = finite and bool(torch.isfinite(norm))
        if updated:
            for group in self.adam.param_groups:
                group["lr"] = lr
            self.adam.step()
            self.refresh()
        self.adam.zero_grad(set_to_none=True)
        return float(norm), updated

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the masters into the model that samples, in its dtype."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            if weight is not master:
                weight.copy_(shard.whole(master))

    def state(self) -> dict[str, Tensor]:
        """Every tensor that an update changes, by name: to save them, or to load into them in place."""
        tensors = {}
        for name, master in zip(self.names, self.masters, strict=True):
            state = self.adam.state[master]
            if not state:  # AdamW's initial state
                state |= {"step": torch.zeros((), device=master.device), "exp_avg": torch.zeros_like(master)}
                state["exp_avg_sq"] = torch.zeros_like(master)
            tensors |= {f"{key}.{name}": state[key] for key in ("step", "exp_avg", "exp_avg_sq")}
            tensors[f"weight.{name}"] = master.data
        return tensors


def make_policy(model: models.Transformer, args: Args, ranks: Ranks, plan: Callable[..., dict] | None = None) -> Policy:
    """The policy that the flags ask for. plan(config, **sizes)["parallel"] decides --parallel auto (lab/plan.py).

    ValueError where flags do not go together.
    """
    detection = args.objective == "detection"
    if detection and args.parallel == "shard":
        raise ValueError("--objective detection cannot run in shards; use --parallel replicate")
    sharded = None
    if not detection and shard.choose(args, model, ranks.world, plan) == "shard":
        with torch.device("meta"):
            like = models.Transformer(model.config, torch.float32)
        if args.lora:
            lora.attach(like, args.lora, args.lora_alpha, args.lora_targets.split(","))
        like.recompute = args.recompute
        sharded = shard.shard(model, like, ranks.world)
    reference = None
    if args.kl and args.objective == "disclosure":
        new = args.lora and not base_of(locate(args.model))
        reference = (sharded or model) if new else models.load(args.model, ranks.device, args.dtype)
    return Policy(model, args, ranks, sharded, reference)
