"""The data sets: readers of their published files, and splits that keep related questions together.

A question is what the model is asked: its own text in parts, two or three options, and the gold option. Each task
reads the files as their authors publish them:

    task         files                                                      options
    esnli        esnli_{train_1,train_2,dev,test}.csv                       yes, no, maybe
    social_iqa   {train,dev}.jsonl and {train,dev}-labels.lst               the three answers, in an order by hash
    comve        subtaskA_{data_all,dev_data,test_data}.csv and answers     the two statements
    strategyqa   {train,dev}.json                                           yes, no
    toy          questions.jsonl and causes.json, as toy.py makes them      the two things

All shuffling is sorting by a hash of the seed and the question's own text. So the order is the same on every machine,
does not depend on the file's order, and new questions do not reorder the others.

Sources: e-SNLI (Camburu et al. 2018), Social IQa (Sap et al. 2019), ComVE (Wang et al. 2020, SemEval task 4),
StrategyQA (Geva et al. 2021). The order of Social IQa's answers and the splits are ours.

    python tasks.py TASK PATH [--skip-bad-rows]    counts questions, groups, how often each option is the gold one
"""

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from run import reading
from run.progress import command, other_rank, say
from run.reading import BadRows

FILES = {
    "esnli": ("esnli_train_1.csv", "esnli_train_2.csv", "esnli_dev.csv", "esnli_test.csv"),
    "social_iqa": ("train.jsonl", "dev.jsonl"),
    "comve": ("subtaskA_data_all.csv", "subtaskA_dev_data.csv", "subtaskA_test_data.csv"),
    "strategyqa": ("train.json", "dev.json"),
    "toy": ("questions.jsonl",),
}
TASKS = tuple(FILES)


@dataclass(frozen=True)
class Question:
    """One question with its options."""

    task: str  # one of TASKS
    id: str  # task/file:place, where place is a line, or an entry for strategyqa; unique within the loaded list
    parts: tuple[str, ...]  # (premise, hypothesis), (context, question), () for comve, (question,)
    options: tuple[str, ...]  # answer texts in the order shown; for comve the two statements
    gold: int  # index into options; for comve the statement that is against common sense
    group: str  # what splits keep together: premise, context, pair of statements, question
    appeal: str = ""  # the bias sentence that an intervention inserted
    moved_by: frozenset[str] | None = None  # names of the edits that were made to change the answer; None if unknown


