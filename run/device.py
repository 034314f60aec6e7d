"""Values on their way between the host and the device that computes. Here only `to_host` waits for a GPU."""

import torch
from torch import Tensor


def send(values, device=None) -> Tensor:
    """A list, array or CPU tensor as a tensor on `device`.

    Only from pinned memory does torch copy to a GPU without waiting. It keeps that memory until the copy is done.
    """
    tensor = torch.as_tensor(values)
    if torch.device(device or "cpu").type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def to_host(*tensors: Tensor) -> list:
    """The values of all tensors as lists, from one transfer. fp64 holds fp32 and integers below 2^53 exactly."""
    flat = torch.cat([x.flatten().double() for x in tensors]).cpu()
    pieces = zip(flat.split([x.numel() for x in tensors]), tensors, strict=True)
    return [piece.to(x.dtype).view(x.shape).tolist() for piece, x in pieces]
