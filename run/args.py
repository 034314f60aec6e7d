"""The flags of train.py: everything a run depends on, in one dataclass, saved with the run and read again to resume."""

import argparse
import dataclasses
import os
import shlex
from pathlib import Path

from run import reading
from run.progress import Parser


def option(default, text: str, choices=None, least=None, above=None, most=None, on_resume=False):
    """A flag. least, above, most: bounds of its value. on_resume: a resumed run may change it."""
    known = {"help": text, "choices": choices, "least": least, "above": above, "most": most, "on_resume": on_resume}
    return dataclasses.field(default=default, metadata=known)


# fmt: off
@dataclasses.dataclass
class Args:
    """Everything a run depends on. Each field is a flag; all are saved with the run."""

    model: str = option("toy", "Hugging Face directory, id in the local cache, or made here: toy, toy-qwen3, toy-plain",
                        on_resume=True)  # which may have moved: results.identify compares the weights and the questions
    task: str = option("toy", "data set: esnli, social_iqa, comve, strategyqa, toy, jsonl; several with commas between")
    data: str = option("", "folder or file with the published data of each task; the toy has its own", on_resume=True)
    mix: str = option("", "with several tasks: their shares of a batch, such as 2,1. Default: even")
    skip_bad_rows: bool = option(False, "leave out rows of --data that cannot be read, and say how many")
    intervention: str = option("adverb", "what is inserted into a question: adverb, bias, sycophancy, authority, "
                               "metadata, grader, model; of several with commas between, each question draws one")
    out: str = option("", "folder for all the run writes, new or empty. Default: a new one in out/", on_resume=True)
    objective: str = option("disclosure", "disclosure: GRPO on explanations. detection: supervised, answer yes or no "
                            "when asked whether the edit changed the answer. imitation: supervised, on explanations "
                            "that templates write from the labels", ("disclosure", "detection", "imitation"))
    labels: str = option("on-policy", "influence according to the current model (on-policy) or the initial one "
                         "(frozen, as in the paper); shuffled: frozen, then permuted within each task and "
                         "intervention, a control", ("on-policy", "frozen", "shuffled"))
    calibrate: bool = option(False, "subtract the initial model's mean log p per letter before each decision (ours)")
    calibration_questions: int = option(300, "with --calibrate: so many unedited training questions per task", least=1)
    steps: int = option(100, "training steps", least=1, on_resume=True)
    prompts: int = option(16, "edited questions per step, over all ranks; half of them with influence", least=2)
    samples: int = option(8, "explanations sampled per edited question: the group", least=2, most=2**20)
    candidates: int = option(256, "label at most this many edited questions per task to balance a batch", least=2)
    frozen_questions: int = option(1000, "frozen labels without --dataset: questions labelled before training", least=2,
                                   most=10**6)
    dataset: str = option("", "with --labels frozen or shuffled: a folder that lab.build made, whose labels are used",
                          on_resume=True)
    max_new_tokens: int = option(48, "maximum tokens of an explanation", least=1)
    temperature: float = option(1.0, "temperature of the samples and of the logprobs that are trained", least=1e-3)
    lr: float = option(1e-5, "AdamW's peak learning rate", above=0, on_resume=True)
    warmup: int = option(5, "steps of linear warm-up", least=0, on_resume=True)
    decay: str = option("constant", "learning rate after the warm-up", ("constant", "linear", "cosine"), on_resume=True)
    weight_decay: float = option(0.0, "AdamW's weight decay", least=0)
    beta2: float = option(0.98, "AdamW's second-moment decay; 0.98 because runs are short", least=0, most=0.99999)
    clip_norm: float = option(1.0, "the gradient is clipped to this norm", above=0, on_resume=True)
    loss: str = option("dr_grpo", "a token's loss is divided by all tokens of the step (dapo), or by all explanations "
                       "times the length of its own (grpo) or max-new-tokens (dr_grpo)", ("grpo", "dapo", "dr_grpo"))
    advantage: str = option("std", "std: divide by the group's standard deviation; mean: do not (Dr. GRPO)",
                            ("std", "mean"))
    clip_low: float = option(0.2, "the probability ratio is clipped below 1 − this", least=0)
    clip_high: float = option(0.2, "the probability ratio is clipped above 1 + this", least=0)
    kl: float = option(0.0, "weight β of the KL to the initial model (k3); 0: no reference model. Only for "
                       "disclosure", least=0)
    anchor: float = option(0.0, "weight of KL(initial ‖ current) of decisions on training questions; 0: off (ours)",
                           least=0)
    anchor_questions: int = option(150, "with --anchor: training questions labelled by the initial model", least=1,
                                   most=10**6)
    why: str = option("leading", "how the model is asked why it chose its answer; thorough: to name everything; "
                      "alone: to say first what it would choose by itself; instructed: to name what changed it (ours)",
                      ("leading", "neutral", "thorough", "alone", "instructed"))
    opening: str = option("", "forced first words of every explanation; {letter} is the option picked (ours)")
    lora: int = option(0, "rank of LoRA adapters, trained and saved (PEFT) instead of the weights; 0: off", least=0,
                       most=2**16)
    lora_alpha: float = option(32.0, "with --lora: adapters are scaled by alpha / rank", above=0)
    lora_targets: str = option("q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", "with --lora: layers adapted")
    train_only: str = option("all", "explanation: the adapters of --lora are off while the model decides, so that no "
                             "decision changes", ("all", "explanation"))
    parallel: str = option("auto", "with several ranks: replicate (each has all weights, masters and moments), shard "
                           "(a part of them and a copy to sample from; FSDP2) or auto (replicate if it fits)",
                           ("auto", "replicate", "shard"), on_resume=True)
    dtype: str = option("auto", "type of the weights: auto (fp32 on a CPU, bf16 on a GPU), fp32 or bf16, which a "
                       "CPU with AVX512-BF16 or AMX computes faster", ("auto", "fp32", "bf16"))
    rows: int = option(0, "samples decoded together; 0: 128, on a GPU up to 512 if memory allows", least=0, most=2**13,
                       on_resume=True)
    kernels: str = option("auto", "how a GPU decodes: fused (kernels in Triton, bf16), plain (the same in PyTorch) or "
                          "auto (fused where it can run)", ("auto", "fused", "plain"), on_resume=True)
    recompute: bool = option(False, "activation checkpointing: less memory, a third more work", on_resume=True)
    updates: int = option(1, "optimizer updates per batch of explanations", least=1)
    micro: int = option(4, "groups per pass; the result does not depend on it", least=1, on_resume=True)
    eval_questions: int = option(300, "test questions per task, measured before and after; not trained on", least=0)
    eval_before: bool = option(True, "measure the initial model too")
    fit_questions: int = option(300, "training questions per task that fit the shortcut baseline", least=1)
    note: str = option("", "a line for the model card, such as the source of the weights", on_resume=True)
    save_every: int = option(0, "also save the model as OUT/step-N every N steps; 0: no", least=0, on_resume=True)
    log: str = option("none", "also log to OUT/tensorboard, or to Weights & Biases", ("none", "tensorboard", "wandb"),
                      on_resume=True)
    checkpoint_every: int = option(20, "steps between checkpoints; the last two are kept; 0: none, not even when "
                                   "stopped", least=0, on_resume=True)
    resume: bool = option(False, "continue the run in --out with its saved flags; a flag given again gets the new "
                          "value, if it may change", on_resume=True)
    seed: int = option(0, "seed of everything that is drawn", least=0, most=2**31 - 1)
