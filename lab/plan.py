"""What a run needs, before it is started: bytes per GPU, whether they fit, what would, and a step's least seconds.

Bytes per weight, in bf16 (fp32, as on a CPU, needs no masters):

    replicate   weights 2, fp32 masters 4, Adam's moments 8, gradients 4 summed in fp32 + 2 of one backward pass
    shard       masters 4, moments 8, gradients 4, all over the number of GPUs; a whole copy that samples 2; buffers
    LoRA        weights 2, frozen, for sampler and trainer alike; 4 + 8 + 4 of the adapters only; no reference

The KL's reference is one more copy. The KV cache stays beside the activations, since CUDA graphs hold it by address.
memory.py counts all of it on the meta device, and says what it assumes of attention. GB are 1e9 bytes: of a GPU sold
as 80 GB torch finds some 85 such, and we count on 80, less the headroom.

The least seconds are those of the products at the peak rate, or of the bytes read where that takes longer.

    python plan.py --model configs/llama-3.1-8b.json --gpus 8 --gpu-memory 80 --kl --recompute
"""

import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import model as models
from lab import memory
from run import files
from run.progress import Parser

HEADROOM = 0.05  # of the memory: CUDA context, NCCL, fragments, the sampler's working tensors


def option(default, text: str, choices=None):
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Setup:
    """What a plan depends on, beside the model; the flags."""

    gpus: int = option(1, "how many")
    gpu_memory_bytes: float = option(80e9, "of each; as a flag in GB (1e9 bytes)")
    prompts: int = option(64, "per step, over all GPUs")
    samples: int = option(16, "per prompt")
    prompt_tokens: int = option(300, "of a prompt")
    new: int = option(200, "tokens of a sample; all are taken to be so long")
    micro: int = option(4, "groups per forward and backward pass")
    lora: int = option(0, "rank of the adapters; 0: all weights are trained")
    kl: bool = option(False, "with a KL to the initial model")
    anchor: bool = option(False, "with train.py's --anchor: X and X' of half as many questions in one pass")
    recompute: bool = option(False, "activation checkpointing")
    parallel: str = option("auto", "replicate, shard, or whichever fits", ("auto", "replicate", "shard"))
    dtype: str = option("bf16", "of the weights: bf16 on GPUs, fp32 on a CPU", tuple(memory.DTYPES))
    attention: str = option("fused", "a fused kernel, or math, which keeps all scores", ("fused", "math"))
    gpu_tflops: float = option(990.0, "dense products, 1e12 operations per second")
    gpu_bandwidth: float = option(3.35, "of a GPU's memory, TB/s")
    gpu_link: float = option(0.45, "from a GPU to the others, TB/s")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, kind, choices = getattr(self, field.name), type(field.default), field.metadata["choices"]
            least = {"lora": 0, "samples": 2, "prompts": 2}.get(field.name, 1)
            if choices and value not in choices:
                raise ValueError(f"{flag(field)} must be one of {', '.join(choices)}, not {value!r}")
            if (kind is int and not value >= least) or (kind is float and not 0 < value < math.inf):
                what = "above 0" if kind is float else f"at least {least}"
                raise ValueError(f"{flag(field)} must be {what}, not {value:g}")
        if self.parallel == "shard" and self.gpus == 1:
            raise ValueError("--parallel shard cuts the model among GPUs, and there is one; raise --gpus or replicate")

    @property
    def share(self) -> int:
        """Prompts of the GPU that has the most."""
        return -(-self.prompts // self.gpus)


def flag(field: dataclasses.Field) -> str:
    return "--" + field.name.removesuffix("_bytes").replace("_", "-")


# ---- seconds -------------------------------------------------------------------------------------------------


def seconds(c: models.Config, setup: Setup, parallel: str, parameters: int, trained: int) -> dict[str, float]:
    """The least a step can take, by phase."""
    item, N, share, cut = memory.DTYPES[setup.dtype].itemsize, setup.gpus, setup.share, parallel == "shard"
    prompt, new, samples, s = setup.prompt_tokens, setup.new, setup.samples, memory.slots(c, setup)
    rate, read = setup.gpu_tflops * 1e12, setup.gpu_bandwidth * 1e12
    head, pair = c.vocab_size * c.hidden_size, 4 * c.layers * c.heads * c.head_dim  # operations of a query and a key
    body = parameters - head * (1 if c.tied else 2)  # two operations per token and weight
    prefill = share * (2 * body * prompt + pair * prompt**2 / 2) / rate
    rows = min(share * samples, s.P * s.G)
    token = rows * (2 * (body + head) + pair * (prompt + new / 2)) / rate
    token = max(token, (item * (body + head) + s.prefix.nbytes + s.own.nbytes / 2) / read)
    # Forward 1, backward 2 (frozen: 1), recomputed 1, reference 1; a chunk's logits are always computed twice.
    more, back = setup.recompute + setup.kl, 1 if setup.lora else 2
    update = 2 * body * (prompt + samples * (new - 1)) * (1 + back + more)
    update += 2 * head * samples * new * (2 + back + setup.kl)
    update += pair * (prompt**2 / 2 + samples * new * (prompt + new / 2)) * (3 + more)
    sent = 8 * trained  # summed and spread
    if cut:  # gathered forward and backward, gradients summed, in each pass; then whole for the copy, in fp32
        sent = -(-share // setup.micro) * (2 * item * parameters + 4 * trained) + 4 * parameters
    out = {
        "labels": 4 * prefill,  # of two questions for each one kept, X and X'
        "prefill": prefill,
        "decode": -(-share * samples // rows) * (new - 1) * token,
        "forward, backward": share * update / rate,
        "communication": sent * (N - 1) / N / (setup.gpu_link * 1e12),
        "optimizer": (28 + item) * trained / (N if cut else 1) / read,
    }
    return out | {"step": sum(out.values()) - min(out["forward, backward"], out["communication"])}  # at best hidden


# ---- the plan ------------------------------------------------------------------------------------------------


def plan(config: models.Config, **settings) -> dict:
    """What a run of `Setup(**settings)` needs: {"parallel", "bytes", "total", "headroom", "fits", "seconds", …}.

    "auto" replicates where that fits, and otherwise shards if there are several GPUs. With LoRA it never does: the
    frozen weights are there in whole anyway, for the sampler. ValueError for what no run can have.
    """
    setup = Setup(**settings)
    if (length := setup.prompt_tokens + setup.new) > config.context:
        raise ValueError(f"--prompt-tokens and --new make {length}, the model's context is {config.context}; lower one")
    room, common = (1 - HEADROOM) * setup.gpu_memory_bytes, memory.passing(config, setup)
    auto = ["replicate", "shard"] if setup.gpus > 1 and not setup.lora else ["replicate"]
    for parallel in auto if setup.parallel == "auto" else [setup.parallel]:
        made = memory.count(config, setup, parallel, common)
        if made["total"] <= room:
            break
    spent = seconds(config, setup, parallel, made["parameters"], made["trained"])
    return {"parallel": parallel, **made, "headroom": round(HEADROOM * setup.gpu_memory_bytes),
            "fits": made["total"] <= room, "seconds": spent}  # fmt: skip


def advice(config: models.Config, setup: Setup) -> tuple[str, dict] | None:
    """What makes the run fit, as flags, the first that does of changes that cost ever more; and the plan with it."""
    fewer = [setup.micro >> i for i in range(1, setup.micro.bit_length())]
    tries: list[dict] = [{"recompute": True}, *({"micro": m} for m in fewer)]
    tries += [{"recompute": True, "micro": m} for m in fewer]
    if setup.parallel == "replicate" and setup.gpus > 1 and not setup.lora:
        tries = [{"parallel": "shard"} | change for change in [{}, *tries]]
    small = {"recompute": True, "micro": 1}
    if not setup.lora:
        tries += [{"lora": 16}, {"lora": 16} | small] + [{"gpus": setup.gpus << i} | small for i in range(1, 8)]
    for change in tries:
        made = plan(config, **dataclasses.asdict(setup) | {"parallel": "auto"} | change)
        if made["fits"]:
            flags = (f"--{key}" if value is True else f"--{key} {value}" for key, value in change.items())
            return " ".join(flags), made
    return None


def show(made: dict, setup: Setup) -> str:
    what = f"LoRA {setup.lora}" if setup.lora else "all weights"
    lines = [f"{made['parameters'] / 1e9:.3f} billion weights, {made['trained'] / 1e9:.3f} of them trained ({what})"]
    lines += [f"{setup.gpus} x {setup.gpu_memory_bytes / 1e9:g} GB, {made['parallel']}, {setup.dtype}, "
              f"{min(setup.micro, setup.share)} groups a pass, {setup.attention} attention\n\nGB per GPU"]  # fmt: skip
    rows = made["bytes"] | {"total": made["total"], "headroom": made["headroom"]}
    notes = {
        "logits chunk": "or the line above, whichever is more",
        "end of the update": "when the four above are gone",
        "headroom": f"{HEADROOM:.0%}, kept free",
    }
    lines += [f"  {name:18}{value / 1e9:8.2f}  {notes.get(name, '')}".rstrip() for name, value in rows.items()]
    over = made["total"] + made["headroom"] - setup.gpu_memory_bytes
    lines.append(f"fits, {-over / 1e9:.2f} GB left" if made["fits"] else f"DOES NOT FIT: {over / 1e9:.2f} GB too much")
    return "\n".join([*lines, "\nseconds, at least", *(f"  {k:18}{v:8.2f}" for k, v in made["seconds"].items())])


def read(path: str) -> models.Config:
    """The config of a model's folder, of a hub id in the local cache, or in a file."""
    if Path(path).is_file():
        return models.Config.from_json(models.read_json(Path(path)), None, path)
    return models.read_config(models.locate(path))


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="plan.py", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="Hugging Face directory, hub id in the local cache, or a config")
    for field in dataclasses.fields(Setup):
        extra = {"dest": field.name, "default": field.default, "help": field.metadata["help"]}
        if field.default is False:
            extra["action"] = "store_true"
        else:
            extra |= {"type": type(field.default), "choices": field.metadata["choices"]}
        parser.add_argument(flag(field), **extra)
    parser.set_defaults(gpu_memory_bytes=80.0)
    parser.add_argument("--json", help="write the plan to this file")
    args = vars(parser.parse_args(argv))
    path, file = args.pop("model"), args.pop("json")
    try:
        setup, config = Setup(**args | {"gpu_memory_bytes": args["gpu_memory_bytes"] * 1e9}), read(path)
        if file and not Path(file).absolute().parent.is_dir():
            raise ValueError(f"{file} cannot be written: make the folder {Path(file).parent} first")
        try:
            made = plan(config, **dataclasses.asdict(setup))
        except (RuntimeError, TypeError) as error:
            what = str(error).split("\n")[0]
            raise ValueError(
                f"{path}: its sizes make no network ({what}); use the config.json of the weights"
            ) from None
        print(show(made, setup))
        if not made["fits"]:
            made["advice"], better = advice(config, setup) or ("", made)
            with_it = f"it fits with {made['advice']}: {better['total'] / 1e9:.2f} GB, {better['parallel']}"
            print(
                "\n" + (with_it if made["advice"] else "nothing tried makes it fit; take larger GPUs or fewer tokens")
            )
        if file:
            files.write_json(file, {"model": path, **dataclasses.asdict(setup), **made})
    except (ValueError, OSError) as error:
        print(f"plan.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
