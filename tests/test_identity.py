"""Runs, data sets, checkpoints, measured rows and models say what they were made of, and a mismatch is refused."""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import tiny
from launch import DATA, call, flags, ran, refused

import faith
import reward
from lab import build, experiment, page, paper, report
from run import checkpoint, identity
from run.ranks import Ranks


def change_weights(folder):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].flip(0).contiguous()
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_json(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def change_data(folder):
    """A word of some questions; their ids stay."""
    file = folder / "esnli_dev.csv"
    assert "shirt" in file.read_text()
    file.write_text(file.read_text().replace("shirt", "skirt"))


BACKWARD = dataclasses.replace(reward.HINTS["bias"], phrasings=reward.PHRASINGS[::-1])
CHANGES = {  # what differs: how it comes about, given the model's folder, the data's folder and a monkeypatch
    "weights": lambda model, data, patch: change_weights(model),
    "config": lambda model, data, patch: change_json(model / "config.json", rope_theta=20000.0),
    "config, by an end of turn": lambda model, data, patch: change_json(
        model / "generation_config.json", eos_token_id=[3]),
    "tokenizer": lambda model, data, patch: change_json(
        model / "tokenizer_config.json", chat_template="{{ '<|im_start|>system\nHello<|im_end|>\n' }}" + tiny.TEMPLATE),
    "prompts": lambda model, data, patch: patch.setitem(faith.WHYS, "leading", "Why ({letter})?"),
    "words": lambda model, data, patch: patch.setitem(reward.HINTS, "bias", BACKWARD),
    "questions": lambda model, data, patch: change_data(data),
}  # fmt: skip


@pytest.fixture(scope="module")
def begun(folder, tmp_path_factory):
    """A model, data, a run of two steps on them, and rows of two measurements."""
    place = tmp_path_factory.mktemp("begun")
    shutil.copytree(folder, place / "model")
    shutil.copytree(DATA, place / "data")
    ran(flags(place / "model", place / "run", data=place / "data", checkpoint_every=1))
    return place


@pytest.fixture
def copy(begun, monkeypatch):
    """The same place with a fresh run folder; the model and data are put back afterwards."""
    monkeypatch.setattr(identity, "HASHED", {})
    kept = begun.with_name(begun.name + "-kept")
    shutil.copytree(begun, kept)
    yield begun
    shutil.rmtree(begun)
    kept.rename(begun)


@pytest.mark.parametrize("change", CHANGES)
def test_a_resumed_run(copy, change, monkeypatch):
    CHANGES[change](copy / "model", copy / "data", monkeypatch)
    before = (copy / "run" / "metrics.jsonl").read_text()
    error = refused(["--resume", "--out", copy / "run", "--steps", 3])
    assert f"was made with other {change.split(',')[0]} (sha256: " in error, error
    assert (copy / "run" / "metrics.jsonl").read_text() == before


def test_a_resumed_run_of_the_same(copy, capsys):
    """It goes on, without reading the weights again; a run from before there was an identity.json says so."""
    kept = json.loads((copy / "run" / "identity.json").read_text())
    file = str(copy / "model" / "model.safetensors")  # this process has also read the models of other tests
    assert kept["files"][file][3] == hashlib.sha256((copy / "model" / "model.safetensors").read_bytes()).hexdigest()
    again = ["--resume", "--out", copy / "run", "--steps", 3]
    assert call(again)[0] == 0
    (copy / "run" / "identity.json").unlink()
    code, printed, _ = call([*again[:-1], 4])
    assert code == 0 and "identity.json is missing" in printed and (copy / "run" / "identity.json").exists()


def test_a_model_and_data_that_have_moved(copy, capsys):
    """They are given anew, to a run and to a data set; what counts is what they hold."""
    built = ["--task", "esnli", "--out", str(copy / "set"), "--size", "4", "--eval-questions", "2"]
    built += ["--fit-questions", "2", "--model"]
    assert build.main([*built, str(copy / "model"), "--data", str(copy / "data")]) == 0
    there = copy / "elsewhere"
    there.mkdir()
    for name in ("model", "data", "run"):
        (copy / name).rename(there / name)
    new = ["--model", there / "model", "--data", there / "data"]
    ran(["--resume", "--out", there / "run", "--steps", 3, *new])
    assert build.main([*built, str(new[1]), *map(str, new[2:])]) == 0
    change_data(there / "data")
    assert "other questions" in refused(["--resume", "--out", there / "run", "--steps", 4])
    shutil.move(there / "model", copy / "model")
    shutil.move(there / "data", copy / "data")


def test_what_lies_in_the_folder_of_a_run(copy, tmp_path):
    """questions.txt is made again; rows measured before another run's training are not taken for its own."""
    (copy / "run" / "questions.txt").unlink()
    ran(["--resume", "--out", copy / "run", "--steps", 3])
    assert (copy / "run" / "questions.txt").read_text() == (copy / "run" / "model" / "questions.txt").read_text()
    other = tiny.build(tmp_path / "model", seed=18)
    ran(flags(other, tmp_path / "run", data=copy / "data"))
    for file in (tmp_path / "run").glob("before.*"):
        shutil.copy(file, copy / "run")
    assert "before.identity.json was made with other weights" in refused(["--resume", "--out", copy / "run"])


def test_labels_of_another_data_set(copy, tmp_path):
    """Of the same size and the same questions. A run goes on with its own alone."""
    other = tiny.build(tmp_path / "model", seed=18)
    for model, name in ((copy / "model", "set"), (other, "other")):
        given = ["--model", model, "--data", copy / "data", "--task", "esnli", "--out", copy / name, "--size", 4,
                 "--eval-questions", 5, "--fit-questions", 5]  # fmt: skip
        assert build.main([*map(str, given)]) == 0
    run = flags(copy / "model", copy / "frozen", data=copy / "data", labels="frozen", dataset=copy / "set")
    ran(run)
    kept = (copy / "set" / "train.jsonl").read_text()
    shutil.copy(copy / "other" / "train.jsonl", copy / "set")
    again = ["--resume", "--out", copy / "frozen", "--steps", 3]
    assert "train.jsonl is not the file that its manifest names" in refused(again)
    manifest = json.loads((copy / "set" / "manifest.json").read_text())
    del manifest["sha256"]  # of an earlier version
    (copy / "set" / "manifest.json").write_text(json.dumps(manifest))
    assert "was made with other dataset (sha256: " in refused(again)
    (copy / "set" / "train.jsonl").write_text(kept)
    assert "was made with other dataset (sha256: " in refused([*again, "--dataset", ""])
    ran(again)


def test_flags_that_were_edited(copy):
    """A flag that no resumed run may change, changed in args.json itself."""
    change_json(copy / "run" / "args.json", samples=2)
    assert "was made with other flags (sha256: " in refused(["--resume", "--out", copy / "run", "--steps", 3])


def test_a_large_file_is_read_once(tmp_path, monkeypatch):
    file = tmp_path / "a"
    file.write_bytes(b"one")
    first = identity.file_digest(file)
    opened, plain = [], Path.open
    monkeypatch.setattr(Path, "open", lambda self, *mode, **way: opened.append(1) or plain(self, *mode, **way))
    assert identity.file_digest(file) == first and not opened
    stamp = file.stat().st_mtime_ns
    file.write_bytes(b"two")  # of the same size, and as old
    os.utime(file, ns=(stamp, stamp))
    assert identity.file_digest(file) == hashlib.sha256(b"two").hexdigest() and opened


def test_a_checkpoint_of_another_run(copy, tmp_path):
    """Its tensors have the same names and shapes."""
    other = tiny.build(tmp_path / "model", seed=18)
    ran(flags(other, tmp_path / "run", data=copy / "data", checkpoint_every=1))
    shutil.rmtree(copy / "run" / "checkpoints")
    shutil.copytree(tmp_path / "run" / "checkpoints", copy / "run" / "checkpoints")
    error = refused(["--resume", "--out", copy / "run", "--steps", 3])
    assert "step-00000002 was made with other weights" in error
    manifest = copy / "run" / "checkpoints" / "step-00000002" / "manifest.json"
    change_json(manifest, steps=1)
    assert checkpoint.faults(manifest.parent) == "manifest.json was changed, or is of another version"


@pytest.mark.parametrize("change", CHANGES)
def test_a_data_set_that_is_continued(copy, change, monkeypatch, capsys):
    given = ["--model", copy / "model", "--data", copy / "data", "--task", "esnli", "--out", copy / "set",
             "--size", 4, "--eval-questions", 2, "--fit-questions", 2]  # fmt: skip
    assert build.main([*map(str, given)]) == 0
    CHANGES[change](copy / "model", copy / "data", monkeypatch)
    assert build.main([*map(str, given)]) == 2
    assert f"set was made with other {change.split(',')[0]} (sha256: " in capsys.readouterr().err


def test_ranks_that_have_read_other_files(network):
    subject = SimpleNamespace(made_of={"questions": "q"}, sampler=SimpleNamespace(model=network))
    for name in ("questions", "weights"):
        ranks = SimpleNamespace(gather=lambda items, name=name: [items[0], items[0] | {name: "of node 2"}])
        with pytest.raises(ValueError, match=f"rank 1 .* was made with other {name} "):
            experiment.check_ranks(subject, ranks)
    experiment.check_ranks(subject, SimpleNamespace(gather=lambda items: items * 2))
    state = checkpoint.RunState(Path("none"), None, SimpleNamespace(position=dict), {}, ranks := Ranks(), 2)
    ranks.gather = lambda items: [*items, Path("step-00000002")]
    with pytest.raises(ValueError, match="ranks see different checkpoints in none, "):
        state.resume()


def test_an_adapter_over_a_changed_base(copy, capsys):
    out = copy / "lora"
    ran(flags(copy / "model", out, data=copy / "data", lora=2, steps=1))
    measure = ["--model", str(out / "model"), "--task", "esnli", "--data", str(copy / "data"), "--limit", "5",
               "--fit", "2", "--max-new-tokens", "2"]  # fmt: skip
    assert faith.main(measure) == 0
    hashed = identity.weights(out / "model")
    (copy / "model").rename(copy / "moved")
    change_json(out / "model" / "adapter_config.json", base_model_name_or_path=str(copy / "moved"))
    assert identity.weights(out / "model") == hashed
    change_json(out / "model" / "adapter_config.json", r=1)
    assert identity.weights(out / "model") != hashed
    change_json(out / "model" / "adapter_config.json", r=2, base_model_name_or_path=str(copy / "model"))
    (copy / "moved").rename(copy / "model")
    change_json(copy / "model" / "config.json", rope_theta=20000.0)
    assert faith.main(measure) == 2
    assert f"the adapter {out}/model was made with other config (sha256: " in capsys.readouterr().err
    change_weights(copy / "model")
    assert faith.main(measure) == 2
    assert f"the adapter {out}/model was made with other weights and config" in capsys.readouterr().err


def test_questions_of_an_earlier_run(copy, folder, capsys):
    """Neither measured where they were trained on, nor trained on where they were kept for tests; from run to run."""
    model = copy / "run" / "model"
    kinds = [line.split()[0] for line in (model / "questions.txt").read_text().splitlines()]
    assert set(kinds) == {"trained", "test"} and kinds.count("test") <= 5
    measure = ["--model", str(model), "--task", "esnli", "--fit", "2", "--max-new-tokens", "2", "--data"]
    assert faith.main([*measure, str(copy / "data"), "--limit", "5"]) == 0
    assert faith.main([*measure, str(copy / "data"), "--limit", "8"]) == 2
    assert "was trained on" in (error := capsys.readouterr().err) and "give a smaller --limit" in error
    built = ["--model", str(model), "--data", str(copy / "data"), "--task", "esnli", "--out", str(copy / "set")]
    assert build.main([*built, "--eval-questions", "8", "--fit-questions", "2", "--size", "2"]) == 2
    assert "give a smaller --eval-questions" in capsys.readouterr().err
    moved = shutil.copy(DATA / "esnli_dev.csv", copy / "elsewhere.csv")  # the same questions from another file
    assert faith.main([*measure, str(moved), "--limit", "8"]) == 2
    for eval_questions, words in ((8, "was trained on"), (2, "would train on"), (0, "would train on")):
        given = flags(model, copy / "second", data=copy / "data", eval_questions=eval_questions)
        assert words in refused(given) and not (copy / "second").exists()
    ran(flags(model, copy / "second", data=copy / "data", steps=1))
    assert (copy / "second" / "model" / "questions.txt").read_text() == (model / "questions.txt").read_text()
    for content in (b"trained\n", b"trained 0123456789ab\ntest 01234", b"\xff", b""):  # the second is cut short
        (model / "questions.txt").write_bytes(content)
        assert f"{model}/questions.txt" in refused(flags(model, copy / "third", data=copy / "data"))
    (model / "questions.txt").unlink()
    (model / "questions.txt").symlink_to("gone")
    assert f"{model}/questions.txt is a link" in refused(flags(model, copy / "third", data=copy / "data"))


def test_calibration_of_another_task_or_other_prompts(copy, tmp_path, monkeypatch, capsys):
    """Or of another model. It serves the model that it was fitted on, and what was trained from that."""
    ran(flags(copy / "model", copy / "calibrated", data=copy / "data", steps=1) + ["--calibrate"])
    file = copy / "calibrated" / "model" / "calibration.json"
    ask = ["--model", str(copy / "model"), "--limit", "2", "--fit", "2", "--max-new-tokens", "2", "--calibration"]
    esnli = ["--task", "esnli", "--data", str(copy / "data")]
    social = ["--task", "social_iqa", "--data", str(DATA.parent / "social_iqa")]
    assert faith.main([*ask, str(file), *esnli]) == 0
    ask[1] = str(file.parent)
    assert faith.main([*ask, str(file), *esnli]) == 0
    ask[1] = str(tiny.build(tmp_path / "model", seed=18))
    assert faith.main([*ask, str(file), *esnli]) == 2 and "was made with other weights" in capsys.readouterr().err
    ask[1] = str(copy / "model")
    assert faith.main([*ask, str(file), *social]) == 2 and "task must be 'social_iqa'" in capsys.readouterr().err
    monkeypatch.setattr(faith, "LAST", "Give the letter.")
    assert faith.main([*ask, str(file), *esnli]) == 2 and "other prompts" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["prompts", "words", "questions"])