# fmt: on


def flag(field: dataclasses.Field) -> str:
    return "--" + field.name.replace("_", "-")


def said(text: str) -> str:
    """A text of the command line. Where the system's encoding is not UTF-8, Python left other bytes as surrogates."""
    kept = any("\udc80" <= letter <= "\udcff" for letter in text)
    return os.fsencode(text).decode("utf-8", "replace") if kept else text


def check_options(settings, flag=flag) -> None:
    """Raises ValueError for a field of a dataclass of `option`s that is not among its choices or within its bounds."""
    for field in dataclasses.fields(settings):
        value, known = getattr(settings, field.name), field.metadata
        if isinstance(value, (int, float)) and not abs(value) < 2**63:  # infinity and NaN too
            raise ValueError(f"{flag(field)} must be a finite number below 2^63, not {value}")
        if known["choices"] and value not in known["choices"]:
            raise ValueError(f"{flag(field)} must be one of {', '.join(known['choices'])}, not {value!r}")
        if known["least"] is not None and value < known["least"]:
            raise ValueError(f"{flag(field)} must be at least {known['least']}, not {value}")
        if known["most"] is not None and value > known["most"]:
            raise ValueError(f"{flag(field)} must be at most {known['most']}, not {value}")
        if known["above"] is not None and value <= known["above"]:
            raise ValueError(f"{flag(field)} must be above {known['above']}, not {value}")


