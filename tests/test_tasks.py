"""tasks.py: the readers on published rows, every fault of the files, and splits that never divide a group."""

import codecs
import csv
import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import launch
import pyarrow
import pytest
import tiny
from pyarrow import parquet

import faith
import reward
import tasks
from lab import build
from run import identity

ROOT = Path(__file__).parent.parent
DATA = ROOT / "tests" / "data"
FULL = ROOT.parent / "shared" / "data"  # whole files, where a checkout has them beside it
FILE_OF = {"esnli": "esnli_dev.csv", "social_iqa": "dev.jsonl", "comve": "subtaskA_data_all.csv",
           "strategyqa": "dev.json"}  # fmt: skip
PUBLISHED = tuple(FILE_OF)  # test_toy.py tests the toy's files


@pytest.fixture
def folder(tmp_path):
    """A writable copy of the sample rows."""
    for task in PUBLISHED:
        shutil.copytree(DATA / task, tmp_path / task)
    return tmp_path


def error(task, path, skip=False):
    with pytest.raises(ValueError) as caught:
        tasks.load(task, path, skip)
    message = str(caught.value)
    assert "\n" not in message and type(caught.value) is ValueError
    return message


def edit(path, old, new):
    text = path.read_bytes()
    assert old.encode() in text
    path.write_bytes(text.replace(old.encode(), new.encode(), 1))


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


def mixed(questions):
    return random.Random(0).sample(questions, len(questions))


# --- reading ---


def test_esnli_row():
    first, second, third = tasks.load("esnli", DATA / "esnli")[:3]
    premise = "Two women are embracing while holding to go packages."
    hypothesis = "The sisters are hugging goodbye while holding to go packages after just eating lunch."
    options = ("yes", "no", "maybe")
    assert first == tasks.Question("esnli", "esnli/esnli_dev:2", (premise, hypothesis), options, gold=2, group=premise)
    assert (first.appeal, second.gold, third.gold) == ("", 0, 1)  # neutral, entailment, contradiction


def test_social_iqa_rows_and_an_order_that_depends_on_the_text_alone(folder):
    folder = folder / "social_iqa"
    questions = tasks.load("social_iqa", folder)
    context = "Tracy didn't go home that evening and resisted Riley's attacks."
    assert questions[0].parts == (context, "What does Tracy need to do before this?")
    assert (questions[0].id, questions[0].group) == ("social_iqa/dev:1", context)
    rows = [json.loads(line) for line in (folder / "dev.jsonl").read_text().splitlines()]
    labels = (folder / "dev-labels.lst").read_text().split()
    for question, row, label in zip(questions, rows, labels, strict=True):
        assert sorted(question.options) == sorted(row["answer" + x] for x in "ABC")
        assert question.options[question.gold] == row["answer" + "ABC"[int(label) - 1]]
    assert [q.gold for q in questions] == [2, 2, 0, 1, 2, 2, 1, 1, 1, 2, 2, 1, 1, 2, 1, 2, 2, 1, 1, 1]
    for path in folder.iterdir():
        path.write_text("\n".join(reversed(path.read_text().split("\n")[:-1])))
    again = {q.parts: q.options for q in tasks.load("social_iqa", folder)}
    assert again == {q.parts: q.options for q in questions}


def test_comve_row():
    questions = tasks.load("comve", DATA / "comve")
    pair = ("He poured orange juice on his cereal.", "He poured milk on his cereal.")  # the first is against sense
    group = "\n".join(reversed(pair))
    assert questions[0] == tasks.Question("comve", "comve/subtaskA_data_all:2", (), pair, gold=0, group=group)
    assert ids(questions)[9:11] == ["comve/subtaskA_data_all:11", "comve/subtaskA_dev_data:2"]
    assert questions[2].options == ("Jeff ran a mile today", "Jeff ran 100,000 miles today")
    assert questions[2].gold == 1
    # Both files have an id 3, with other sentences: each file keeps to its own answers.
    golds = {q.options[0]: q.gold for q in questions}
    assert (golds["A mosquito stings me"], golds["The hangers bought the closet"]) == (1, 0)


