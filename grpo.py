"""The GRPO loss, as pure functions: advantages, weights, clipping, KL, and the logprobs they need.

    loss = Σ over explanation tokens of  w · (−min(ρ A, clip(ρ, 1 − low, 1 + high) A) + β KL)
    ρ = exp(logp − logp when sampled)

with A the advantage of the token's explanation within its group. Here GRPO (2402.03300), DAPO (2503.14476)
and Dr. GRPO (2503.20783) differ in the weight w and in whether A is divided by the group's standard deviation.
The parts of the loss that a fork may change are here; train.step combines them.

Axes: P groups (prompts), G explanations per group, T tokens laid end to end, M explanation tokens, E hidden size,
V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import model as models
from run.attention import over_parts
from run.device import send

CHUNK, CHUNK_CUDA = 256, 1024  # tokens whose logits exist at the same time


def advantages(rewards: Tensor, form: str) -> Tensor:
    """Group advantages (P, G) of rewards (P, G). "std": divided by std (ddof 1) + 1e-4, as in TRL; "mean": not.

    The groups are those of one pass (--micro), so one group's advantages must not depend on another's rewards.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    return {"std": centred / (rewards.std(1, keepdim=True) + 1e-4), "mean": centred}[form]


def token_weights(lengths: Tensor, form: str, max_new_tokens: int, sequences: int, tokens: int) -> Tensor:
    """Weight of every token of completions with `lengths` (n,), flat (sum of lengths,).

    sequences, tokens: totals of the *whole step*, over all micro-batches and ranks, so that the loss does not depend on
    how the step is split.
    """
    weight = {
        "grpo": 1.0 / (sequences * lengths.float()),
        "dapo": torch.full(lengths.shape, 1.0 / tokens),
        "dr_grpo": torch.full(lengths.shape, 1.0 / (sequences * max_new_tokens)),
    }
    return weight[form].repeat_interleave(lengths)


def policy_loss(logprobs: Tensor, old: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """PPO's clipped objective per token, negated. logprobs, old (recorded when sampling), advantage: (M,) fp32."""
    ratio = (logprobs - old).exp()
    return -torch.min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def kl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(policy ‖ reference) per sampled token (M,): never negative, low variance."""
    gap = reference - logprobs
    return gap.exp() - gap - 1


@dataclass
class Packed:
    """Groups laid end to end in one row: a prompt once, then its completions."""

    tokens: Tensor  # (1, T)
    positions: Tensor  # (1, T); a completion's positions continue its prompt's
    parts: list  # who sees whom: see run/attention.py
    sources: Tensor  # (M,): place of the state that predicts each completion token
    targets: Tensor  # (M,): the completion tokens


def pack(groups: list[tuple[list[int], list[list[int]]]], device="cpu") -> Packed:
    """Packs (prompt, completions) groups; M runs over groups, then completions, then their tokens.

    A completion sees the prompt and itself, so each logprob is as if it were alone. The prompt is computed once and
    there is no padding. With one completion per group this is the plain form.
    """
    tokens, positions, parts, sources, targets = [], [], [], [], []
    for prompt, completions in groups:
        first, after = len(tokens), len(tokens) + len(prompt)
        tokens += prompt
        positions += range(len(prompt))
        parts.append((first, after, first, first, [len(prompt)]))
        for completion in completions:
            # Token t is predicted at token t − 1, the first at the prompt's last token. The last token is not an input.
            sources += [after - 1, *range(len(tokens), len(tokens) + len(completion) - 1)]
            targets += completion
            positions += range(len(prompt), len(prompt) + len(completion) - 1)
            tokens += completion[:-1]
        if lengths := [len(completion) - 1 for completion in completions if len(completion) > 1]:
            parts.append((after, len(tokens), first, after, lengths))
    tokens, positions, sources, targets = (send(x, device) for x in ([tokens], [positions], sources, targets))
    return Packed(tokens, positions, parts, sources, targets)


def token_logprobs(model: models.Transformer, packed: Packed, temperature: float, chunk: int = 0) -> Tensor:
    """Logprobs (M,) fp32 of the packed completion tokens under softmax(logits / T), as the sampler scored them.

    The head runs on completion positions only, in chunks recomputed in the backward pass: fp32 logits over the
    vocabulary, the peak of memory, never exist for more than `chunk` tokens (0: what suits the device).
    """
    attend = over_parts(packed.parts, packed.tokens.device)
    states = model.hidden(packed.tokens, packed.positions, attend=attend)[0, packed.sources]

    def score(states: Tensor, targets: Tensor) -> Tensor:  # (m, E), (m,) -> (m,)
        logits = model.head(states).float().div_(temperature)
        return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)

    chunk = chunk or (CHUNK_CUDA if states.is_cuda else CHUNK)
    pieces = zip(states.split(chunk), packed.targets.split(chunk), strict=True)
    return torch.cat([checkpoint(score, s, t, use_reentrant=False, preserve_rng_state=False) for s, t in pieces])


def informative(rewards: list[list[float]]) -> list[int]:
    """Indices of the groups whose rewards are not all equal. The others have no advantage, and so no gradient."""
    return [i for i, group in enumerate(rewards) if min(group) < max(group)]
