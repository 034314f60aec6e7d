"""The flags of train.py: everything a run depends on, in one dataclass, saved with the run and read again to resume."""

import argparse
import dataclasses
import json
import math
import shlex
from dataclasses import dataclass
from pathlib import Path

import lora
import reward
import tasks
import toy
from run.progress import Parser


def option(default, text: str, choices=None):
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


ADAPTED = ",".join(lora.TARGETS)


@dataclass
class Args:
    """Everything a run depends on; each field is a flag, and all are saved with the run."""

    model: str = option("toy", "Hugging Face directory, hub id in the local cache, or the embedded toy (toy.py), made "
                        "on first use; toy-qwen3 and toy-plain are others")  # fmt: skip
    task: str = option("toy", "what the questions are", tasks.TASKS)
    data: str = option("", "folder or file with the task's published data; the toy brings its own")
    intervention: str = option("adverb", "what is slipped into a question", reward.KINDS)
    out: str = option("", "folder for metrics, explanations and the trained model; must not hold a run. By default "
                      "a new one in out/")  # fmt: skip
    objective: str = option("disclosure", "GRPO on explanations; or detection: supervised, to say when asked outright "
                            "whether the edit moved the answer (detect.py)", ("disclosure", "detection"))  # fmt: skip
    labels: str = option("on-policy", "influence under the current model, or once from the initial one (the paper)",
                         ("on-policy", "frozen"))  # fmt: skip
    calibrate: bool = option(False, "subtract the initial model's mean log p per letter before each decision")
    calibration_questions: int = option(300, "unedited training questions the calibration is taken from")
    steps: int = option(100, "optimizer steps")
    prompts: int = option(16, "edited questions per step, over all ranks; half of them with influence")
    samples: int = option(8, "explanations sampled per edited question: the group")
    candidates: int = option(256, "edited questions labelled per step at most, in search of a balanced batch")
    frozen_questions: int = option(1000, "with --labels frozen, no --dataset: questions labelled at the start")
    dataset: str = option("", "with --labels frozen: the folder of a `faith.py build`, whose labels are taken")
    max_new_tokens: int = option(48, "an explanation is cut here")
    temperature: float = option(1.0, "of the sampled explanations, and of the scores trained on")
    lr: float = option(1e-5, "AdamW's peak learning rate")
    warmup: int = option(5, "steps of linear warm-up")
    decay: str = option("constant", "learning rate after the warm-up", ("constant", "linear", "cosine"))
    weight_decay: float = option(0.0, "AdamW's")
    beta2: float = option(0.98, "AdamW's second-moment decay; runs are short")
    clip_norm: float = option(1.0, "largest norm of the gradient")
    loss: str = option("dr_grpo", "what a token's loss is divided by: its explanation's length (grpo), all tokens "
                       "of the step (dapo), or max-new-tokens (dr_grpo)", ("grpo", "dapo", "dr_grpo"))  # fmt: skip
    advantage: str = option("std", "divide by the group's standard deviation or not (Dr. GRPO)", ("std", "mean"))
    clip_low: float = option(0.2, "ratios below 1 − this gain nothing more")
    clip_high: float = option(0.2, "ratios above 1 + this gain nothing more")
    kl: float = option(0.0, "weight β of the KL to the initial model (k3 estimator); 0 runs no reference. Not for "
                       "--objective detection")  # fmt: skip
    anchor: float = option(0.0, "weight of KL(initial ‖ current) over the option letters of training questions, which "
                           "keeps decisions where they were; 0: off (ours)")  # fmt: skip
    anchor_questions: int = option(150, "with --anchor: training questions, X and X', labelled by the initial model")
    opening: str = option("", "every explanation is forced to begin so, {letter} being the option picked (ours)")
    lora: int = option(0, "rank of LoRA adapters, trained in place of the weights and saved as a PEFT adapter; 0: all "
                       "weights are trained")  # fmt: skip
    lora_alpha: float = option(32.0, "with --lora: adapters are scaled by alpha / rank")
    lora_targets: str = option(ADAPTED, "with --lora: the layers that have adapters")
    parallel: str = option("auto", "several ranks: each has all weights, masters and moments (replicate), or a part of "
                           "them and a frozen copy to sample from (shard: FSDP2). auto: replicate where it fits",
                           ("auto", "replicate", "shard"))  # fmt: skip
    recompute: bool = option(False, "activation checkpointing: less memory, a third more work in the update")
    updates: int = option(1, "optimizer updates per batch of explanations")
    micro: int = option(4, "groups per forward and backward pass; the result does not depend on it")
    eval_questions: int = option(300, "test questions measured before and after, never trained on; 0: none")
    eval_before: bool = option(True, "measure the initial model too; not needed where another run has")
    fit_questions: int = option(300, "training questions the shortcut baseline is fitted on")
    note: str = option("", "a line for the model card, such as where the weights come from")
    save_every: int = option(0, "also save the model every so many steps, as OUT/step-N; 0: only at the end")
    checkpoint_every: int = option(20, "steps between checkpoints, the last two are kept; 0: none, not even when "
                                   "the run is stopped")  # fmt: skip
    resume: bool = option(
        False, "go on with the run in --out from its last checkpoint, with its flags but for those given"
    )
    seed: int = option(0, "of everything drawn")


