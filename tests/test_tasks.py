"""tasks.py: the four readers on real rows, every fault of the files, and splits that never part a group."""

import codecs
import csv
import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import tasks

ROOT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data"
FULL = ROOT.parent / "shared" / "data"  # whole files, where a checkout has them beside it
PUBLISHED = ("esnli", "social_iqa", "comve", "strategyqa")  # the toy makes its own: test_toy.py


@pytest.fixture
def folder(tmp_path):
    """A writable copy of the sample rows."""
    for task in PUBLISHED:
        shutil.copytree(DATA / task, tmp_path / task)
    return tmp_path


def error(task, path):
    with pytest.raises(ValueError) as caught:
        tasks.load(task, path)
    message = str(caught.value)
    assert "\n" not in message and type(caught.value) is ValueError
    return message


def edit(path, old, new):
    text = path.read_bytes()
    assert old.encode() in text
    path.write_bytes(text.replace(old.encode(), new.encode("utf-8", "surrogatepass"), 1))


def ids(questions):
    return [question.id for question in questions]


def lines(questions):
    return [int(question.id.split(":")[1]) for question in questions]


def made(rows_per_group, task="esnli"):
    """Questions in groups of the given sizes, without files."""
    return [
        tasks.Question(task, f"{g}-{r}", (f"premise {g}", f"row {r}"), ("yes", "no"), 0, f"premise {g}")
        for g, count in enumerate(rows_per_group)
        for r in range(count)
    ]


# --- reading ---


def test_esnli_row():
    first, second, third = tasks.load("esnli", DATA / "esnli")[:3]
    assert first == tasks.Question(
        task="esnli",
        id="esnli/esnli_dev:2",
        parts=(
            "Two women are embracing while holding to go packages.",
            "The sisters are hugging goodbye while holding to go packages after just eating lunch.",
        ),
        options=("yes", "no", "maybe"),
        gold=2,
        group="Two women are embracing while holding to go packages.",
    )
    assert (first.appeal, second.gold, third.gold) == ("", 0, 1)  # neutral, entailment, contradiction


def test_social_iqa_row():
    first = tasks.load("social_iqa", DATA / "social_iqa")[0]
    assert first.parts == (
        "Tracy didn't go home that evening and resisted Riley's attacks.",
        "What does Tracy need to do before this?",
    )
    assert (first.id, first.group) == ("social_iqa/dev:1", first.parts[0])
    assert set(first.options) == {"make a new plan", "Go home and see Riley", "Find somewhere to go"}
    assert first.options[first.gold] == "Find somewhere to go"  # the label is 3


def test_social_iqa_gold_follows_its_answer():
    folder = DATA / "social_iqa"
    rows = [json.loads(line) for line in (folder / "dev.jsonl").read_text().splitlines()]
    labels = (folder / "dev-labels.lst").read_text().split()
    for question, row, label in zip(tasks.load("social_iqa", folder), rows, labels, strict=True):
        assert question.options[question.gold] == row["answer" + "ABC"[int(label) - 1]]


def test_social_iqa_order_is_drawn_from_the_text_alone(folder):
    file = folder / "social_iqa" / "dev.jsonl"
    before = {q.parts: q.options for q in tasks.load("social_iqa", file)}
    for path in (file, file.with_name("dev-labels.lst")):
        path.write_text("\n".join(reversed(path.read_text().split("\n")[:-1])))
    after = {q.parts: q.options for q in tasks.load("social_iqa", file)}
    assert before == after
    golds = [q.gold for q in tasks.load("social_iqa", DATA / "social_iqa")]
    assert golds == [2, 2, 0, 1, 2, 2, 1, 1, 1, 2, 2, 1, 1, 2, 1, 2, 2, 1, 1, 1]


def test_comve_row():
    questions = tasks.load("comve", DATA / "comve")
    assert questions[0] == tasks.Question(
        task="comve",
        id="comve/subtaskA_data_all:2",
        parts=(),
        options=("He poured orange juice on his cereal.", "He poured milk on his cereal."),
        gold=0,  # the one against common sense
        group="He poured milk on his cereal.\nHe poured orange juice on his cereal.",
    )
    assert ids(questions)[9:11] == ["comve/subtaskA_data_all:11", "comve/subtaskA_dev_data:2"]
    assert questions[2].options == ("Jeff ran a mile today", "Jeff ran 100,000 miles today")
    assert questions[2].gold == 1
    # Id 3 is in both files with other sentences: each file keeps to its own answers.
    assert [q.gold for q in questions if q.options[0] in ("A mosquito stings me", "The hangers bought the closet")]
    assert [q.gold for q in questions if q.options[0] == "A mosquito stings me"] == [1]
    assert [q.gold for q in questions if q.options[0] == "The hangers bought the closet"] == [0]