def test_comve_answers_match_by_id_and_a_pair_in_the_other_order_is_one_group(folder):
    file = folder / "comve" / "subtaskA_data_all.csv"
    before = tasks.load("comve", file)
    answers = file.with_name("subtaskA_answers_all.csv")
    answers.write_text("\n".join(reversed(answers.read_text().split())))
    assert tasks.load("comve", file) == before and len({q.gold for q in before}) == 2
    pair = "He poured milk on his cereal.,He poured orange juice on his cereal."
    edit(file, "He drinks apple.,He drinks milk.", pair)
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
def test_a_folder_is_all_its_files_and_ids_are_unique(task):
    questions = tasks.load(task, str(DATA / task))  # a str is accepted
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


def test_a_line_separator_inside_a_json_string_is_text(folder):
    file = folder / "social_iqa" / "dev.jsonl"
    edit(file, "Tracy didn't go home", "Tracy\u2028didn't\x85go home")
    questions = tasks.load("social_iqa", file)
    assert len(questions) == 20 and questions[0].parts[0].startswith("Tracy\u2028didn't\x85go")


def test_non_ascii_text_quotes_and_line_breaks_in_cells(folder):
    file = folder / "esnli" / "esnli_dev.csv"
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["Explanation_1", "Sentence2", "gold_label", "Sentence1"])  # columns are found by name
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


@pytest.mark.parametrize("task", PUBLISHED)
def test_missing_files(task, tmp_path):
    message = error(task, tmp_path / "nowhere")
    assert "nowhere is missing; give the folder" in message and tasks.FILES[task][0] in message
    message = error(task, tmp_path)
    assert f"no {task} file" in message and all(name in message for name in tasks.FILES[task])
    (tmp_path / tasks.FILES[task][-1]).symlink_to("gone")
    assert f"{tasks.FILES[task][-1]} is a link to a file that is gone" in error(task, tmp_path)


def test_unknown_task_and_unreadable_file(folder, monkeypatch):
    assert error("snli", DATA) == "unknown task 'snli': choose one of esnli, social_iqa, comve, strategyqa, toy, jsonl"

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert "esnli_dev.csv cannot be read (Permission denied)" in error("esnli", folder / "esnli")


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        *(
            (task, content, ": the file is empty")
            for task in PUBLISHED
            for content in (b"", b"\r\n\n", codecs.BOM_UTF8)
        ),
        *((task, b"a\nb\ncaf\xe9\n", ", line 3: not UTF-8") for task in PUBLISHED),
        ("esnli", b"gold_label,Sentence1,Sentence2\n", ": no rows below the header"),
        ("strategyqa", b"[]", ": it has no rows"),
        *(("strategyqa", text, "") for text in (b"{}", b'"text"', b"[[]]", b"[" * 100_000, b"9" * 5_000)),
    ],
)
def test_content_of_another_form(task, content, message, folder):
    file = folder / task / FILE_OF[task]
    file.write_bytes(content)
    assert f"{file}{message}" in error(task, file)