def load(task: str, path: str | Path, skip_bad_rows: bool = False) -> list[Question]:
    """The questions of one file, or of all published files in a folder, in the order of FILES.

    Rows that occur twice are kept. They share a group, so no split separates them. Any fault of the files is a
    ValueError of one line that names the file and the place. skip_bad_rows: rows with a fault are left out, and rank 0
    says how many on stderr. The other questions keep their ids. A fault of the whole file is still an error.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: choose one of {', '.join(TASKS)}")
    read, path, names = READERS[task], Path(path), " or ".join(FILES[task])
    if not path.exists():
        raise ValueError(f"{path} is missing; give the folder with {names}, or one file")
    found = [path / name for name in FILES[task] if os.path.lexists(path / name)] if path.is_dir() else [path]
    if not found:
        raise ValueError(f"{path}: no {task} file in this folder; expected {names}")
    questions = []
    for file in found:
        good = list(read(file, bad := BadRows(skip_bad_rows)))
        if bad and not good:
            raise ValueError(f"all {len(bad):,} rows of {file} are bad, the first: {bad[0]}")
        if bad and not other_rank():
            rows = f"skipped {len(bad):,} of {len(good) + len(bad):,} rows of {file}"
            say(f"{rows}, the first: {bad[0].removeprefix(f'{file}, ')}", sys.stderr)
        questions += good
    return questions


def shuffled(questions: Iterable[Question], seed: int) -> list[Question]:
    """The questions in an order that depends on the seed, not on the order in which they came."""
    return sorted(questions, key=lambda q: (_hash(seed, q.task, q.parts, q.options, q.gold), q.id))


def split(questions: Iterable[Question], sizes: dict[str, int], seed: int) -> dict[str, list[Question]]:
    """{name: questions} of exactly these sizes, no group in two splits. -1 for the last split means all that is left.

    Splits are filled in the order of `sizes`, group after group. The last group of a split is cut to fit, and the rest
    of it goes to no split. So a split depends on the sizes before its own, never on those after it: name the test split
    first, and it stays the same for every training size. ValueError for wrong sizes or too few questions.
    """
    questions, groups = shuffled(questions, seed), {}
    for question in questions:
        groups.setdefault((question.task, question.group), []).append(question)
    # Ordered by their own hash: in the order of the shuffled questions, large groups tend to come first.
    waiting = iter(sorted(groups, key=lambda key: _hash(seed, *key)))
    splits: dict[str, list[Question]] = {}
    for i, (name, size) in enumerate(sizes.items(), start=1):
        if type(size) is not int or size < -1 or (size == -1 and i < len(sizes)):
            raise ValueError(f"split {name!r}: size {size!r}; give a count, or -1 (the rest) to the last")
        rows: list[Question] = []
        while (size == -1 or len(rows) < size) and (key := next(waiting, None)):
            rows += groups[key]
        if len(rows) < abs(size):  # -1 needs at least one question
            wants = f"split {name!r} asks for {size if size > 0 else 'the rest'}"
            left = f"{len(rows)} of {len(questions)} questions (in {len(groups)} groups) are left"
            raise ValueError(f"too few: {wants}, but {left}; lower one of {sizes}, or load more files")
        splits[name] = shuffled(rows[:size] if size >= 0 else rows, seed)
    return splits


# Each reader reads a row inside `with bad:`, see run/reading.py. What is outside concerns the whole file.


def _esnli(file: Path, bad: BadRows) -> Iterator[Question]:
    for line, row in reading.csv_table(file, ("gold_label", "Sentence1", "Sentence2"), bad):
        where = f"{file}, line {line}"
        with bad:
            parts = _texts(row, where, "Sentence1", "Sentence2")
            gold = _choice(row["gold_label"], ("entailment", "contradiction", "neutral"), where)
            yield Question("esnli", f"esnli/{file.stem}:{line}", parts, ("yes", "no", "maybe"), gold, parts[0])


def _social_iqa(file: Path, bad: BadRows) -> Iterator[Question]:
    rows, beside = reading.lines_of(file), file.with_name(file.stem + "-labels.lst")
    if not beside.is_file():
        raise ValueError(f"{file}: its labels are missing; put {beside.name} beside it")
    labels = reading.lines_of(beside)
    if len(rows) != len(labels):
        raise ValueError(f"{beside}: {len(labels)} labels for {len(rows)} lines of {file.name}; correct one of them")
    for line, (text, label) in enumerate(zip(rows, labels, strict=True), start=1):
        where = f"{file}, line {line}"
        with bad:
            row = reading.json_of(text, file, line)
            right = _choice(label.strip(), ("1", "2", "3"), f"{beside}, line {line}")
            parts = _texts(row, where, "context", "question")
            answers = _texts(row, where, "answerA", "answerB", "answerC")
            order = sorted(range(3), key=lambda i: _hash("social_iqa", parts, answers[i]))  # noqa: B023
            options, gold = tuple(answers[i] for i in order), order.index(right)
            yield Question("social_iqa", f"social_iqa/{file.stem}:{line}", parts, options, gold, parts[0])


def _comve(file: Path, bad: BadRows) -> Iterator[Question]:
    rows = reading.csv_table(file, ("id", "sent0", "sent1"), bad)
    # The authors give the answers of dev and of test the same name, so dev and test must be in two folders.
    names = [n for n in (file.name.replace("data", "answers"), "subtaskA_gold_answers.csv") if n != file.name]
    beside = next((file.with_name(n) for n in names if file.with_name(n).is_file()), None)
    if beside is None:
        raise ValueError(f"{file}: its answers are missing; put {' or '.join(names)} beside it")
    answers: dict[str, list[tuple[int, str]]] = {}
    for line, (key, *label) in reading.csv_rows(beside, None, BadRows()):
        answers.setdefault(key, []).append((line, ",".join(label)))
    ids = Counter(row["id"] for _, row in rows)
    both = len(ids.keys() & answers.keys())
    if 2 * both < max(len(ids), len(answers)):
        raise ValueError(f"{beside}: {both} of its {len(answers)} ids are among the {len(ids)} of {file.name}; "
                         "give the answers of this file")  # fmt: skip
    for line, row in rows:
        where, key = f"{file}, line {line}", row["id"]
        with bad:
            if ids[key] > 1 or len(answers.get(key, ())) != 1:
                raise ValueError(f"{where}: id {key!r} must be there once, and once in {beside.name}; correct it")
            ((answered, label),) = answers[key]
            gold = _choice(label, ("0", "1"), f"{beside}, line {answered}")
            pair = _texts(row, where, "sent0", "sent1")
            # Sorted, so that the same two statements in the other order are the same group.
            yield Question("comve", f"comve/{file.stem}:{line}", (), pair, gold, "\n".join(sorted(pair)))
    if not bad.skip and (left := [key for key in answers if key not in ids]):
        raise ValueError(f"{beside}: id {left[0]!r} is not in {file.name}; every answer needs its question")


def _strategyqa(file: Path, bad: BadRows) -> Iterator[Question]:
    rows = reading.json_of(reading.text_of(file), file, 1)
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{file}: not a list of questions; give the published train.json or dev.json")
    for entry, row in enumerate(rows, start=1):
        where = f"{file}, entry {entry}"
        with bad:
            parts = _texts(row, where, "question")
            gold = _choice(json.dumps(row.get("answer")), ("true", "false"), where)
            yield Question("strategyqa", f"strategyqa/{file.stem}:{entry}", parts, ("yes", "no"), gold, parts[0])


def _toy(file: Path, bad: BadRows) -> Iterator[Question]:
    beside, seen = file.with_name("causes.json"), set()
    causes = reading.json_of(reading.text_of(beside), beside, 1)
    if not reading.fits(causes, list[list[str]]):
        raise ValueError(f"{beside}: it must be a list of lists of texts; make the files again with toy.py")
    for line, text in enumerate(reading.lines_of(file), start=1):
        where = f"{file}, line {line}"
        with bad:
            row = reading.record_of(reading.json_of(text, file, line), where)
            parts, options = (tuple(row.take(key, list[str])) for key in ("parts", "options"))
            gold = _choice(json.dumps(row.get("answer")), [str(i) for i in range(len(options))], where)
            cause = causes[_choice(json.dumps(row.get("moved_by")), [str(i) for i in range(len(causes))], where)]
            id, group = _texts(row, where, "id", "group")
            if not parts or not 2 <= len(options) <= 10 or not all(map(_is_text, parts + options)) or id in seen:
                raise ValueError(f"{where}: parts, 2 to 10 options and an id of its own are needed; correct it")
            seen.add(id)
            yield Question("toy", id, parts, options, gold, group, moved_by=frozenset(cause))


READERS = {"esnli": _esnli, "social_iqa": _social_iqa, "comve": _comve, "strategyqa": _strategyqa, "toy": _toy}


def _texts(row: object, where: str, *names: str) -> tuple[str, ...]:
    """The stripped texts of these fields. Each must be a string with some text that UTF-8 can write."""
    for name in names:
        if not isinstance(row, dict) or not isinstance(row.get(name), str):
            raise ValueError(f"{where}: no field {name!r} that is a string; give the published file")
        if not _is_text(row[name]):
            raise ValueError(f"{where}: {name} is empty or not valid text; correct or remove the row")
    return tuple(row[name].strip() for name in names)


def _is_text(value: str) -> bool:
    return bool(value.strip()) and not any("\ud800" <= c <= "\udfff" for c in value)


def _choice(label: str, labels: Sequence[str], where: str) -> int:
    if label not in labels:
        raise ValueError(f"{where}: label {label!r}; it must be one of {', '.join(labels)}")
    return labels.index(label)


def _hash(*values: object) -> bytes:
    """A sort key that looks random. JSON keeps ("ab", "c") and ("a", "bc") distinct."""
    return hashlib.sha256(json.dumps(values).encode()).digest()


@command("tasks.py")
def main(argv: list[str]) -> None:
    if len(argv) != 2 and argv[2:] != ["--skip-bad-rows"]:
        raise ValueError("usage: python tasks.py TASK PATH [--skip-bad-rows]")
    loaded = load(argv[0], argv[1], len(argv) == 3)
    golds = Counter(question.gold for question in loaded)
    print(f"{len(loaded):,} questions in {len({q.group for q in loaded}):,} groups; gold", end="")
    print(*(f" ({chr(65 + i)}) {golds[i] / len(loaded):.1%}" for i in sorted(golds)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
