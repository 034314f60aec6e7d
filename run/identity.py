"""What a result was made of, as sha256 hashes, and the refusal to mix results that were made of different things.

    weights      the model's safetensors files (of an adapter: its base's too)
    base         of an adapter that was trained on: its base's weights
    config       the switches of model.Config, with the tokens that end an answer
    tokenizer    tokenizer.json, and the chat turns as they are rendered
    opening      the words that an explanation must begin with, and --why where it is not leading
    prompts      the texts around a question: how it is asked, how the explanation is asked for
    words        the word lists and the sentences that an edit inserts
    questions    the questions as loaded, in their order
    dataset      the cases of --dataset
    flags        of a run: those that a resumed run may not change

They are stored with the results: in OUT/identity.json of a run, the manifest.json of a checkpoint and of a data
set, PREFIX.identity.json of measured rows, calibration.json, and training.json of a trained model. Whoever reads one of
these calls `check_same`. A trained model also lists the questions of its run (questions.txt), for `check_unseen`.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from run.hub import base_of, locate, weight_files
from run.reading import lines_of, read_json

HASHED: dict[str, list] = {}  # path: [size, mtime, ctime, sha256]; a run keeps it, so that large files are read once
LIST = "questions.txt"
WHERE = ("base_model_name_or_path", "revision")  # of an adapter_config.json: where its base is, which may move


def digest(value) -> str:
    """The sha256 of a value that JSON can write."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(file: Path) -> str:
    """The sha256 of a file. A file whose path, size and time of change are known is not read again."""
    file = file.absolute()
    found = file.stat()
    stamp = [found.st_size, found.st_mtime_ns, found.st_ctime_ns]  # a copy may keep the mtime of another file
    if HASHED.get(str(file), [])[:3] != stamp:
        sha = hashlib.sha256()
        with file.open("rb") as data:
            while chunk := data.read(1 << 24):
                sha.update(chunk)
        HASHED[str(file)] = [*stamp, sha.hexdigest()]
    return HASHED[str(file)][3]


def weights(path: str | Path) -> str:
    """The hash of a model's weights: of all its safetensors files in the order of their names."""
    folder = locate(path)
    if not (base := base_of(folder)):
        return digest([file_digest(file) for file in weight_files(folder)])
    own = {key: value for key, value in read_json(folder / "adapter_config.json").items() if key not in WHERE}
    return digest([weights(base), own, file_digest(folder / "adapter_model.safetensors")])


def of_model(path: str | Path) -> dict[str, str]:
    """The hash of a model's weights, and of an adapter also its base's."""
    base = base_of(locate(path))
    return {"weights": weights(path)} | ({"base": weights(base)} if base else {})


def base_weights(made_of: dict[str, str]) -> str | None:
    """The hash of the weights that a run began with; of an adapter, its base's."""
    return made_of.get("base", made_of.get("weights"))


def check_same(was: object, now: dict[str, str], where: str, advice: str, names: Iterable[str] = ()) -> None:
    """Raises ValueError if the hashes `was`, kept in `where`, differ from `now`. names: which of them count, or all."""
    known = was if isinstance(was, dict) else {}
    odd = [name for name in names or now if name in now and known.get(name) != now[name]]
    if odd:
        then = ", ".join(f"{name} {str(known.get(name))[:12]} then and {now[name][:12]} now" for name in odd)
        raise ValueError(f"{where} was made with other {' and '.join(odd)} (sha256: {then}); {advice}")


def check_base(path: str | Path, config: str) -> None:
    """Raises ValueError if the base of an adapter has other weights or another config than its training.json says."""
    folder = locate(path)
    base, record = base_of(folder), folder / "training.json"
    if base and os.path.lexists(record) and (made_of := read_json(record).take("made_of", dict[str, str], {})):
        known, now = made_of | {"weights": base_weights(made_of)}, {"weights": weights(base), "config": config}
        check_same(known, now, f"the adapter {path}", f"put the right model at {base}")


# ---- which questions a trained model has seen ------------------------------------------------------------------


def mark(question) -> str:
    """Identifies a question's group, which splits keep together."""
    return digest([question.task, question.group])[:12]


def question_list(model: str | Path) -> dict[str, set[str]]:
    """{"trained": marks, "test": marks} of the runs that made this model; empty sets for a model from elsewhere.

    An adapter's own list is enough, because it has its base's marks too (`list_text`).
    """
    known: dict[str, set[str]] = {"trained": set(), "test": set()}
    file = locate(model) / LIST
    for number, line in enumerate(lines_of(file) if os.path.lexists(file) else (), 1):
        kind, _, name = line.partition(" ")
        if kind not in known or len(name) != 12:
            raise ValueError(f"{file}, line {number}: not of a model that train.py saved; remove the file")
        known[kind].add(name)
    return known


def list_text(model: str | Path, trained: Iterable, test: Iterable) -> str:
    """The text of questions.txt for a model trained from `model` with these questions."""
    known = question_list(model)
    known["trained"] |= {mark(q) for q in trained}
    known["test"] |= {mark(q) for q in test}
    return "".join(f"{kind} {name}\n" for kind in known for name in sorted(known[kind]))


def check_unseen(model: str | Path, test: list, flag: str, trained: Iterable = ()) -> None:
    """Raises ValueError if the model was trained on one of the questions `test`, or tested on one of `trained`."""
    known = question_list(model)
    if seen := [q for q in test if mark(q) in known["trained"]]:
        raise ValueError(f"the model {model} was trained on {len(seen)} of these {len(test)} test questions, such as "
                         f"{seen[0].id}; give a smaller {flag}, or other data")  # fmt: skip
    if kept := [q for q in trained if mark(q) in known["test"]]:
        raise ValueError(f"this run would train on {len(kept)} test questions of the run that made {model}, such as "
                         f"{kept[0].id}; give its {flag}, or other data")  # fmt: skip
