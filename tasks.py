"""The data sets: readers of their published files, and splits that keep related questions together.

A question is what the model is asked: its own text in parts, two or more options, and the gold option. Each task reads
the files as their authors publish them, and exports of Hugging Face's datasets with the usual columns (docs/data.md):

    task         files                                                      options
    esnli        esnli_{train_1,train_2,dev,test}.csv                       yes, no, maybe
    social_iqa   {train,dev}.jsonl and {train,dev}-labels.lst               the three answers, in an order by hash
    comve        subtaskA_{data_all,dev_data,test_data}.csv and answers     the two statements
    strategyqa   {train,dev}.json                                           yes, no
    toy          questions.jsonl and causes.json, as toy.py makes them      the two things
    jsonl        questions.jsonl, or any file of one's own questions        2 to 10, those of the file

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
from functools import partial
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
    "jsonl": ("questions.jsonl",),
}
TASKS = tuple(FILES)


@dataclass(frozen=True)
class Question:
    """One question with its options."""

    task: str  # one of TASKS
    id: str  # task/file:place, where place is a line, an entry of a list or a row of parquet; unique in the loaded list
    parts: tuple[str, ...]  # (premise, hypothesis), (context, question), () for comve, (question,)
    options: tuple[str, ...]  # answer texts in the order shown; for comve the two statements
    gold: int  # index into options; for comve the statement that is against common sense
    group: str  # what splits keep together: premise, context, pair of statements, question
    appeal: str = ""  # the bias sentence that an intervention inserted
    moved_by: frozenset[str] | None = None  # names of the edits that were made to change the answer; None if unknown


def load(task: str, path: str | Path, skip_bad_rows: bool = False) -> list[Question]:
    """The questions of one file, or of all published files in a folder, in the order of FILES; else of all its parquet.

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
    found = found or sorted(path.glob("*.parquet"))
    if not found:
        raise ValueError(f"{path}: no {task} file in this folder; expected {names}, or files in parquet")
    questions = []
    for file in found:
        good = list(read(file, bad := BadRows(skip_bad_rows)))
        if not good:
            none = f"all {len(bad):,} rows of {file} are bad, the first: {bad[0]}" if bad else f"{file}: it has no rows"
            raise ValueError(none)
        if bad and not other_rank():
            rows = f"skipped {len(bad):,} of {len(good) + len(bad):,} rows of {file}"
            say(f"{rows}, the first: {bad[0].removeprefix(f'{file}, ')}", sys.stderr)
        questions += good
    return questions


def by_task(questions: list[Question]) -> dict[str, list[Question]]:
    """{task: its questions}, in the order in which they came."""
    return {task: [q for q in questions if q.task == task] for task in dict.fromkeys(q.task for q in questions)}


def load_splits(paths: dict[str, str], sizes: dict[str, int], skip_bad_rows: bool) -> tuple[list, dict[str, list]]:
    """All questions of {task: path}, and their splits: of each task by itself, with the same sizes for each.

    There is one split for all seeds, so that no run trains on the test questions of another.
    """
    loaded = [load(task, path, skip_bad_rows) for task, path in paths.items()]
    parts = [split(questions, sizes, seed=0) for questions in loaded]
    questions = sum(loaded, [])
    if len({q.id for q in questions}) < len(questions):
        raise ValueError("two questions of different tasks have the same id; give those of your own another")
    return questions, {name: sum((part[name] for part in parts), []) for name in sizes}


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
    published, export = ("gold_label", "Sentence1", "Sentence2"), ("label", "premise", "hypothesis")
    labels = ("entailment", "contradiction", "neutral", "0", "2", "1")  # the numbers are those of the export
    for place, row in reading.rows_of(file, bad, published, export):
        with bad:
            label, *names = export if "premise" in row else published
            parts, gold = _texts(row, *names), _choice(row.get(label), labels, row.where) % 3
            yield Question("esnli", f"esnli/{file.stem}:{place}", parts, ("yes", "no", "maybe"), gold, parts[0])


def _social_iqa(file: Path, bad: BadRows) -> Iterator[Question]:
    beside = file.with_name(file.stem + "-labels.lst")  # an export has the label in its row
    labels = reading.lines_of(beside) if beside.is_file() else []
    if labels and len(labels) != (count := len(reading.lines_of(file))):
        raise ValueError(f"{beside}: {len(labels)} labels for {count} lines of {file.name}; correct one of them")
    names = ("answerA", "answerB", "answerC")
    for place, row in reading.rows_of(file, bad, ("context", "question", *names)):
        with bad:
            if not labels and "label" not in row:
                raise ValueError(f"{row.where}: its label is missing; put {beside.name} beside the file")
            label, where = (labels[place - 1], f"{beside}, line {place}") if labels else (row["label"], row.where)
            parts, answers = _texts(row, "context", "question"), _texts(row, *names)
            order = sorted(range(3), key=lambda i: _hash("social_iqa", parts, answers[i]))  # noqa: B023
            options, gold = tuple(answers[i] for i in order), order.index(_choice(label, "123", where))
            yield Question("social_iqa", f"social_iqa/{file.stem}:{place}", parts, options, gold, parts[0])