# The smallest values of flags. Batches are half and half, and groups compare samples: so 2 of each.
LEAST = {"prompts": 2, "samples": 2, "candidates": 2, "frozen_questions": 2, "steps": 1, "micro": 1, "updates": 1,
         "max_new_tokens": 1, "fit_questions": 1, "calibration_questions": 1, "eval_questions": 0, "warmup": 0,
         "save_every": 0, "checkpoint_every": 0, "seed": 0, "clip_low": 0, "clip_high": 0, "kl": 0, "anchor": 0,
         "anchor_questions": 1, "weight_decay": 0, "lora": 0}  # fmt: skip


# What may be given anew with --resume. Another split, seed or batch would make it a run that nobody can repeat.
CHANGEABLE = {"resume", "out", "steps", "lr", "warmup", "decay", "clip_norm", "micro", "parallel", "recompute", "note",
              "save_every", "checkpoint_every"}  # fmt: skip


def check(args: Args) -> None:
    """ValueError for a value that no run can have."""
    for name, least in LEAST.items():
        if not getattr(args, name) >= least:  # so written, NaN fails too
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(args, name)}")
    for name in ("temperature", "lr", "clip_norm", "lora_alpha"):
        if not 0 < getattr(args, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {getattr(args, name)}")
    if not 0 <= args.beta2 < 1:
        raise ValueError(f"--beta2 must be at least 0 and below 1, not {args.beta2}")
    if args.dataset and args.labels != "frozen":
        raise ValueError("--dataset holds frozen labels; add --labels frozen, or leave it out")
    if args.prompts % 2:
        raise ValueError(f"--prompts must be even, half with influence and half without, not {args.prompts}")
    if args.seed >= 2**31:
        raise ValueError(f"--seed must be below 2^31, not {args.seed}")


def command(args: Args) -> str:
    """The flags that give these arguments, those at their defaults left out."""
    flags = []
    for field in dataclasses.fields(Args):
        name, value = field.name.replace("_", "-"), getattr(args, field.name)
        if value != field.default and name != "resume":
            flags += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return shlex.join(flags)


def parse(argv: list[str] | None = None) -> Args:
    parser = Parser(prog="train.py", description=__doc__.split("\n")[0])
    for field in dataclasses.fields(Args):
        flag = "--" + field.name.replace("_", "-")
        extra = {"help": f"{field.metadata['help']} (default: {field.default})"}
        if isinstance(field.default, bool):
            extra["action"] = argparse.BooleanOptionalAction
        else:
            extra |= {"type": type(field.default), "choices": field.metadata["choices"]}
        parser.add_argument(flag, default=field.default, **extra)
    given = parser.parse_args(argv)
    if given.resume:
        try:
            record = json.loads((Path(given.out) / "args.json").read_text())
            record = {f.name: type(f.default)(record[f.name]) for f in dataclasses.fields(Args) if f.name in record}
            parser.set_defaults(**record)
        except (OSError, ValueError, TypeError) as error:
            parser.error(f"--resume: --out {given.out!r} is not the folder of a run ({error})")
        parser.set_defaults(resume=True)
        again = vars(parser.parse_args(argv))
        for field in dataclasses.fields(Args):
            was = record.get(field.name, field.default)  # of a run from before there was the flag
            if field.name not in CHANGEABLE and again[field.name] != was:
                flag = field.name.replace("_", "-")
                parser.error(f"--{flag} was {was!r} and cannot change in a run that goes on; start a new one")
    elif given.model.startswith("toy"):
        parser.set_defaults(**toy.SETTINGS)
    return Args(**vars(parser.parse_args(argv)))