def test_comve_answers_match_by_id(folder):
    file = folder / "comve" / "subtaskA_data_all.csv"
    before = tasks.load("comve", file)
    answers = file.with_name("subtaskA_answers_all.csv")
    answers.write_text("\n".join(reversed(answers.read_text().split())))
    assert tasks.load("comve", file) == before
    assert len({q.gold for q in before}) == 2


def test_comve_pair_the_other_way_round_is_one_group(folder):
    file = folder / "comve" / "subtaskA_data_all.csv"
    edit(
        file, "He drinks apple.,He drinks milk.", "He poured milk on his cereal.,He poured orange juice on his cereal."
    )
    first, second = tasks.load("comve", file)[:2]
    assert first.options == second.options[::-1] and first.group == second.group


@pytest.mark.parametrize("answers", ["subtaskA_gold_answers.csv", "subtaskA_test_answers.csv"])
def test_comve_test_files(folder, answers):
    comve = folder / "comve"
    (comve / "subtaskA_data_all.csv").unlink()
    (comve / "subtaskA_dev_data.csv").rename(comve / "subtaskA_test_data.csv")
    (comve / "subtaskA_gold_answers.csv").rename(comve / answers)
    assert len(tasks.load("comve", comve)) == 10


def test_strategyqa_rows():
    questions = tasks.load("strategyqa", DATA / "strategyqa")
    raw = json.loads((DATA / "strategyqa" / "dev.json").read_text(encoding="utf-8"))
    texts = [row["question"].strip() for row in raw]  # one of them ends in a space
    assert [(q.parts, q.group) for q in questions] == [((t,), t) for t in texts]
    assert [q.options[q.gold] for q in questions] == ["yes" if r["answer"] else "no" for r in raw]
    assert ids(questions)[:2] == ["strategyqa/dev:1", "strategyqa/dev:2"]


@pytest.mark.parametrize("task", PUBLISHED)
def test_folder_is_all_its_files_and_ids_are_unique(task):
    questions = tasks.load(task, str(DATA / task))  # a str will do
    files = [DATA / task / name for name in tasks.FILES[task] if (DATA / task / name).exists()]
    assert questions == [q for file in files for q in tasks.load(task, file)]
    assert len(questions) == 20 == len(set(ids(questions)))
    assert all(q.task == task and 0 <= q.gold < len(q.options) for q in questions)


def test_folder_order_is_train_dev_test(folder):
    source = folder / "esnli" / "esnli_dev.csv"
    for name in ("esnli_train_2", "esnli_test", "esnli_train_1", "unrelated"):
        shutil.copy(source, source.with_name(name + ".csv"))
    questions = tasks.load("esnli", folder / "esnli")
    names = [q.id.split("/")[1].split(":")[0] for q in questions]
    assert list(dict.fromkeys(names)) == ["esnli_train_1", "esnli_train_2", "esnli_dev", "esnli_test"]
    assert len(set(ids(questions))) == 80


@pytest.mark.parametrize("task", PUBLISHED)
def test_byte_order_mark_and_line_ends(task, folder):
    before = tasks.load(task, folder / task)
    for end in (b"\n", b"\r\n"):
        for file in (folder / task).iterdir():
            text = file.read_bytes().removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n")
            file.write_bytes(codecs.BOM_UTF8 + text.replace(b"\n", end))
        assert tasks.load(task, folder / task) == before


def test_line_separator_inside_a_json_string_is_text(folder):
    file = folder / "social_iqa" / "dev.jsonl"
    edit(file, "Tracy didn't go home", "Tracy\u2028didn't\x85go home")
    questions = tasks.load("social_iqa", file)
    assert len(questions) == 20 and questions[0].parts[0].startswith("Tracy\u2028didn't\x85go")