ROW_FAULTS = [  # file, text in it, what replaces it, the message without --skip-bad-rows
    ("esnli_dev.csv", "dev-1,", "dev-1,,", "esnli_dev.csv, line 3: 8 cells, not 7"),
    ("esnli_dev.csv", "dev-1,entailment,", "dev-1,", "line 3: 6 cells, not 7"),
    ("esnli_dev.csv", "dev-1,entailment", "dev-1,-", "line 3: label '-'; it must be one of entailment"),
    ("esnli_dev.csv", "dev-1,entailment", "dev-1,", "line 3: label ''"),
    ("esnli_dev.csv", "Two woman are holding packages.", " ", "line 3: Sentence2 is empty"),
    ("esnli_dev.csv", "dev-1,", '"dev-1,', "line 3: not a CSV row"),  # the quote runs to the end of the file
    ("esnli_dev.csv", "dev-1,", '"dev"-1,', "line 3: not a CSV row"),
    ("dev.jsonl", '"context"', '"contxt"', "line 1: no field 'context'"),
    ("dev.jsonl", '{"context": "Sydney', '"context": "Sydney', "line 2: not JSON (Extra data)"),
    ("dev.jsonl", '"sympathetic"', "7", "line 2: no field 'answerA' that is a string"),
    ("dev.jsonl", '"sympathetic"', '""', "line 2: answerA is empty"),
    ("dev.jsonl", '"sympathetic"', '"\\ud800"', "line 2: answerA is empty or not valid text"),
    ("dev-labels.lst", "3\n1", "3\n4", "dev-labels.lst, line 2: label '4'; it must be one of 1, 2, 3"),
    ("dev-labels.lst", "3\n1", "3\n", "dev-labels.lst, line 2: label ''"),
    ("subtaskA_data_all.csv", "He drinks apple.", "", "line 3: sent0 is empty"),
    ("subtaskA_data_all.csv", "1,He drinks apple.,", "1,", "line 3: 2 cells, not 3"),
    ("subtaskA_data_all.csv", "1,He drinks apple.", '1,"He" drinks', "line 3: not a CSV row"),
    ("subtaskA_data_all.csv", "\n1,He", "\n9999,He", "line 3: id '9999' must be there once, and once in"),
    ("subtaskA_data_all.csv", "\n1,He", "\n0,He", "line 2: id '0' must be there once"),  # 2 rows: which is right?
    ("subtaskA_answers_all.csv", "\n1,0", "", "subtaskA_data_all.csv, line 3: id '1' must be there once, and once in"),
    ("subtaskA_answers_all.csv", "\n1,0", "\n1,0\n1,1", "_all.csv, line 3: id '1' must be there once, and once in"),
    ("subtaskA_answers_all.csv", "\n1,0", "\n1,2", "_all.csv, line 2: label '2'"),
    ("subtaskA_answers_all.csv", "\n1,0", "\n1", "_all.csv, line 2: label ''"),
    ("subtaskA_answers_all.csv", "\n1,0", "\n1,0,1", "_all.csv, line 2: label '0,1'"),
    ("dev.json", '"question"', '"questions"', "entry 1: no field 'question'"),
    ("dev.json", '"answer": false', '"answer": 0', "entry N: answer must be true or false, not 0"),
    ("dev.json", '"answer": false', '"answer": "false"', 'entry N: answer must be true or false, not "false"'),
    ("dev.json", '"answer": false', '"reply": false', "entry N: answer must be true or false; it is absent"),
]
FILE_FAULTS = [  # the same with --skip-bad-rows
    ("esnli_dev.csv", "Sentence2", "hypothesis", "line 1: not one column Sentence2"),
    ("esnli_dev.csv", "gold_label,Sentence1", "a,b", "line 1: not one column gold_label or Sentence1"),
    ("esnli_dev.csv", "Explanation_1", "gold_label", "line 1: not one column gold_label"),
    ("subtaskA_data_all.csv", "sent1", "sent2", "line 1: not one column sent1"),
    ("dev.jsonl", '\n{"context": "Sydney', '\n\n{"context": "Sydney', "20 labels for 21 lines"),
    ("dev-labels.lst", "3\n1", "1", "dev-labels.lst: 19 labels for 20 lines of dev.jsonl"),
    ("dev.json", '"term"', "term", "line 4: not JSON"),
]


def broken(folder, file, old, new, expected):
    """Puts the fault into the file: (task, path of the file, message)."""
    (path,) = folder.glob(f"*/{file}")
    if file == "dev.json":  # N is the first entry whose answer is false
        answers = [row["answer"] for row in json.loads(path.read_text(encoding="utf-8"))]
        expected = expected.replace("N:", f"{answers.index(False) + 1}:")
    edit(path, old, new)
    return path.parent.name, path, expected


@pytest.mark.parametrize("fault", [*ROW_FAULTS, *FILE_FAULTS])
def test_fault_in_a_file(fault, folder):
    task, path, expected = broken(folder, *fault)
    for skip in (False, True)[: 1 + (fault in FILE_FAULTS)]:
        message = error(task, path.parent, skip)
        assert expected in message and str(path.parent) in message


@pytest.mark.parametrize("fault", ROW_FAULTS)
def test_a_bad_row_is_skipped(fault, folder, capsys):
    """Exactly that row is left out; the others are as before; one line says so, under torchrun on rank 0 alone."""
    task, path, expected = broken(folder, *fault)
    lost = 2 if "\n0,He" in fault else 1
    found, before = tasks.load(task, path.parent, True), tasks.load(task, DATA / task)
    assert len(found) == 20 - lost and [q for q in before if q in found] == found
    printed, total = capsys.readouterr(), 10 if task == "comve" else 20
    assert printed.err.startswith(f"skipped {lost} of {total} rows of {path.parent}/") and printed.out == ""
    assert expected.split(", ")[-1] in printed.err and printed.err.count("\n") == 1


