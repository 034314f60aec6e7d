"""What a run leaves behind: the trained model with its card, figures before beside after, examples, curves."""

import dataclasses
import json
import shutil
from pathlib import Path

import faith
import lora
import model as models
import report
import reward
from faith import Case
from lab import plot
from run import files
from run.args import Args, command


def note(args: Args, steps: int = 0) -> None:
    """Writes OUT/args.json: the flags, and what they were in a run that after `steps` steps goes on with others.

    history: [{"until": steps, flag: what it was}, …], in order; without what changes no update.
    """
    file, kept = Path(args.out) / "args.json", []
    if args.resume:
        was, known = json.loads(file.read_text()), history(args)
        gone = [entry for entry in known if entry["until"] >= steps][:1]  # back to an earlier checkpoint
        kept = [entry for entry in known if entry["until"] < steps] + [entry | {"until": steps} for entry in gone]
        matter = {"lr", "warmup", "decay", "clip_norm"}
        if {args.decay, was.get("decay")} != {"constant"}:
            matter.add("steps")
        changed = {name: was[name] for name in sorted(matter & was.keys()) if was[name] != getattr(args, name)}
        if steps and changed and not gone:
            kept.append({"until": steps} | changed)
    files.write_json(file, dataclasses.asdict(args) | {"resume": False} | ({"history": kept} if kept else {}))


def history(args: Args) -> list[dict]:
    """What `note` kept of the flags that a resumed run had before."""
    file = Path(args.out) / "args.json"
    return json.loads(file.read_text()).get("history", []) if file.exists() else []


def save(args: Args, model: models.Transformer, name: str) -> None:
    """Writes the model to OUT/name, with what faith.py must know of the run to measure it."""
    out = Path(args.out)
    if args.resume:  # what the run wrote before it was stopped is written anew
        shutil.rmtree(out / name, ignore_errors=True)
    record = dataclasses.asdict(args) | {"data": str(Path(args.data).resolve())}
    record |= {"history": earlier} if (earlier := history(args)) else {}
    also = [("training.json", json.dumps(record, indent=1) + "\n")]
    if args.calibrate:
        also.append(("calibration.json", (out / "calibration.json").read_text()))
    try:
        (lora if args.lora else models).save(model, out / name, model_card(args), also=also)
    except OSError as error:
        raise ValueError(f"{out / name}: cannot be written ({error.strerror})") from error


def model_card(args: Args, figures: str = "") -> str:
    said = f"{args.note}\n\n" if args.note else ""
    earlier = ""
    for entry in history(args):
        was = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in entry.items() if name != "until")
        earlier += f"\nup to step {entry['until']} with {was}\n"
    how = {"disclosure": "GRPO, reward 1[mention = influence]",
           "detection": "supervised, to say whether an edit moved its answer"}[args.objective]  # fmt: skip
    return (
        f"# {Path(args.out).name}\n\nTrained by faith: {how}, after arXiv 2607.21090.\n\n"
        f"{said}    torchrun train.py {command(args)}\n{earlier}{figures}"
    )


def examples(test: list[Case], before: list[dict], after: list[dict], n: int = 5) -> str:
    """n test questions and what was said of them: the first where the edit moved the answer, and the first others."""
    cases, old = {case.question.id: case for case in test}, {row["id"]: row for row in before}
    moved, unmoved = ([row for row in after if row["influence"] == i] for i in (1, 0))
    lines = []
    for row in moved[: (n + 1) // 2] + unmoved[: n // 2]:
        text = " ".join(faith.ask(cases[row["id"]].edited).split("\n")[:-1])
        picks = " → ".join(faith.LETTERS[row[key]] for key in ("y", "y_edit"))
        lines.append(f"\n{text}\n    {row['text_inserted']!r}: {picks}, I = {row['influence']}")
        if row["id"] in old:
            was = old[row["id"]]
            lines.append(f"    before  r = {reward.reward(was['mention'], was['influence']):g}  {was['text']!r}")
        lines.append(f"    after   r = {reward.reward(row['mention'], row['influence']):g}  {row['text']!r}")
    return "\n".join(lines)


def finish(args: Args, test: list[Case], before: dict, after: dict) -> None:
    """Prints before and after side by side, with examples, draws the curves, and fills in the model's card."""
    out, figures = Path(args.out), ""
    for t in after:
        name = f"T={t:g}"
        phases = ("before", "after") if before else ("after",)
        columns = {phase: json.loads((out / f"{phase}.json").read_text())[name] for phase in phases}
        if before:
            columns["difference (paired)"] = report.compare(before[t], after[t], args.seed)
            files.write_json(out / f"difference.T{t:g}.json", columns["difference (paired)"])
        print(f"\n{len(after[t])} test questions, {name}\n" + report.table(columns), flush=True)
        figures += f"\n{len(after[t])} test questions, {name}\n\n" + report.table(columns, markdown=True) + "\n"
    if after:
        print(f"\nExplanations at T={max(after):g}:\n" + examples(test, before.get(max(after), []), after[max(after)]))
    files.write_text(out / "model" / "README.md", model_card(args, figures))
    print(f"\nthe trained model is in {out / 'model'}; metrics.jsonl and explanations.jsonl beside it")
    try:
        print(f"the curves of the run: {plot.curves([out], out / 'curves.png')}", flush=True)
    except (ImportError, ValueError, KeyError, OSError) as error:  # a picture is not worth a run
        print(f"no picture of the run: {error}; then `python plot.py {out}`", flush=True)