def test_non_ascii_quotes_and_line_breaks_in_cells(folder):
    file = folder / "esnli" / "esnli_dev.csv"
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["Explanation_1", "Sentence2", "gold_label", "Sentence1"])  # columns go by name
        writer.writerow(["two\nlines", 'She says "hé, ho"', "neutral", " A café,\n  at night "])
        writer.writerow(["", "B", "entailment", "C"])
    first, second = tasks.load("esnli", file)
    assert first.parts == ("A café,\n  at night", 'She says "hé, ho"') and first.gold == 2
    assert (first.id, second.id) == ("esnli/esnli_dev:2", "esnli/esnli_dev:5")  # lines, not rows
    file.write_bytes(file.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
    assert tasks.load("esnli", file) == [first, second]  # also within a cell
    file.write_bytes(file.read_bytes() + b"\r\n\r\n")
    assert tasks.load("esnli", file) == [first, second]  # blank lines are no rows


# --- faults: one clear line that names the file and the place ---


def test_unknown_task():
    assert error("snli", DATA) == "unknown task 'snli': choose one of esnli, social_iqa, comve, strategyqa, toy"


@pytest.mark.parametrize("task", PUBLISHED)
def test_missing_path(task, tmp_path):
    message = error(task, tmp_path / "nowhere")
    assert "nowhere: cannot be read (No such file" in message and tasks.FILES[task][0] in message


@pytest.mark.parametrize("task", PUBLISHED)
def test_folder_without_the_files(task, tmp_path):
    message = error(task, tmp_path)
    assert f"no {task} file" in message and all(name in message for name in tasks.FILES[task])


def test_unreadable_file(folder, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert "esnli_dev.csv: cannot be read (Permission denied)" in error("esnli", folder / "esnli")


FILE_OF = {
    "esnli": "esnli_dev.csv",
    "social_iqa": "dev.jsonl",
    "comve": "subtaskA_data_all.csv",
    "strategyqa": "dev.json",
}


@pytest.mark.parametrize("task", PUBLISHED)
@pytest.mark.parametrize("content", [b"", b"\r\n\n", codecs.BOM_UTF8])
def test_empty_file(task, content, folder):
    file = folder / task / FILE_OF[task]
    file.write_bytes(content)
    assert f"{file}: the file is empty" in error(task, file)


@pytest.mark.parametrize("task", PUBLISHED)
def test_not_utf8(task, folder):
    file = folder / task / FILE_OF[task]
    lines = file.read_bytes().split(b"\n")
    lines[2] = b"caf\xe9" + lines[2]
    file.write_bytes(b"\n".join(lines))
    assert f"{file}, line 3: not UTF-8" in error(task, file)


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        ("esnli_dev.csv", "Sentence2", "hypothesis", "line 1: no column Sentence2"),
        ("esnli_dev.csv", "gold_label,Sentence1", "a,b", "line 1: no column gold_label or Sentence1"),
        ("esnli_dev.csv", "dev-1,", "dev-1,,", "line 3: 8 cells, 7 columns"),
        ("esnli_dev.csv", "dev-1,entailment,", "dev-1,", "line 3: 6 cells, 7 columns"),
        ("esnli_dev.csv", "dev-1,entailment", "dev-1,-", "line 3: label '-'; it must be one of entailment"),
        ("esnli_dev.csv", "dev-1,entailment", "dev-1,", "line 3: label ''"),
        ("esnli_dev.csv", "Two woman are holding packages.", " ", "line 3: Sentence2 is empty"),
        ("esnli_dev.csv", "dev-1,", '"dev-1,', "line 3: not a CSV row"),
        ("dev.jsonl", '"context"', '"contxt"', "line 1: no field 'context'"),
        ("dev.jsonl", '{"context": "Sydney', '"context": "Sydney', "line 2: not JSON (Extra data)"),
        ("dev.jsonl", '\n{"context": "Sydney', '\n\n{"context": "Sydney', "20 labels for 21 lines"),
        ("dev.jsonl", '"sympathetic"', "7", "line 2: no field 'answerA' that is a string"),
        ("dev.jsonl", '"sympathetic"', '""', "line 2: answerA is empty"),
        ("dev.jsonl", '"sympathetic"', '"\\ud800"', "line 2: answerA is empty or not valid text"),
        ("dev-labels.lst", "3\n1", "3\n4", "dev-labels.lst, line 2: label '4'; it must be one of 1, 2, 3"),
        ("dev-labels.lst", "3\n1", "3\n", "dev-labels.lst, line 2: label ''"),
        ("dev-labels.lst", "3\n1", "1", "dev-labels.lst: 19 labels for 20 lines of dev.jsonl"),
        ("subtaskA_data_all.csv", "sent1", "sent2", "line 1: no column sent1"),
        ("subtaskA_data_all.csv", "He drinks apple.", "", "line 3: sent0 is empty"),
        ("subtaskA_data_all.csv", "1,He drinks apple.,", "1,", "line 3: 2 cells, 3 columns"),
        ("subtaskA_data_all.csv", "\n1,He", "\n0,He", "line 3: id '0' comes twice or has no answer"),
        ("subtaskA_data_all.csv", "1,He drinks apple.,He drinks milk.\n", "", "_all.csv: id '1' is not in"),
        ("subtaskA_answers_all.csv", "\n1,0", "", "line 3: id '1' comes twice or has no answer"),
        ("subtaskA_answers_all.csv", "\n1,0", "\n0,0", "_all.csv, line 2: '0,0'; it must be a new id"),
        ("subtaskA_answers_all.csv", "\n1,0", "\n1,2", "_all.csv, line 2: label '2'"),
        ("subtaskA_answers_all.csv", "\n1,0", "\n1", "_all.csv, line 2: '1'; it must be a new id"),
        ("dev.json", '"question"', '"questions"', "entry 1: no field 'question'"),
        ("dev.json", '"answer": false', '"answer": 0', "entry N: label '0'; it must be one of true, false"),
        ("dev.json", '"answer": false', '"answer": "false"', "entry N: label '\"false\"'"),
        ("dev.json", '"answer": false', '"reply": false', "entry N: label 'null'"),
        ("dev.json", '"term"', "term", "line 4: not JSON"),
    ],
)
def test_fault_in_a_file(file, old, new, expected, folder):
    (path,) = folder.glob(f"*/{file}")
    if file == "dev.json":  # N is the first entry whose answer is false
        answers = [row["answer"] for row in json.loads(path.read_text(encoding="utf-8"))]
        expected = expected.replace("N:", f"{answers.index(False) + 1}:")
    edit(path, old, new)
    message = error(path.parent.name, path.parent)
    assert expected in message and str(path.parent) in message