def test_rows_that_are_compared(copy, change, monkeypatch, capsys):
    """Both of a table and of a report; weights may differ, and files without hashes are of an earlier version."""
    cells = [copy / name / "cells" / "esnli-bias" for name in ("base", "run")]
    measure = ["--task", "esnli", "--data", str(copy / "data"), "--limit", "5", "--fit", "2", "--max-new-tokens", "2",
               "--temperature", "1"]  # fmt: skip
    for cell, model in zip(cells, (copy / "model", copy / "run" / "model"), strict=True):
        cell.parent.mkdir(parents=True)
        assert faith.main([*measure, "--model", str(model), "--rows", str(cell)]) == 0
    rows = [f"{cell}.T1.jsonl" for cell in cells]
    assert report.main(rows) == 0 and paper.main([str(cell.parent.parent) for cell in cells]) == 0
    CHANGES[change](copy / "model", copy / "data", monkeypatch)
    if change == "questions":  # the question that differs may not be among those measured
        (copy / "run" / "model" / "questions.txt").unlink()
    assert faith.main([*measure, "--model", str(copy / "run" / "model"), "--rows", str(cells[1])]) == 0
    capsys.readouterr()
    folders = [str(cell.parent.parent) for cell in cells]
    for tool, given in ((report, rows), (page, [*rows, "--to", str(copy / "page.html")]), (paper, folders)):
        assert tool.main(given) == 2 and f"other {change}" in capsys.readouterr().err
    for cell in cells:
        (cell.parent / "esnli-bias.identity.json").unlink()
    assert report.main(rows) == 0