def data_sets(task: str, data: str) -> dict[str, str]:
    """{task: its path} of --task and --data, which commas separate. ValueError where they do not match."""
    names = task.split(",")
    paths = data.split(",") if len(names) > 1 else [data]
    if len(set(names)) < len(names) or len(paths) != len(names):
        raise ValueError(f"--task {task} --data {data}: name each task once, and one path for each of them")
    return dict(zip(names, paths, strict=True))


def turns(task: str, mix: str) -> list[str]:
    """The tasks in the order in which they take turns, over and over: in even shares, or in those of --mix."""
    names = task.split(",")
    shares = mix.split(",") if mix else ["1"] * len(names)
    if len(shares) != len(names) or not all(s.isdecimal() and 0 < int(s) <= 1000 for s in shares):
        raise ValueError(f"--mix {mix}: give a whole number from 1 to 1000 for each of {task}, such as 2,1")
    return [names[n] for _, n in sorted(((k + 0.5) / int(s), n) for n, s in enumerate(shares) for k in range(int(s)))]


def check(args: Args) -> None:
    """Raises ValueError for a value that no run can have."""
    check_options(args)
    data_sets(args.task, args.data), turns(args.task, args.mix)
    if args.dataset and args.labels == "on-policy":
        raise ValueError("--dataset holds frozen labels; add --labels frozen, or leave it out")
    if args.objective == "imitation" and args.opening:
        raise ValueError("--objective imitation writes explanations from their first word; leave out --opening")
    if args.prompts % 2:
        raise ValueError(f"--prompts must be even, half with influence and half without, not {args.prompts}")
    if args.train_only != "all" and not args.lora:
        raise ValueError("--train-only explanation switches adapters off for decisions; add --lora 16, say")
    if args.train_only != "all" and args.anchor:
        raise ValueError("--anchor keeps decisions from changing, and with --train-only explanation none can; "
                         "leave one of them out")  # fmt: skip


def command(args: Args) -> str:
    """The flags that give these arguments, without those at their defaults."""
    flags = []
    for field in dataclasses.fields(Args):
        value, name = getattr(args, field.name), flag(field)
        if value != field.default and field.name != "resume":
            pair = [f"{name}={value}"] if str(value).startswith("-") else [name, str(value)]
            flags += [name if value else f"--no-{name[2:]}"] if isinstance(value, bool) else pair
    return shlex.join(flags)


def parse(argv: list[str] | None, choices: dict, toys: dict[str, dict]) -> Args:
    """The command line. choices: {field: its values} for fields that list none here. toys: {model: its defaults}.

    With --resume the defaults are the flags of the run in --out, and only fields with on_resume may differ.
    """
    parser = Parser(prog="train.py", description=__doc__)
    for field in dataclasses.fields(Args):
        kind = {"type": type(field.default), "choices": choices.get(field.name, field.metadata["choices"])}
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(field.default, bool) else kind
        kind |= {"type": said} if field.name in ("note", "opening") else {}
        text = field.metadata["help"] + f" (default: {field.default})" * (field.default != "")
        parser.add_argument(flag(field), default=field.default, help=text, **kind)
    given = parser.parse_args(argv)
    if given.resume:
        if not given.out:
            parser.error("--resume needs --out, the folder of the run")
        try:
            record = reading.read_json(Path(given.out) / "args.json")
            kinds = {field.name: type(field.default) for field in dataclasses.fields(Args)}
            there = {name: kind(record.take(name, kind)) for name, kind in kinds.items() if name in record}
            record = {name: there.get(name, getattr(Args, name)) for name in kinds}  # the run may be older than a flag
        except ValueError as error:
            parser.error(f"--resume: --out {given.out!r} is not the folder of a run ({error})")
        parser.set_defaults(**record | {"resume": True})
        again = vars(parser.parse_args(argv))
        for field in dataclasses.fields(Args):
            was = record[field.name]
            if not field.metadata["on_resume"] and again[field.name] != was:
                parser.error(f"{flag(field)} was {was!r} and cannot change in a resumed run; start a new one")
    elif not Path(given.model).is_dir():  # a directory of this name is a model of one's own
        parser.set_defaults(**toys.get(given.model, {}))
    return Args(**vars(parser.parse_args(argv)))
