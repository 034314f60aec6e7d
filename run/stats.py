"""The figures of an update: its loss, KL, clipped tokens, and the gap between trainer's and sampler's logprobs."""

import torch
from torch import Tensor


class LossStats:
    """Figures of an update over its micro-batches and all ranks, on the device until `summary`; means over tokens."""

    def __init__(self, device):
        self.sums, self.gap_max = torch.zeros(6, dtype=torch.float64, device=device), torch.zeros((), device=device)

    @torch.no_grad()
    def add(self, loss: Tensor, kl: Tensor, logprobs: Tensor, old: Tensor, advantage: Tensor, low: float, high: float):
        """One micro-batch: its loss (scalar); per token (M,) the inputs of policy_loss and the result of kl_k3."""
        ratio = (logprobs - old).exp()
        clipped = ((ratio < 1 - low) & (advantage < 0)) | ((ratio > 1 + high) & (advantage > 0))
        gap = (logprobs - old).abs()
        self.gap_max = torch.maximum(self.gap_max, gap.max())
        sums = (loss, kl.sum(), clipped.sum(), gap.sum(), -logprobs.sum(), torch.full_like(loss, len(old)))
        self.sums += torch.stack([x.double() for x in sums])

    def summary(self, ranks) -> dict[str, float]:
        """loss, kl, clipped, sampler_gap and nll, and the largest sampler_gap; NaN where no token was scored."""
        ranks.sum_([self.sums])
        self.sums[1:] /= self.sums[-1].clone()
        names, most = ("loss", "kl", "clipped", "sampler_gap", "nll"), max(ranks.gather([float(self.gap_max)]))
        return dict(zip(names, self.sums.tolist(), strict=False)) | {"sampler_gap_max": most}