@pytest.mark.parametrize(("given", "what"), [
    (["--calibration", "fit"], "calibration"), (["--max-new-tokens", "3"], "length"),
    (["--dtype", "bf16"], "dtype"),
])  # fmt: skip
def test_rows_that_were_measured_in_another_way(copy, given, what, capsys):
    measure = ["--model", str(copy / "model"), "--task", "esnli", "--data", str(copy / "data"), "--limit", "5",
               "--fit", "2", "--max-new-tokens", "2"]  # fmt: skip
    for name, more in (("a", []), ("b", given), ("c", [])):
        assert faith.main([*measure, *more, "--rows", str(copy / name)]) == 0
    a, b, c = (str(copy / f"{name}.T0.jsonl") for name in "abc")
    assert report.main([a, c]) == 0
    assert report.main([a, b]) == 2 and f"was made with other {what} (" in capsys.readouterr().err
    file = copy / "a.identity.json"  # of an earlier version
    made_of = {name: value for name, value in json.loads(file.read_text())["made_of"].items() if name != what}
    change_json(file, made_of=made_of)
    assert report.main([a, b]) == report.main([b, a]) == 0


def test_seeds_of_a_model_that_has_moved(copy, tmp_path, capsys):
    for name in ("model", "data"):
        shutil.copytree(copy / name, tmp_path / name)
    ran(flags(tmp_path / "model", tmp_path / "run", data=tmp_path / "data", checkpoint_every=1, seed=1))
    runs = [copy / "run", tmp_path / "run"]
    for run in runs:
        (run / "cells").mkdir()
        assert faith.main(["--model", str(run / "model"), "--task", "esnli", "--data", str(copy / "data"), "--limit",
                           "5", "--fit", "2", "--max-new-tokens", "2", "--temperature", "1", "--rows",
                           str(run / "cells" / "esnli-bias")]) == 0  # fmt: skip
    assert paper.main([*map(str, runs)]) == 0
    kept = json.loads((runs[1] / "identity.json").read_text())
    change_json(runs[1] / "identity.json", made_of=kept["made_of"] | {"questions": "0"})
    capsys.readouterr()
    assert paper.main([*map(str, runs)]) == 2 and "was made with other questions" in capsys.readouterr().err


def test_cells_of_another_model(copy, tmp_path, capsys):
    """The base is not the model that the run began with; or the run has gone on since its cell was measured."""
    cells = [copy / name / "cells" / "esnli-bias" for name in ("base", "run")]
    measure = ["--task", "esnli", "--data", str(copy / "data"), "--limit", "5", "--fit", "2", "--max-new-tokens", "2",
               "--temperature", "1"]  # fmt: skip
    other = tiny.build(tmp_path / "model", seed=18)
    for cell, model in zip(cells, (other, copy / "run" / "model"), strict=True):
        cell.parent.mkdir(parents=True)
        assert faith.main([*measure, "--model", str(model), "--rows", str(cell)]) == 0
    table = [str(copy / "base"), str(copy / "run")]
    assert paper.main(table) == 2 and "give the base that the run began with" in capsys.readouterr().err
    assert faith.main([*measure, "--model", str(copy / "model"), "--rows", str(cells[0])]) == 0
    assert paper.main(table) == 0
    ran(["--resume", "--out", copy / "run", "--steps", 3])
    assert paper.main(table) == 2 and f"measure {copy}/run/model again" in capsys.readouterr().err
