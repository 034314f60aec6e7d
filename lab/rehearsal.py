"""A rehearsal: before step 1 on a GPU, one pass as large as any that may come. If memory is too small, it shows now."""

import time
from dataclasses import replace

import torch

import train
from batches import DecisionAnchor
from faith import Case, Subject
from lab import fits
from rollout import Completion, sized
from run.args import Args
from run.memory import free_bytes
from run.policy import Policy
from run.ranks import Ranks
from tasks import Question


def rehearse(subject: Subject, policy: Policy, questions: list[Question], args: Args, ranks: Ranks) -> None:
    """The largest micro-batch that may come, forward and backward, so that memory runs out now and not after hours.

    It is of the longest prompts, with explanations of --max-new-tokens. The sampler's cache and AdamW's moments, which
    stay in memory from step 1 on, are allocated too. No random number is drawn, and nothing stays. ValueError if memory
    is too small.
    """
    model, device, longest = policy.model, ranks.device, fits.longest(subject, questions, args.intervention)
    share, half = (-(-count // ranks.world) for count in (args.prompts, args.prompts // 2))  # the most that a rank has
    answer = Completion([0] * args.max_new_tokens, [0.0] * args.max_new_tokens, False)
    groups = [(prompt, [answer] * args.samples) for _, prompt in longest[-min(args.micro, share) :]]
    anchored = [
        (Case(replace(asked, appeal=""), asked, None), dict.fromkeys(("p", "p_edit"), [0.0] * len(asked.options)))
        for asked, _ in longest[-min(args.micro, half) :]
    ]
    sizes = share, args.samples, len(longest[-1][1]), args.max_new_tokens, subject.sampler.static
    try:
        _, slots = sized(model.config, model.dtype, args.rows, free_bytes(device), *sizes)
        held = [torch.empty(slots.kv_bytes(), dtype=torch.uint8, device=device)]
        held += [torch.empty_like(master) for master in policy.masters for _ in ("exp_avg", "exp_avg_sq")]
        if args.anchor:
            policy.backward(DecisionAnchor(subject, policy, [], args, ranks).divergence(anchored))
        train.backward(
            policy, *train.micro_batch(groups, [[0.0] * args.samples] * len(groups), [1, 1], args, device), args
        )
    except torch.OutOfMemoryError as error:
        more = ["--recompute"] * (not args.recompute) + ["--lora 16"] * (not args.lora)
        line = (f"the largest micro-batch does not fit into memory ({str(error).split(' GPU ')[0].strip('. ')}); lower "
                f"--micro {args.micro}, --rows, --samples {args.samples} or --max-new-tokens {args.max_new_tokens}"
                + f", or add {' or '.join(more)}" * bool(more))  # fmt: skip
        if policy.sharded:  # the other ranks wait in the middle of a pass, so this one speaks for itself
            time.sleep(10 * (ranks.rank > 0))  # if the first one fails too, its line is enough
            ranks.leave(), ranks.refuse(line)
        raise ValueError(line) from None
    policy.adam.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # CUDA graphs cannot take what torch has cached