def test_what_is_skipped_is_counted_per_file(folder, capsys, monkeypatch):
    """A fault in each file; other ranks say nothing; a file without a good row is refused."""
    for file in ("subtaskA_data_all.csv", "subtaskA_dev_data.csv"):
        path = folder / "comve" / file
        path.write_text(path.read_text() + "x\n" * 1234)
    assert len(tasks.load("comve", folder / "comve", True)) == 20
    said = capsys.readouterr().err.splitlines()
    assert [line.split("comve/")[1] for line in said] == [
        f"{file}, the first: line 12: 1 cells, not 3; correct the row"
        for file in ("subtaskA_data_all.csv", "subtaskA_dev_data.csv")
    ]
    assert all(line.startswith("skipped 1,234 of 1,244 rows of ") for line in said)
    monkeypatch.setenv("RANK", "1")  # alone it was left behind
    assert len(tasks.load("comve", folder / "comve", True)) == 20 and capsys.readouterr().err.splitlines() == said
    for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "host"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    assert len(tasks.load("comve", folder / "comve", True)) == 20 and capsys.readouterr().err == ""
    csv_file = folder / "esnli" / "esnli_dev.csv"
    csv_file.write_text(csv_file.read_text().split("\n")[0] + "\na\nb\n")
    message = error("esnli", csv_file, True)
    assert (
        message == f"all 2 rows of {csv_file} are bad, the first: {csv_file}, line 2: 1 cells, not 7; correct the row"
    )


def test_missing_labels_and_answers(folder):
    (folder / "social_iqa" / "dev-labels.lst").unlink()
    message = error("social_iqa", folder / "social_iqa")
    assert "dev.jsonl, line 1: its label is missing; put dev-labels.lst beside" in message
    comve = folder / "comve"
    (comve / "subtaskA_gold_answers.csv").unlink()
    message = error("comve", comve / "subtaskA_dev_data.csv")
    assert "its answers are missing; put subtaskA_dev_answers.csv or subtaskA_gold_answers.csv" in message
    # The answers of the training file have the ids of the dev file too, and must still not serve it.
    shutil.copy(comve / "subtaskA_answers_all.csv", comve / "subtaskA_gold_answers.csv")
    for skip in (False, True):
        message = error("comve", comve / "subtaskA_dev_data.csv", skip)
        assert "gold_answers.csv: 1 of its 10 ids are among the 10 of subtaskA_dev_data.csv" in message
    edit(comve / "subtaskA_data_all.csv", "1,He drinks apple.,He drinks milk.\n", "")
    assert "answers_all.csv, line 2: id '1' is not in" in error("comve", comve / "subtaskA_data_all.csv")
    assert len(tasks.load("comve", comve / "subtaskA_data_all.csv", True)) == 9


def test_command_line():
    def run(*args):
        return subprocess.run([sys.executable, ROOT / "tasks.py", *args], capture_output=True, text=True)

    good = run("esnli", DATA / "esnli", "--skip-bad-rows")
    assert good.returncode == 0 and good.stdout.startswith("20 questions in 7 groups; gold (A) 35.0%")
    assert good.stderr == ""
    usage = "see tasks.py --help"
    for bad, said in ((("esnli", "nowhere"), "nowhere is missing"), ((), usage), (("esnli", DATA, "--skip"), usage)):
        result = run(*bad)
        assert result.returncode == 2 and said in result.stderr and result.stderr.count("\n") == 1


def test_commands_read_ones_own_questions_and_skip_bad_rows(tmp_path, capfd):
    questions = tasks.load("esnli", DATA / "esnli")
    rows = [{"parts": q.parts, "options": q.options, "gold": q.gold, "group": q.group} for q in questions]
    file = written(tmp_path / "my.jsonl", [rows[0], rows[1] | {"gold": 3}, *rows[2:]])
    given = ["--model", str(tiny.build(tmp_path / "model")), "--task", "jsonl", "--data", str(file)]
    sizes = ["--out", str(tmp_path / "set"), "--size", "2", "--eval-questions", "2", "--fit-questions", "4"]
    runs = launch.flags(given[1], tmp_path / "run", task="jsonl", data=file, steps=1)
    for command in (
        lambda *skip: launch.call([*runs, *skip])[::2],
        lambda *skip: (faith.main([*given, "--limit", "2", "--fit", "4", *skip]), capfd.readouterr().err),
        lambda *skip: (build.main([*given, *sizes, *skip]), capfd.readouterr().err),
    ):
        for skip, status, said in (
            ((), 2, f"{file}, line 2: gold must be at most 2, not 3"),
            (("--skip-bad-rows",), 0, "skipped 1 of 20 rows"),
        ):
            code, error = command(*skip)
            assert code == status and said in error
    seen = set().union(*identity.question_list(tmp_path / "run" / "model").values())
    assert seen and seen <= {identity.mark(q) for q in tasks.load("jsonl", file, True)}


