"""FSDP2: a model too large for one GPU's fp32 masters and optimizer, cut among the ranks (torch's `fully_shard`).

    masters     fp32, every tensor cut among all ranks; AdamW updates a rank's part, the gradient comes summed to it
    compute     a block's weights are gathered in bf16 when its turn comes, forward and backward, then dropped
    inference   a whole bf16 copy per rank, frozen, which labels and samples, refreshed in place after every step

The copy is what lets ranks sample at their own pace: every pass through the cut model is a collective, so all ranks
must make the same number of them. For the same reason a stop is agreed upon (stop.Signals).
Zhao et al. 2304.11277; https://pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import model as models
from lab import plan


class Cut(nn.Module):
    """The cut model. work(model) runs inside one forward of it, so that all weights `work` touches are there."""

    def __init__(self, model: models.Transformer):
        super().__init__()
        self.model = model

    def forward(self, work):
        return work(self.model)


def choose(wish: str, model: models.Transformer, world: int, **sizes) -> str:
    """ "replicate" or "shard"; where the wish is "auto" and there are several GPUs, what plan.py takes.

    sizes: what a plan.Setup says of a run, beside the GPUs.
    """
    if wish == "shard" and world == 1:
        raise ValueError(
            "--parallel shard cuts the model among ranks, and there is one; use torchrun --nproc-per-node N"
        )
    if wish != "auto":
        return wish
    if world == 1 or model.device.type != "cuda":
        return "replicate"
    # Prompts are a small part of a batch; so long as one usually is at most.
    prompt = min(plan.Setup.prompt_tokens, model.config.context - sizes["new"])
    memory = torch.cuda.mem_get_info(model.device)[1]
    return plan.plan(model.config, gpus=world, gpu_memory_bytes=memory, prompt_tokens=prompt, **sizes)["parallel"]


def cut(copy: models.Transformer, model: models.Transformer, world: int) -> Cut:
    """Cuts `model`, the copy's like on the meta device in fp32, among `world` ranks; it takes the copy's values.

    The copy is frozen. On a CPU all computes in fp32.
    """
    mesh = init_device_mesh(copy.device.type, (world,))
    compute = None if copy.dtype == torch.float32 else copy.dtype
    # The inputs of a block are as they should be; cast, cos and sin would lose their fp32.
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    whole = Cut(model)
    # Not resharded after a pass without gradient, the root would hold last step's weights in the next one.
    for module in (*model.layers, whole):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    whole.to_empty(device=copy.device)
    model.frequencies = copy.frequencies
    values = dict(copy.named_parameters())
    for name, part in model.named_parameters():
        value = values[name].detach().float()
        value = distribute_tensor(value, mesh, part.placements, src_data_rank=None)  # each rank has it all
        part.to_local().data.copy_(value.to_local())
    copy.requires_grad_(False)
    return whole


def through(model, work):
    """work(model), wherever its weights are."""
    return model(work) if isinstance(model, Cut) else work(model)


def backward(model, loss: Tensor, world: int) -> None:
    """loss.backward(), for gradients that are to be summed over ranks: FSDP takes their mean."""
    (loss * world if isinstance(model, Cut) else loss).backward()


def idle(model: Cut, twice: bool) -> None:
    """The passes of a micro-batch, to no effect: for a rank that has none left. twice: a reference's pass too."""

    def nothing(model: models.Transformer) -> Tensor:
        return model(torch.zeros(1, 1, dtype=torch.int64, device=model.device)).sum() * 0

    loss = model(nothing)
    if twice:
        with torch.no_grad():
            model(nothing)
    loss.backward()


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be cut. All ranks call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
