"""What a run writes: its flags and their history, the measured rows, the trained model with its card."""

import dataclasses
import json
import shutil
from pathlib import Path

import model as models
from run import files, identity
from run.args import Args, command, data_sets
from run.hub import locate
from run.progress import say
from run.reading import read_json

ALIKE = ("questions", "prompts", "words", "opening", "calibration", "length", "dtype")  # of rows that are compared


def write_args(args: Args, steps: int = 0) -> None:
    """Writes OUT/args.json: the flags, and earlier values of those that changed when a run was resumed.

    history: [{"until": steps, flag: its value until then}, …], in order; only flags that change an update.
    """
    file, kept = Path(args.out) / "args.json", []
    if args.resume:
        known, now = history(args), dataclasses.asdict(args)
        was = now | read_json(file)
        # The run goes back to a checkpoint at `steps`: entries after it are undone, the first of each flag ends here.
        kept = [entry for entry in known if entry["until"] < steps]
        for entry in [entry for entry in known if entry["until"] >= steps][::-1]:
            was |= entry
        names = ["clip_norm", "decay", "lr", "warmup", *["steps"] * ({args.decay, was["decay"]} != {"constant"})]
        if steps and (changed := {name: was[name] for name in names if was[name] != now[name]}):
            kept.append({"until": steps} | changed)
    files.write_json(file, dataclasses.asdict(args) | {"resume": False} | ({"history": kept} if kept else {}))


def history(args: Args) -> list[dict]:
    """The earlier flags of a resumed run, as `write_args` kept them."""
    file = Path(args.out) / "args.json"
    return read_json(file).take("history", list[dict], []) if file.exists() else []


def identify(args: Args, made_of: dict[str, str]) -> dict[str, str]:
    """`made_of` with the hash of --model's weights.

    ValueError where a resumed run was begun with something else, or a frozen data set was labelled with other weights.
    """
    kept, dataset = Path(args.out) / "identity.json", Path(args.dataset) / "manifest.json"
    begun = read_json(kept) if args.resume and kept.exists() else None
    known = {} if begun is None else begun.take("files", dict[str, list[int | str]], {})
    identity.HASHED.update({file: stamp for file, stamp in known.items() if len(stamp) == 4})
    fixed = {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if not f.metadata["on_resume"]}
    set_flags = {name: value for name, value in fixed.items() if value != getattr(Args, name)}
    made_of = made_of | identity.of_model(args.model) | {"flags": identity.digest(set_flags)}
    made_of |= {"dataset": identity.file_digest(dataset.with_name("train.jsonl"))} if args.dataset else {}
    if begun is not None:
        was = begun.take("made_of", dict[str, str], {})
        now = {name: "none" for name in was if name == "dataset"} | made_of
        identity.check_same(was, now, f"the run in {args.out}", "restore it, or start a new run")
        if (before := kept.with_name("before.identity.json")).exists() and before.with_name("before.json").exists():
            advice = f"remove {args.out}/before.*, and it is measured again"
            identity.check_same(read_json(before).get("made_of"), made_of, before, advice)
    elif args.resume:
        say(f"note: {kept} is missing, so nobody knows whether the model and the data are those it was begun with")
    if args.dataset:
        decides = "base" if "base" in made_of and only_explains(args.model) else "weights"
        known, now = read_json(dataset).get("made_of"), {"weights": made_of[decides]}
        identity.check_same(known, now, f"--dataset {args.dataset}", "give that model, or build another")
    return made_of


def write_identity(args: Args, made_of: dict[str, str], stream) -> None:
    """Writes OUT/identity.json, and in OUT/questions.txt the questions that the run trains on or keeps for tests."""
    files.write_json(Path(args.out) / "identity.json", {"made_of": made_of, "files": identity.HASHED})
    seen = identity.list_text(args.model, stream.questions, stream.kept_back)
    files.write_text(Path(args.out) / identity.LIST, seen)


def write_offsets(file: str | Path, subject, questions: int, task: str) -> None:
    """Writes the offsets that so many questions gave, and what they were made of, as a calibration.json."""
    values = {"mean_logp": subject.calibration, "questions": questions, "task": task}
    files.write_json(file, values | {"made_of": subject.made_of})


def write_measured(prefix: str | Path, rows: dict[float, list], fit_rows: list, subject, max_new_tokens: int) -> None:
    """Writes what faith.measure gave: PREFIX.T0.jsonl, …, PREFIX.fit.jsonl, and PREFIX.identity.json."""
    dtype = str(subject.sampler.model.dtype)
    how = {"calibration": subject.calibration, "length": max_new_tokens, "dtype": dtype}
    made_of = subject.made_of | {name: identity.digest(value) for name, value in how.items()}
    parts = {f"T{t:g}": rows[t] for t in rows} | {"fit": fit_rows}
    for part in parts:
        files.write_jsonl(f"{prefix}.{part}.jsonl", parts[part])
    files.write_json(f"{prefix}.identity.json", {"made_of": made_of})


def hashes(file: str | Path) -> dict[str, str]:
    """What an identity.json says; {} if it is missing, as beside measurements of earlier versions."""
    return read_json(file).take("made_of", dict[str, str]) if Path(file).exists() else {}


def check_rows(*rows: str | Path) -> None:
    """Raises ValueError if files of measured rows were made of different things, as far as their identity files say."""
    first, was = None, {}
    for file in map(str, rows):
        if now := hashes(file.removesuffix(".jsonl").rpartition(".")[0] + ".identity.json"):
            both = {name: value for name, value in now.items() if name in (was or now)}  # older files lack some
            identity.check_same(was or now, both, first, f"measure {first} and {file} alike", ALIKE)
            first, was = file, now


def save_model(args: Args, model: models.Transformer, name: str) -> None:
    """Writes the model to OUT/name, with what faith.py must know of the run to measure it."""
    folder = Path(args.out) / name
    if args.resume:  # the run may have written it before it was stopped
        shutil.rmtree(folder, ignore_errors=True)
    paths = data_sets(args.task, args.data).values()
    record = dataclasses.asdict(args) | {"data": ",".join(str(Path(path).resolve()) for path in paths)}
    record |= {"history": earlier} if (earlier := history(args)) else {}
    record |= {"made_of": read_json(folder.parent / "identity.json")["made_of"]}
    also = [("training.json", json.dumps(record, indent=1) + "\n")]
    copied = (identity.LIST, *["calibration.json"] * args.calibrate)
    also += [(name, (folder.parent / name).read_text(encoding="utf-8")) for name in copied]
    with files.errors_named(folder, "written"):
        models.save(model, folder, model_card(args), also=also)


def only_explains(path: str | Path) -> bool:
    """True for an adapter that was trained with --train-only explanation, which is off while the model decides."""
    record = locate(path) / "training.json"
    return record.exists() and read_json(record).take("train_only", str, "") == "explanation"


def model_card(args: Args, figures: str = "") -> str:
    """README.md of a trained model: how it was trained, with the command, and what was measured."""
    how = {"disclosure": "GRPO, reward 1[mention = influence]",
           "detection": "supervised, to say whether an edit changed its answer",
           "imitation": "supervised, on explanations that templates wrote from the labels"}[args.objective]  # fmt: skip
    earlier = ""
    for entry in history(args):
        was = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in entry.items() if name != "until")
        earlier += f"\nup to step {entry['until']} with {was}\n"
    return (f"# {Path(args.out).name}\n\nTrained by faith: {how}, after arXiv 2607.21090.\n\n"
            + f"{args.note}\n\n" * bool(args.note)
            + f"    torchrun train.py {command(args)}\n{earlier}{figures}")  # fmt: skip