# --- one's own questions, and exports of Hugging Face's datasets ---

OWN = {"parts": ["A man sleeps.", "Is he awake?"], "options": ["yes", "no"], "gold": 1, "group": "g"}


def written(path, rows):
    """The rows in a file of the kind that its name says, or of JSON lines."""
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as out:
            csv.DictWriter(out, rows[0]).writeheader()
            csv.DictWriter(out, rows[0]).writerows(rows)
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)) + "\n\n")
    return path


def test_the_example_of_the_documentation(tmp_path, capsys):
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    file = tmp_path / "questions.jsonl"
    file.write_text(text.split("```json\n")[1].split("```")[0])
    questions = tasks.load("jsonl", tmp_path)
    assert len(questions) == 5 and tasks.load("jsonl", file) == questions
    assert ids(questions) == [*(f"jsonl/questions:{i}" for i in (1, 2, 3)), "kettle 1", "kettle 2"]
    assert (questions[1].parts, questions[1].gold) == (("The library opens at nine.", "Does Ann like the library?"), 2)
    assert [q.group for q in questions] == ["library", "library", "bus", "kettle", "kettle"]
    assert f"\n```\n{faith.ask(questions[0])}\n```\n" in text
    edited, edit = reward.intervene(questions[3], "adverb", random.Random(0))
    assert edit.word in " ".join(edited.parts) and edited.options == questions[3].options
    edited, edit = reward.intervene(questions[0], "bias", random.Random(0))
    assert f"at eight? {edit.text}\n(A) yes" in faith.ask(edited)
    assert tasks.main(["jsonl", str(file)]) == 0
    assert capsys.readouterr().out == "5 questions in 3 groups; gold (A) 40.0%  (B) 20.0%  (C) 40.0%\n"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"parts": []}, "must be texts, none empty"), ({"parts": ["A", " "]}, "must be texts, none empty"),
        ({"parts": "A man."}, 'parts must be a list, each a text, not "A man."'),
        ({"parts": None}, "parts must be a list, each a text, not null"),
        ({"options": ["yes"]}, "1 options; give 2"), ({"options": ["a", "b", "c"]}, "3 options; give 2, as many"),
        ({"options": ["yes", 2]}, "options must be a list, each a text"), ({"options": ["yes", ""]}, "none empty"),
        ({"gold": 2}, "gold must be at most 1, not 2"), ({"gold": -1}, "gold must be above -1, not -1"),
        ({"gold": "B"}, 'gold must be a whole number, not "B"'), ({"gold": True}, "gold must be a whole number"),
        ({"group": ""}, "none empty"), ({"group": 3}, "group must be a text, not 3"),
        ({"id": "one"}, "the id 'one' came before"), ({"id": 7}, "id must be a text, not 7"),
        ({"parts": ["\ud800"]}, "must be texts"), ([1], "holds no JSON object"), (7, "holds no JSON object"),
    ],
)  # fmt: skip
def test_a_bad_row_of_ones_own(wrong, said, tmp_path, capsys):
    bad = OWN | wrong if isinstance(wrong, dict) else wrong
    rows = [OWN | {"id": "one"}, OWN | {"note": "other keys are passed over"}, bad, OWN]
    for name, place in (("my.jsonl", "line 3"), ("my.json", "entry 3")):
        file = written(tmp_path / name, rows)
        message = error("jsonl", file)
        assert message.startswith(f"{file}, {place}") and said in message
        assert ids(tasks.load("jsonl", file, True)) == ["one", "jsonl/my:2", "jsonl/my:4"]
        assert f"skipped 1 of 4 rows of {file}, the first: {place}" in capsys.readouterr().err


def test_blank_lines_and_space_around_a_text(tmp_path):
    file = tmp_path / "my.jsonl"
    file.write_text(
        "\n" + json.dumps(OWN | {"parts": [" A\nman. "], "options": ["yes ", "no"]}) + "\n \n" + json.dumps(OWN)
    )
    first, second = tasks.load("jsonl", file)
    assert (first.parts, first.options, first.id) == (("A\nman.",), ("yes", "no"), "jsonl/my:2")
    assert second.id == "jsonl/my:4"


