"""The data sets as their authors publish them, and as exports of Hugging Face's datasets (docs/data.md), row by row.

A reader yields the place of each row (its line, its number in a list or in parquet), and fields of tasks.Question: at
least parts, options, gold and group. It reads a row inside `with bad:` (see reading.BadRows). A fault outside it
concerns the whole file.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from run import reading
from run.identity import digest
from run.reading import BadRows

FILES = {
    "esnli": ("esnli_train_1.csv", "esnli_train_2.csv", "esnli_dev.csv", "esnli_test.csv"),
    "social_iqa": ("train.jsonl", "dev.jsonl"),
    "comve": ("subtaskA_data_all.csv", "subtaskA_dev_data.csv", "subtaskA_test_data.csv"),
    "strategyqa": ("train.json", "dev.json"),
    "toy": ("questions.jsonl",),
    "jsonl": ("questions.jsonl",),
}
Rows = Iterator[tuple[int, dict]]


def _esnli(file: Path, bad: BadRows) -> Rows:
    published, export = ("gold_label", "Sentence1", "Sentence2"), ("label", "premise", "hypothesis")
    labels = ("entailment", "contradiction", "neutral", "0", "2", "1")  # the numbers are those of the export
    for place, row in reading.rows_of(file, bad, published, export):
        with bad:
            label, *names = export if "premise" in row else published
            parts, gold = _texts(row, *names), _choice(row.get(label), labels, row.where) % 3
            yield place, dict(parts=parts, options=("yes", "no", "maybe"), gold=gold, group=parts[0])


def _social_iqa(file: Path, bad: BadRows) -> Rows:
    beside, names = file.with_name(file.stem + "-labels.lst"), ("answerA", "answerB", "answerC")
    rows = list(reading.rows_of(file, bad, ("context", "question", *names)))
    export = any("label" in row for _, row in rows)
    labels = reading.lines_of(beside) if not export and beside.is_file() else []
    if labels and len(labels) != (count := len(reading.lines_of(file))):
        raise ValueError(f"{beside}: {len(labels)} labels for {count} lines of {file.name}; correct one of them")
    for place, row in rows:
        with bad:
            if not labels and "label" not in row:
                raise ValueError(f"{row.where}: its label is missing; put {beside.name} beside the file")
            label, where = (labels[place - 1], f"{beside}, line {place}") if labels else (row["label"], row.where)
            parts, answers = _texts(row, "context", "question"), _texts(row, *names)
            order = sorted(range(3), key=lambda i: digest(["social_iqa", parts, answers[i]]))  # noqa: B023
            options, gold = tuple(answers[i] for i in order), order.index(_choice(label, "123", where))
            yield place, dict(parts=parts, options=options, gold=gold, group=parts[0])


def _comve(file: Path, bad: BadRows) -> Rows:
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
            yield place, dict(parts=(), options=pair, gold=gold, group="\n".join(sorted(pair)))
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


def _strategyqa(file: Path, bad: BadRows) -> Rows:
    for place, row in reading.rows_of(file, bad, ("question", "answer")):
        with bad:
            parts, gold = _texts(row, "question"), 1 - row.take("answer", bool)
            yield place, dict(parts=parts, options=("yes", "no"), gold=gold, group=parts[0])


def _own(file: Path, bad: BadRows, task: str = "jsonl") -> Rows:
    seen, count, causes = set(), 0, []
    if task == "toy":
        beside = file.with_name("causes.json")
        causes = reading.json_of(reading.text_of(beside), beside)
        if not reading.fits(causes, list[list[str]]):
            raise ValueError(f"{beside}: not a list of lists of texts; remove the folder, then run python -m lab.base")
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
            fields = dict(id=id, parts=parts, options=options, gold=gold, group=group)
            if task == "toy":
                fields["moved_by"] = frozenset(causes[row.take("moved_by", int, above=-1, most=len(causes) - 1)])
            seen.add(id)
            count = len(options)
            yield place, fields


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
