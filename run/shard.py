"""Shards (FSDP2): for a model whose fp32 masters and optimizer do not fit on one GPU.

    masters   fp32, each tensor in one shard per rank; AdamW updates a rank's shard; gradients arrive summed
    compute   a block's weights are gathered in bf16 when it runs, forward and backward, then dropped
    sampler   a whole, frozen bf16 copy per rank labels and samples; it is refreshed in place after every update

Thanks to that copy, ranks sample at their own pace. A pass through the sharded model is a collective: all ranks must
make the same number of passes, and must agree on a stop (stop.Signals).
Zhao et al. 2304.11277; https://pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import model as models
from run.args import Args

TYPICAL_PROMPT = 300  # tokens; prompts are a small part of a batch


class Sharded(nn.Module):
    """A model in shards. work(model) runs inside one forward of this module, where each block gathers its weights."""

    def __init__(self, model: models.Transformer):
        super().__init__()
        self.model = model

    def forward(self, work):
        return work(self.model)


def choose(args: Args, model: models.Transformer, world: int, plan=None) -> str:
    """What --parallel says, "replicate" or "shard". For "auto" on several GPUs `plan` decides (lab/plan.py)."""
    if args.parallel == "shard" and world == 1:
        raise ValueError("--parallel shard needs several ranks, and there is one; use torchrun --nproc-per-node N")
    if args.parallel != "auto":
        return args.parallel
    if world == 1 or model.device.type != "cuda" or plan is None:
        return "replicate"
    sizes = {name: getattr(args, name) for name in ("prompts", "samples", "rows", "micro", "lora", "recompute")}
    sizes |= {"new": args.max_new_tokens, "kl": bool(args.kl), "anchor": bool(args.anchor)}
    sizes["dtype"] = "fp32" if model.dtype == torch.float32 else "bf16"
    prompt = min(TYPICAL_PROMPT, model.config.context - args.max_new_tokens)
    memory = torch.cuda.mem_get_info(model.device)[1]
    return plan(model.config, gpus=world, gpu_memory_bytes=memory, prompt_tokens=prompt, **sizes)["parallel"]


def shard(copy: models.Transformer, model: models.Transformer, world: int) -> Sharded:
    """Shards `model`, which is on the meta device, and gives it the values of `copy`; freezes `copy`.

    The shards are fp32. They compute in the dtype of `copy`.
    """
    mesh = init_device_mesh(copy.device.type, (world,))
    compute = None if copy.dtype == torch.float32 else copy.dtype
    # Without cast_forward_inputs=False the cos and sin of a block would lose their fp32.
    precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    sharded = Sharded(model)
    # Without resharding, a pass under no_grad would leave the root with the weights of the step before.
    for module in (*model.layers, sharded):
        fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
    sharded.to_empty(device=copy.device)
    model.frequencies = copy.frequencies
    values = dict(copy.named_parameters())
    for name, part in model.named_parameters():  # src_data_rank None: each rank has the whole value
        value = distribute_tensor(values[name].detach().float(), mesh, part.placements, src_data_rank=None)
        part.to_local().data.copy_(value.to_local())
    copy.requires_grad_(False)
    return sharded


def run(model: models.Transformer | Sharded, work) -> Tensor:
    """work(model), in shards or not."""
    return model(work) if isinstance(model, Sharded) else work(model)


def empty_pass(model: Sharded, with_reference: bool) -> None:
    """Joins the collectives of one pass without effect, for a rank with no work left.

    with_reference: also those of the KL's reference.
    """

    def nothing(model: models.Transformer) -> Tensor:
        return model(torch.zeros(1, 1, dtype=torch.int64, device=model.device)).sum() * 0

    loss = model(nothing)
    if with_reference:
        with torch.no_grad():
            model(nothing)
    loss.backward()


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be in shards. All ranks must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