def test_options_are_as_many_as_letters(tmp_path):
    letters = [f"option {i}" for i in range(11)]
    rows = [OWN | {"options": letters[: len(faith.LETTERS)], "gold": 9}]
    (question,) = tasks.load("jsonl", written(tmp_path / "most.jsonl", rows))
    assert "\n(J) option 9\n" in faith.ask(question)
    message = error("jsonl", written(tmp_path / "more.jsonl", [OWN | {"options": letters}]))
    assert "line 1: 11 options; give 2 to 10, as many in each row" in message


EXPORTS = {  # the columns of a published row -> those of the export, others with them
    "esnli": lambda q: {"premise": q.parts[0], "hypothesis": q.parts[1], "label": (0, 2, 1)[q.gold], "more": "x"},
    "social_iqa": lambda q: dict(zip(("context", "question", "answerA", "answerB", "answerC", "label"),
                                     (*q.parts, *q.options, f"{q.gold + 1}\n"), strict=True)),
    "comve": lambda q: {"sent0": q.options[0], "sent1": q.options[1], "label": q.gold},
    "strategyqa": lambda q: {"qid": "x", "question": q.parts[0], "answer": q.gold == 0, "facts": ["x"]},
}  # fmt: skip


@pytest.mark.parametrize("task", PUBLISHED)
def test_an_export_gives_the_published_questions(task, tmp_path, capsys):
    wanted = tasks.load(task, DATA / task)
    rows = [EXPORTS[task](question) for question in wanted]
    (tmp_path / "train-0-labels.lst").write_text("of another file\n")  # these rows have their own labels
    for end in (".parquet", ".json", ".jsonl", *([".csv"] if task != "strategyqa" else [])):
        file = written(tmp_path / f"train-0{end}", rows)
        found = tasks.load(task, file)
        assert [(q.parts, q.options, q.gold, q.group) for q in found] == [
            (q.parts, q.options, q.gold, q.group) for q in wanted
        ]
        assert ids(found)[0] == f"{task}/train-0:{2 if end == '.csv' else 1}" and len(set(ids(found))) == 20
    written(tmp_path / "test-0.parquet", rows[:3])
    assert tasks.load(task, tmp_path) == [
        q for n in ("test", "train") for q in tasks.load(task, tmp_path / f"{n}-0.parquet")
    ]
    label = "answer" if task == "strategyqa" else "label"
    file = written(tmp_path / "x.parquet", [*rows[:4], rows[4] | {label: None}])
    assert f"{file}, row 5: {label}" in error(task, file)
    assert len(tasks.load(task, file, True)) == 4 and "skipped 1 of 5 rows" in capsys.readouterr().err
    less = [{name: value for name, value in row.items() if name != label} for row in rows]
    said = "its label is missing" if task == "social_iqa" else "not one column"
    assert said in error(task, written(file, less))


def test_files_of_ones_own_in_parquet_belong_together(tmp_path, capsys):
    written(tmp_path / "a.parquet", [OWN, OWN | {"gold": 0}])
    written(tmp_path / "b.parquet", [OWN | {"options": [*OWN["options"], "another"]}])
    counts = [len(OWN["options"]) + k for k in (0, 1)]
    assert error("jsonl", tmp_path).endswith("its files have {} and {} options; give as many in each".format(*counts))
    for name in "ab":
        ids = "one", f"{name}1", f"{name}2"
        written(tmp_path / f"{name}.parquet", [OWN | {"id": i, "group": name + i} for i in ids])
    with pytest.raises(ValueError, match="the id 'one' occurs in two files or tasks"):
        tasks.load_splits({"jsonl": tmp_path}, {"test": 1, "train": -1}, False)
    flags = ["--model", str(tiny.build(tmp_path / "model")), "--task", "jsonl", "--data", str(tmp_path)]
    assert faith.main([*flags, "--limit", "2", "--fit", "2"]) == 2
    assert "the id 'one' occurs in two files" in capsys.readouterr().err


