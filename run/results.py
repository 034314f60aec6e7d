"""What a run writes: its flags and their history, the measured rows, the trained model with its card."""

import dataclasses
import json
import shutil
from pathlib import Path

import model as models
from run import files
from run.args import Args, command


def write_args(args: Args, steps: int = 0) -> None:
    """Writes OUT/args.json: the flags, and earlier values of those that changed when a run was resumed.

    history: [{"until": steps, flag: its value until then}, …], in order; only flags that change an update.
    """
    file, kept = Path(args.out) / "args.json", []
    if args.resume:
        was, known = json.loads(file.read_text()), history(args)
        # The run goes back to a checkpoint at `steps`: entries after it are undone, and the first of them ends here.
        undone = [entry for entry in known if entry["until"] >= steps][:1]
        kept = [entry for entry in known if entry["until"] < steps] + [entry | {"until": steps} for entry in undone]
        names = ["clip_norm", "decay", "lr", "warmup"]
        if {args.decay, was.get("decay")} != {"constant"}:
            names.insert(3, "steps")
        changed = {name: was[name] for name in names if name in was and was[name] != getattr(args, name)}
        if steps and changed and not undone:
            kept.append({"until": steps} | changed)
    files.write_json(file, dataclasses.asdict(args) | {"resume": False} | ({"history": kept} if kept else {}))


def history(args: Args) -> list[dict]:
    """The earlier flags of a resumed run, as `write_args` kept them."""
    file = Path(args.out) / "args.json"
    return json.loads(file.read_text()).get("history", []) if file.exists() else []


def write_measured(args: Args, name: str, rows: dict[float, list], fit_rows: list, summaries: dict) -> None:
    """Writes what faith.measure gave (OUT/name.T0.jsonl, …, OUT/name.fit.jsonl) and its summary (OUT/name.json)."""
    parts = {f"T{t:g}": rows[t] for t in rows} | {"fit": fit_rows}
    for part in parts:
        files.write_jsonl(Path(args.out) / f"{name}.{part}.jsonl", parts[part])
    files.write_json(Path(args.out) / f"{name}.json", summaries)


def save_model(args: Args, model: models.Transformer, name: str) -> None:
    """Writes the model to OUT/name, with what faith.py must know of the run to measure it."""
    folder = Path(args.out) / name
    if args.resume:  # the run may have written it before it was stopped
        shutil.rmtree(folder, ignore_errors=True)
    record = dataclasses.asdict(args) | {"data": str(Path(args.data).resolve())}
    record |= {"history": earlier} if (earlier := history(args)) else {}
    also = [("training.json", json.dumps(record, indent=1) + "\n")]
    if args.calibrate:
        also.append(("calibration.json", (folder.parent / "calibration.json").read_text()))
    with files.errors_named(folder):
        models.save(model, folder, model_card(args), also=also)


def model_card(args: Args, figures: str = "") -> str:
    """README.md of a trained model: how it was trained, with the command, and what was measured."""
    how = {"disclosure": "GRPO, reward 1[mention = influence]",
           "detection": "supervised, to say whether an edit changed its answer"}[args.objective]  # fmt: skip
    earlier = ""
    for entry in history(args):
        was = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in entry.items() if name != "until")
        earlier += f"\nup to step {entry['until']} with {was}\n"
    return (f"# {Path(args.out).name}\n\nTrained by faith: {how}, after arXiv 2607.21090.\n\n"
            + f"{args.note}\n\n" * bool(args.note)
            + f"    torchrun train.py {command(args)}\n{earlier}{figures}")  # fmt: skip