@pytest.mark.parametrize("content", ["{}", "[]", '"text"', "[[]]", "[" * 100_000, "9" * 5_000])
def test_strategyqa_of_another_form(content, folder):
    file = folder / "strategyqa" / "dev.json"
    file.write_text(content)
    assert str(file) in error("strategyqa", file)


def test_header_alone(folder):
    file = folder / "esnli" / "esnli_dev.csv"
    file.write_bytes(file.read_bytes().split(b"\n")[0] + b"\n")
    assert f"{file}: no rows below the header" in error("esnli", file)


def test_missing_labels_and_answers(folder):
    (folder / "social_iqa" / "dev-labels.lst").unlink()
    message = error("social_iqa", folder / "social_iqa")
    assert "dev.jsonl: its labels are missing; put dev-labels.lst beside it" in message
    (folder / "comve" / "subtaskA_gold_answers.csv").unlink()
    message = error("comve", folder / "comve" / "subtaskA_dev_data.csv")
    assert "its answers are missing; put subtaskA_dev_answers.csv or subtaskA_gold_answers.csv" in message


def test_answers_of_another_file(folder):
    """The training answers must not serve the dev file, whose ids they contain."""
    comve = folder / "comve"
    shutil.copy(comve / "subtaskA_answers_all.csv", comve / "subtaskA_gold_answers.csv")
    assert "subtaskA_dev_data.csv, line 2: id '1363'" in error("comve", comve / "subtaskA_dev_data.csv")


def test_command_line():
    def run(*args):
        return subprocess.run([sys.executable, ROOT / "tasks.py", *args], capture_output=True, text=True)

    good = run("esnli", DATA / "esnli")
    assert good.returncode == 0 and good.stdout.startswith("20 questions in 7 groups; gold (A) 35.0%")
    usage = "usage: python tasks.py TASK PATH"
    for bad, said in ((("esnli", "nowhere"), "nowhere: cannot be read"), ((), usage)):
        result = run(*bad)
        assert result.returncode == 2 and said in result.stderr and result.stderr.count("\n") == 1


# --- order and splits ---


def test_shuffled_is_fixed_by_the_seed_alone():
    questions = tasks.load("esnli", DATA / "esnli")
    once = tasks.shuffled(questions, 7)
    assert lines(once) == [10, 8, 13, 21, 5, 3, 20, 14, 19, 17, 9, 15, 11, 6, 12, 16, 7, 4, 18, 2]
    assert sorted(ids(once)) == sorted(ids(questions)) and once != questions
    assert tasks.shuffled(random.Random(0).sample(questions, 20), 7) == once
    assert tasks.shuffled(questions, 8) != once
    assert tasks.shuffled(questions[:15], 7) == [q for q in once if q in questions[:15]]


def test_split_is_fixed_by_the_seed_alone():
    questions = tasks.load("esnli", DATA / "esnli")
    once = tasks.split(questions, {"test": 5, "train": 8}, seed=7)
    assert lines(once["test"]) == [13, 19, 17, 11, 12]
    assert lines(once["train"]) == [10, 8, 21, 3, 20, 9, 4, 2]
    assert tasks.split(random.Random(0).sample(questions, 20), {"test": 5, "train": 8}, seed=7) == once
    assert tasks.split(questions, {"test": 5, "train": 8}, seed=8) != once