def test_parquet_of_ones_own_without_pyarrow_and_cut_short(tmp_path, monkeypatch):
    file = written(tmp_path / "questions.parquet", [OWN, OWN | {"gold": 0}])
    first, second = tasks.load("jsonl", tmp_path)
    assert (first.parts, first.gold, second.gold, second.id) == (
        ("A man sleeps.", "Is he awake?"),
        1,
        0,
        "jsonl/questions:2",
    )
    whole = file.read_bytes()
    for bad in (whole[:40], whole[:-9], b"PAR1"):
        file.write_bytes(bad)
        assert f"{file} cannot be read (" in error("jsonl", file)
    file.write_bytes(whole)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert error("jsonl", file) == f"{file} is a parquet file; pip install pyarrow to read it, or give JSON lines"


# --- order and splits ---


def test_shuffled_depends_on_the_seed_alone():
    questions = tasks.load("esnli", DATA / "esnli")
    once = tasks.shuffled(questions, 7)
    assert lines(once) == [10, 8, 13, 21, 5, 3, 20, 14, 19, 17, 9, 15, 11, 6, 12, 16, 7, 4, 18, 2]
    assert sorted(ids(once)) == sorted(ids(questions)) and once != questions
    assert tasks.shuffled(mixed(questions), 7) == once != tasks.shuffled(questions, 8)
    assert tasks.shuffled(questions[:15], 7) == [q for q in once if q in questions[:15]]


def test_split_depends_on_the_seed_alone():
    questions, sizes = tasks.load("esnli", DATA / "esnli"), {"test": 5, "train": 8}
    once = tasks.split(questions, sizes, seed=7)
    assert lines(once["test"]) == [13, 19, 17, 11, 12]
    assert lines(once["train"]) == [10, 8, 21, 3, 20, 9, 4, 2]
    assert tasks.split(mixed(questions), sizes, seed=7) == once != tasks.split(questions, sizes, seed=8)


def test_split_sizes_and_whole_groups():
    questions = made([1, 2, 3, 4, 5] * 20)
    sizes = {"test": 50, "dev": 7, "none": 0, "train": 150}
    splits = tasks.split(questions, sizes, seed=0)
    assert {name: len(rows) for name, rows in splits.items()} == sizes
    groups = [Counter(q.group for q in rows) for rows in splits.values()]
    assert len(set().union(*groups)) == sum(map(len, groups))
    assert len({q.id for rows in splits.values() for q in rows}) == sum(sizes.values())
    size = Counter(q.group for q in questions)
    for kept in groups:  # at most the last group of a split is cut
        assert sum(kept[group] < size[group] for group in kept) <= 1


def test_a_split_does_not_depend_on_later_ones():
    questions, later = made([3, 1, 4, 1, 5, 9, 2, 6] * 5), ({}, {"train": 10}, {"dev": 5, "train": -1})
    first, *others = (tasks.split(questions, {"test": 30} | sizes, seed=1)["test"] for sizes in later)
    assert others == [first, first]
    short, long = (set(ids(tasks.split(questions, {"test": 30, "train": n}, seed=1)["train"])) for n in (40, 60))
    assert short <= long


def test_the_rest():
    questions = made([2] * 10)
    splits = tasks.split(questions, {"test": 5, "train": -1}, seed=0)
    assert (len(splits["test"]), len(splits["train"])) == (5, 14)  # the other row of the cut group is in neither
    assert sorted(ids(tasks.split(questions, {"all": -1}, seed=3)["all"])) == sorted(ids(questions))


def test_large_groups_do_not_come_first():
    questions = made([1] * 300 + [10] * 30)  # half of the rows, one group in eleven
    tests = [tasks.split(questions, {"test": 200}, seed)["test"] for seed in range(10)]
    share = sum(int(q.group.split()[1]) >= 300 for rows in tests for q in rows) / 2000
    assert 0.4 < share < 0.6


def test_one_group_name_in_two_tasks_is_two_groups():
    questions = made([2, 2]) + made([2, 2], task="comve")
    splits = tasks.split(questions, dict.fromkeys("abcd", 2), seed=0)
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
    golds, options = Counter(q.gold for q in questions), len(questions[0].options)
    assert all(abs(golds[i] / count - 1 / options) < 0.05 for i in range(options))
    splits = tasks.split(questions, {"test": 300, "dev": 100, "train": -1}, seed=0)
    seen = [{q.group for q in rows} for rows in splits.values()]
    assert len(set().union(*seen)) == sum(map(len, seen)) == groups
    assert (len(splits["test"]), len(splits["dev"])) == (300, 100) and len(splits["train"]) > count - 410
