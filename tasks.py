"""The data sets: their questions, and splits that keep related questions together. run/published.py reads the files.

A question is what the model is asked: its own text in parts, two or more options, and the gold option. Each task reads
the files as their authors publish them, and exports of Hugging Face's datasets with the usual columns (docs/data.md):

    task         files                                                      options
    esnli        esnli_{train_1,train_2,dev,test}.csv                       yes, no, maybe
    social_iqa   {train,dev}.jsonl and {train,dev}-labels.lst               the three answers, in an order by hash
    comve        subtaskA_{data_all,dev_data,test_data}.csv and answers     the two statements
    strategyqa   {train,dev}.json                                           yes, no
    toy          questions.jsonl and causes.json, as lab/base.py makes them   the two things
    jsonl        questions.jsonl, or any file of one's own questions        2 to 10, those of the file

All shuffling is sorting by a hash of the seed and the question's own text. So the order is the same on every machine,
does not depend on the file's order, and new questions do not reorder the others.

Sources: e-SNLI (Camburu et al. 2018), Social IQa (Sap et al. 2019), ComVE (Wang et al. 2020, SemEval task 4),
StrategyQA (Geva et al. 2021). The order of Social IQa's answers and the splits are ours.

    python tasks.py TASK PATH [--skip-bad-rows]    counts questions, groups, how often each option is the gold one
"""

import os
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from run.identity import digest
from run.progress import Parser, command, other_rank, say
from run.published import FILES, READERS
from run.reading import BadRows

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
    appeal: str = ""  # the hint that an intervention inserted
    moved_by: frozenset[str] | None = None  # names of the edits that were made to change the answer; None if unknown


def load(task: str, path: str | Path, skip_bad_rows: bool = False) -> list[Question]:
    """The questions of a file, or of a folder: of its published files in the order of FILES, else of its parquet files.

    Rows that occur twice are kept. They share a group, so no split separates them. Any fault of the files is a
    ValueError of one line that names the file and the place. skip_bad_rows: rows with a fault are left out, and rank 0
    says how many on stderr. The other questions keep their ids. A fault of the whole file is still an error.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: choose one of {', '.join(TASKS)}")
    path, names = Path(path), " or ".join(FILES[task])
    if not path.exists():
        raise ValueError(f"{path} is missing; give the folder with {names}, or one file")
    found = [path / name for name in FILES[task] if os.path.lexists(path / name)] if path.is_dir() else [path]
    found = found or sorted(path.glob("*.parquet"))
    if not found:
        raise ValueError(f"{path}: no {task} file in this folder; expected {names}, or files in parquet")
    questions = []
    for file in found:
        good = list(READERS[task](file, bad := BadRows(skip_bad_rows)))
        if not good:
            none = f"all {len(bad):,} rows of {file} are bad, the first: {bad[0]}" if bad else f"{file}: it has no rows"
            raise ValueError(none)
        if bad and not other_rank():
            rows = f"skipped {len(bad):,} of {len(good) + len(bad):,} rows of {file}"
            say(f"{rows}, the first: {bad[0].removeprefix(f'{file}, ')}", sys.stderr)
        questions += [Question(**{"task": task, "id": f"{task}/{file.stem}:{place}"} | row) for place, row in good]
    if len(counts := {len(question.options) for question in questions}) > 1:
        raise ValueError(f"{path}: its files have {min(counts)} and {max(counts)} options; give as many in each")
    return questions


def by_task(questions: list[Question]) -> dict[str, list[Question]]:
    """{task: its questions}, in the order in which they came."""
    return {task: [q for q in questions if q.task == task] for task in dict.fromkeys(q.task for q in questions)}


def load_splits(paths: dict[str, str], sizes: dict[str, int], skip_bad_rows: bool) -> tuple[list, dict[str, list]]:
    """All questions of {task: path}, and their splits. Each task is split by itself, into the same sizes.

    There is one split for all seeds, so runs of the same sizes never train on each other's test questions.
    """
    loaded = [load(task, path, skip_bad_rows) for task, path in paths.items()]
    parts = [split(questions, sizes, seed=0) for questions in loaded]
    questions = sum(loaded, [])
    if (twice := Counter(q.id for q in questions).most_common(1)) and twice[0][1] > 1:
        raise ValueError(f"the id {twice[0][0]!r} occurs in two files or tasks; give your own questions other ids")
    return questions, {name: sum((part[name] for part in parts), []) for name in sizes}


def shuffled(questions: Iterable[Question], seed: int) -> list[Question]:
    """The questions in an order that depends on the seed, not on the order in which they came."""
    return sorted(questions, key=lambda q: (digest([seed, q.task, q.parts, q.options, q.gold]), q.id))


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
    waiting = iter(sorted(groups, key=lambda key: digest([seed, *key])))
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


@command("tasks.py")
def main(argv: list[str]) -> None:
    parser = Parser(prog="tasks.py", description="Counts the questions of a data set and the options that are right.")
    parser.add_argument("task")
    parser.add_argument("path")
    parser.add_argument("--skip-bad-rows", action="store_true")
    loaded = load(**vars(parser.parse_args(argv)))
    golds = Counter(question.gold for question in loaded)
    print(f"{len(loaded):,} questions in {len({q.group for q in loaded}):,} groups; gold", end="")
    print(*(f" ({chr(65 + i)}) {golds[i] / len(loaded):.1%}" for i in sorted(golds)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