def test_split_sizes_and_whole_groups():
    questions = made([1, 2, 3, 4, 5] * 20)
    sizes = {"test": 50, "dev": 7, "none": 0, "train": 150}
    splits = tasks.split(questions, sizes, seed=0)
    assert {name: len(rows) for name, rows in splits.items()} == sizes
    seen = [{q.group for q in rows} for rows in splits.values()]
    assert len(set().union(*seen)) == sum(map(len, seen))
    everything = [id for rows in splits.values() for id in ids(rows)]
    assert len(everything) == len(set(everything))
    size = Counter(q.group for q in questions)
    for rows in splits.values():  # at most the last group of a split is cut
        kept = Counter(q.group for q in rows)
        assert sum(kept[group] < size[group] for group in kept) <= 1


def test_first_split_does_not_change_with_later_ones():
    questions = made([3, 1, 4, 1, 5, 9, 2, 6] * 5)
    tests = [
        tasks.split(questions, sizes, seed=1)["test"]
        for sizes in ({"test": 30}, {"test": 30, "train": 10}, {"test": 30, "dev": 5, "train": -1})
    ]
    assert tests[0] == tests[1] == tests[2]
    longer = tasks.split(questions, {"test": 30, "train": 60}, seed=1)["train"]
    shorter = tasks.split(questions, {"test": 30, "train": 40}, seed=1)["train"]
    assert set(ids(shorter)) <= set(ids(longer))


def test_the_rest():
    questions = made([2] * 10)
    splits = tasks.split(questions, {"test": 5, "train": -1}, seed=0)
    assert (len(splits["test"]), len(splits["train"])) == (5, 14)  # the cut group's other row is in neither
    assert sorted(ids(tasks.split(questions, {"all": -1}, seed=3)["all"])) == sorted(ids(questions))


def test_large_groups_do_not_come_first():
    questions = made([1] * 300 + [10] * 30)  # half of the rows, one group in eleven
    shares = [
        sum(int(q.group.split()[1]) >= 300 for q in tasks.split(questions, {"test": 200}, seed)["test"]) / 200
        for seed in range(10)
    ]
    assert 0.4 < sum(shares) / len(shares) < 0.6


def test_one_group_name_in_two_tasks_is_two_groups():
    questions = made([2, 2]) + made([2, 2], task="comve")
    splits = tasks.split(questions, {"a": 2, "b": 2, "c": 2, "d": 2}, seed=0)
    assert all(len({(q.task, q.group) for q in rows}) == 1 for rows in splits.values())


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"test": 4, "train": 20}, "'train' asks for 20, but 6 of 12 questions (in 4 groups) are left"),
        ({"test": 13}, "'test' asks for 13, but 12 of 12 questions (in 4 groups) are left; lower one of {'"),
        ({"test": 12, "train": -1}, "'train' asks for the rest, but 0 of 12"),
        ({"test": -1, "train": 2}, "'test': size -1"),
        ({"test": -2}, "'test': size -2"),
        ({"test": 1.5}, "'test': size 1.5"),
        ({"test": True}, "'test': size True"),
        ({"test": "3"}, "'test': size '3'"),
    ],
)
def test_split_faults(sizes, expected):
    with pytest.raises(ValueError) as caught:
        tasks.split(made([3, 3, 3, 3]), sizes, seed=0)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_split_of_nothing():
    with pytest.raises(ValueError, match="0 of 0 questions"):
        tasks.split([], {"test": 1}, seed=0)


# --- the whole files ---


@pytest.mark.skipif(not FULL.is_dir(), reason="the whole data sets are not beside this checkout")
@pytest.mark.parametrize(
    ("task", "count", "groups"),
    [("esnli", 4000, 1353), ("social_iqa", 1000, 991), ("comve", 10997, 10975), ("strategyqa", 1729, 1728)],
)
def test_whole_data_sets(task, count, groups):
    questions = tasks.load(task, FULL / task)
    assert (len(questions), len({q.group for q in questions})) == (count, groups)
    assert len(set(ids(questions))) == count
    shares = Counter(q.gold for q in questions)
    even = 1 / len(questions[0].options)
    assert all(abs(shares[i] / count - even) < 0.05 for i in range(len(questions[0].options)))
    splits = tasks.split(questions, {"test": 300, "dev": 100, "train": -1}, seed=0)
    seen = [{q.group for q in rows} for rows in splits.values()]
    assert len(set().union(*seen)) == sum(map(len, seen)) == groups
    assert (len(splits["test"]), len(splits["dev"])) == (300, 100) and len(splits["train"]) > count - 410