def _comve(file: Path, bad: BadRows) -> Iterator[Question]:
    rows = list(reading.rows_of(file, bad, ("id", "sent0", "sent1"), ("label", "sent0", "sent1")))
    export, ids = bool(rows) and "label" in rows[0][1], Counter(str(row.get("id")) for _, row in rows)
    answers = {} if export else _comve_answers(file, ids)
    for place, row in rows:
        with bad:
            label, where = row.get("label"), row.where
            if not export:
                if ids[key := str(row.get("id"))] > 1 or len(answers.get(key, ())) != 1:
                    raise ValueError(f"{where}: id {key!r} must be there once, and once in the answers; correct it")
                ((label, where),) = answers[key]
            pair, gold = _texts(row, "sent0", "sent1"), _choice(label, "01", where)
            # Sorted, so that the same two statements in the other order are the same group.
            yield Question("comve", f"comve/{file.stem}:{place}", (), pair, gold, "\n".join(sorted(pair)))
    if not bad.skip and (left := [key for key in answers if key not in ids]):
        where = answers[left[0]][0][1]
        raise ValueError(f"{where}: id {left[0]!r} is not in {file.name}; every answer needs its question")


def _comve_answers(file: Path, ids: Counter) -> dict[str, list[tuple[str, str]]]:
    """{id: [(label, where)]} of the file of answers beside `file`, whose rows have these ids."""
    # The authors give the answers of dev and of test the same name, so dev and test must be in two folders.
    names = [n for n in (file.name.replace("data", "answers"), "subtaskA_gold_answers.csv") if n != file.name]
    beside = next((file.with_name(n) for n in names if file.with_name(n).is_file()), None)
    if beside is None:
        raise ValueError(f"{file}: its answers are missing; put {' or '.join(names)} beside it")
    answers: dict[str, list[tuple[str, str]]] = {}
    for line, (key, *label) in reading.csv_rows(beside, None, BadRows()):
        answers.setdefault(key, []).append((",".join(label), f"{beside}, line {line}"))
    both = len(ids.keys() & answers.keys())
    if 2 * both < max(len(ids), len(answers)):
        raise ValueError(f"{beside}: {both} of its {len(answers)} ids are among the {len(ids)} of {file.name}; "
                         "give the answers of this file")  # fmt: skip
    return answers


def _strategyqa(file: Path, bad: BadRows) -> Iterator[Question]:
    for place, row in reading.rows_of(file, bad, ("question", "answer")):
        with bad:
            parts, gold = _texts(row, "question"), 1 - row.take("answer", bool)
            yield Question("strategyqa", f"strategyqa/{file.stem}:{place}", parts, ("yes", "no"), gold, parts[0])


def _own(file: Path, bad: BadRows, task: str = "jsonl") -> Iterator[Question]:
    seen, count, causes = set(), 0, []
    if task == "toy":
        beside = file.with_name("causes.json")
        causes = reading.json_of(reading.text_of(beside), beside)
        if not reading.fits(causes, list[list[str]]):
            raise ValueError(f"{beside}: it must be a list of lists of texts; make the files again with toy.py")
    for place, row in reading.rows_of(file, bad, ("parts", "options", "gold", "group")):
        with bad:
            parts, options = (tuple(t.strip() for t in row.take(key, list[str])) for key in ("parts", "options"))
            id, group = row.take("id", str, f"{task}/{file.stem}:{place}"), row.take("group", str)
            if not parts or not all(map(_is_text, (*parts, *options, id, group))):
                raise ValueError(f"{row.where}: parts, options, id and group must be texts, none empty; correct it")
            if id in seen:
                raise ValueError(f"{row.where}: the id {id!r} came before; give each question its own")
            if not 2 <= len(options) <= 10 or count not in (0, len(options)):
                raise ValueError(f"{row.where}: {len(options)} options; give {count or '2 to 10'}, as many in each row")
            gold = row.take("gold", int, above=-1, most=len(options) - 1)
            cause = causes[row.take("moved_by", int, above=-1, most=len(causes) - 1)] if task == "toy" else None
            seen.add(id)
            count = len(options)
            yield Question(task, id, parts, options, gold, group, moved_by=None if cause is None else frozenset(cause))


READERS = {"esnli": _esnli, "social_iqa": _social_iqa, "comve": _comve, "strategyqa": _strategyqa,
           "toy": partial(_own, task="toy"), "jsonl": _own}  # fmt: skip


def _texts(row: reading.Record, *names: str) -> tuple[str, ...]:
    """The stripped texts of these fields. Each must be a string with some text that UTF-8 can write."""
    for name in names:
        if not isinstance(row.get(name), str):
            raise ValueError(f"{row.where}: no field {name!r} that is a string; give the published file")
        if not _is_text(row[name]):
            raise ValueError(f"{row.where}: {name} is empty or not valid text; correct or remove the row")
    return tuple(row[name].strip() for name in names)


def _is_text(value: str) -> bool:
    return bool(value.strip()) and not any("\ud800" <= c <= "\udfff" for c in value)


def _choice(label: object, labels: Sequence[str], where: str) -> int:
    if (text := str(label).strip()) not in tuple(labels):
        raise ValueError(f"{where}: label {text!r}; it must be one of {', '.join(labels)}")
    return labels.index(text)


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
