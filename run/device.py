"""Values of the host as tensors on the device that computes. The host does not wait for a GPU to have them."""

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
