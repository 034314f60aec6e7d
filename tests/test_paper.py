"""lab.paper: hand-made runs against scipy's correlation and a plain bootstrap; what is missing, undefined, wrong."""

import json

import numpy as np
import pytest
from scipy import stats
from test_report import column, make_row

import report
from lab import paper
from run import files, tables

N = 240
HOME, FAR, CROSS = ("esnli", "bias"), ("comve", "bias"), ("esnli", "adverb")


def some_rows(seed, link, kind="bias", n=N, influence_seed=0, flips=()):
    """n rows of n/2 groups; I drawn by influence_seed, then turned over for the ids in flips; M follows I by `link`."""
    moved, rng = np.random.default_rng(influence_seed).random(n) < 0.4, np.random.default_rng(seed)
    rows = []
    for k in range(n):
        i = int(moved[k]) ^ (k in flips)
        m = i if rng.random() < link else int(rng.random() < 0.4)
        rows.append(make_row(k, i, m, group=f"g{k // 2}", kind=kind, gold=2 * (k % 5 == 0)))
    return rows


def write_run(folder, cells, fit=None, logged=None, asked=None, **args):
    """A run's folder; without args a base. cells: {(where, kind): rows}; logged: steps in metrics.jsonl; asked: the
    args in each cell's JSON."""
    (folder / "cells").mkdir(parents=True)
    for key, rows in cells.items():
        files.write_jsonl(folder / "cells" / f"{'-'.join(key)}.T1.jsonl", rows)
        if asked:
            files.write_json(folder / "cells" / f"{'-'.join(key)}.json", {"args": asked})
        if fit:
            files.write_jsonl(folder / "cells" / f"{'-'.join(key)}.fit.jsonl", fit)
    if args:
        defaults = {"objective": "disclosure", "labels": "on-policy", "task": "esnli", "intervention": "bias"}
        files.write_json(folder / "args.json", defaults | {"model": "m", "steps": 200} | args)
    if logged is not None:
        files.write_jsonl(folder / "metrics.jsonl", [{"step": step} for step in range(logged)])
    return folder


def command(capsys, *args):
    """lab.paper in this process: (exit status, stdout, stderr)."""
    code = paper.main([str(arg) for arg in args])
    return code, *capsys.readouterr()


def phi(rows, influence=None):
    return stats.pearsonr(column(influence or rows, "influence"), column(rows, "mention")).statistic


def resampled(of, rows, seed=5, resamples=1000):
    """95 % interval of of(places of the rows drawn), whole groups drawn, by a plain loop."""
    rng, groups = np.random.default_rng(seed), sorted({row["group"] for row in rows})
    places = {g: [k for k, row in enumerate(rows) if row["group"] == g] for g in groups}
    drawn = [of([k for g in rng.choice(groups, len(groups)) for k in places[g]]) for _ in range(resamples)]
    return np.percentile(drawn, [2.5, 97.5])


@pytest.fixture(scope="module")
def paper_runs(tmp_path_factory):
    """A base and five runs, three of them seeds of one row; e-SNLI and ComVE, bias phrases and adverbs."""
    out, fit, cells = tmp_path_factory.mktemp("runs"), some_rows(99, 0.5), {}
    for n, (name, link, flips) in enumerate((("base", 0.0, ()), ("rq1", 0.1, (1, 2)), ("frozen", 0.6, range(0, 60, 2)),
                                             ("s1", 0.7, (5,)), ("s2", 0.9, ()), ("s3", 0.5, (9, 11)))):  # fmt: skip
        cells[name] = {HOME: some_rows(10 + n, link, flips=flips), FAR: some_rows(20 + n, link / 2),
                       CROSS: some_rows(30 + n, 0.1, "adverb")}  # fmt: skip
    rng = np.random.default_rng(7)
    for row in cells["rq1"][HOME]:
        row["detection"] = float(rng.normal() + row["influence"])
    del cells["frozen"][FAR]
    for row in cells["s2"][FAR]:
        row["mention"] = 0  # undefined
    args = {"base": {}, "rq1": {"objective": "detection"}, "frozen": {"labels": "frozen", "logged": 19}}
    args |= {f"s{seed}": {"seed": seed, "logged": 20} for seed in (1, 2, 3)}
    return {name: write_run(out / name, cells[name], fit, **args[name]) for name in args}, cells


@pytest.fixture(scope="module")
def made(paper_runs):
    (table,) = paper.tables(list(paper_runs[0].values())[::-1])
    return table


@pytest.fixture
def folder(paper_runs, tmp_path):
    """Writes a run whose one cell, if not given, has the rows of s1 in e-SNLI with bias phrases."""

    def write(name, rows=None, key=HOME, **args):
        return write_run(tmp_path / str(name), {key: rows or paper_runs[1]["s1"][HOME]}, **args)

    return write


def table_of(*folders):
    (table,) = paper.tables(folders, resamples=20)
    return table


def refused(message, *folders):
    """The error of a table that cannot be made, which is one line."""
    with pytest.raises(ValueError, match=message) as error:
        paper.tables(folders, resamples=20)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_rows_and_columns(made):
    assert list(made["rows"]) == ["base", "RQ1", "RQ2-frozen", "RQ2-on-policy"]
    assert made["columns"] == ["in-distribution", "OOD: comve", "cross-intervention: adverb"]
    assert (made["title"], set(made["n"].values())) == ("trained on esnli, bias", {N})
    assert [row for row, of in made["rows"].items() if of["smoke"]] == ["RQ2-frozen"]
    assert len(made["rows"]["RQ2-on-policy"]["runs"]) == 3 and made["rows"]["RQ2-frozen"]["steps"] == [19]


def test_cells_are_scipys(paper_runs, made):
    """Phi, the difference to the base, and RQ1's correlation, with intervals of a plain bootstrap."""
    base, cells, row = paper_runs[1]["base"][HOME], paper_runs[1]["rq1"], made["rows"]["RQ1"]["cells"]
    for head, key in (("in-distribution", HOME), ("OOD: comve", FAR), ("cross-intervention: adverb", CROSS)):
        assert row[head][0]["phi"]["value"] == pytest.approx(phi(cells[key]), abs=1e-12)
    (got,), rq1 = row["in-distribution"], cells[HOME]
    less = got["phi"]["value"] - got["shortcut_phi"]["value"]
    assert got["phi_less_shortcut"]["value"] == pytest.approx(less, abs=1e-12)
    assert got["phi_less_shortcut"] == report.summary(rq1, some_rows(99, 0.5))["phi_less_shortcut"]
    wanted = stats.pearsonr(column(rq1, "influence"), column(rq1, "detection")).statistic
    assert got["detection"]["value"] == pytest.approx(wanted, abs=1e-12)
    assert got["phi_less_base"]["value"] == pytest.approx(phi(rq1) - phi(base), abs=1e-12)
    wanted = resampled(lambda k: phi([rq1[i] for i in k]) - phi([base[i] for i in k]), rq1)
    assert [got["phi_less_base"][key] for key in ("low", "high")] == pytest.approx(wanted, abs=0.03)
    assert "phi_less_base" not in made["rows"]["base"]["cells"]["in-distribution"][0]


def test_the_gain_that_vanishes(paper_runs, made):
    """From the correlations, and its interval by a plain bootstrap; turned labels make some of it vanish."""
    base, run = (paper_runs[1][name][HOME] for name in ("base", "frozen"))

    def share(k):
        a, b = ([rows[i] for i in k] for rows in (base, run))
        return 1 - (phi(b) - phi(a)) / (phi(b, a) - phi(a))

    got = made["rows"]["RQ2-frozen"]["cells"]["in-distribution"][0]["gain"]
    values = [got[key]["value"] for key in ("phi_base", "phi_initial", "phi_own")]
    assert values == pytest.approx([phi(base), phi(run, base), phi(run)], abs=1e-12)
    assert got["vanished"]["value"] == pytest.approx(share(range(N)), abs=1e-9) and abs(share(range(N))) > 0.2
    low, high = resampled(share, base)
    assert [got["vanished"][key] for key in ("low", "high")] == pytest.approx([low, high], abs=0.15 * (high - low))


def test_a_cell_of_another_task_and_another_edit(paper_runs, folder):
    rows = paper_runs[1]["s1"][CROSS]
    (table,) = paper.tables([folder("run", rows=rows, key=(FAR[0], CROSS[1]), seed=1)], resamples=20)
    assert table["columns"] == ["in-distribution", f"elsewhere: {FAR[0]}, {CROSS[1]}"]
    assert table["rows"]["RQ2-on-policy"]["cells"][table["columns"][1]][0]["n"]["value"] == len(rows)


def test_a_share_by_hand():
    """Before, Phi is 0. Mentions that follow the initial I gain 1. None of it vanishes if I is the same, else all."""
    base = [make_row(k, k % 2, k // 2 % 2) for k in range(80)]
    after = [row | {"mention": row["influence"]} for row in base]
    turned = [make_row(k, k // 2 % 2, row["influence"]) for k, row in enumerate(base)]
    little = after[:4] + base[4:]  # there is a share, but of a gain that may be none
    for rows, expected in ((after, [0, 1, 1, 0]), (turned, [0, 1, 0, 1]), (little, None), (base, None)):
        got = paper.gain(base, rows, resamples=200)
        if expected:
            assert [got[key]["value"] for key in ("phi_base", "phi_initial", "phi_own", "vanished")] == expected
        else:
            assert got["gain"]["value"] >= 0 >= got["gain"]["low"] and np.isnan(got["vanished"]["value"])
            assert (got["gain"]["value"] == 0) == (rows is base)
    assert tables.cell(got["vanished"]).startswith("undefined")


def test_seeds_give_median_and_extremes(paper_runs, made):
    cells, row = paper_runs[1], made["rows"]["RQ2-on-policy"]["cells"]
    home, far = (paper.over_seeds([f["phi"] for f in row[head]]) for head in ("in-distribution", "OOD: comve"))
    values = sorted(phi(cells[f"s{seed}"][HOME]) for seed in (1, 2, 3))
    assert [home[key] for key in ("low", "value", "high")] == pytest.approx(values, abs=1e-12)
    two = np.mean([phi(cells[f"s{seed}"][FAR]) for seed in (1, 3)])
    assert (far["value"], far["undefined"]) == (pytest.approx(two, abs=1e-12), 1)
    nothing = {"value": np.nan, "low": np.nan, "high": np.nan, "undefined": 5}
    assert tables.cell(paper.over_seeds([nothing, nothing])) == "undefined" and paper.over_seeds([]) is None


def test_command_prints_what_is_missing_and_what_is_undefined(paper_runs, folder, tmp_path, capsys):
    runs, cells = paper_runs
    never = folder("never", [row | {"mention": 0} for row in cells["s1"][HOME]], labels="frozen")
    code, out, error = command(capsys, runs["base"], runs["rq1"], never, runs["s1"], "--json", tmp_path / "a.json",
                               "--figure", tmp_path / "a.png", "--markdown")  # fmt: skip
    assert (code, error) == (0, "")
    blocks = out.split("\n\n")
    heads, _, *lines = [[text.strip() for text in line.split("|")[1:-1]] for line in blocks[2].split("\n")]
    assert blocks[1] == "Phi-CCT"
    assert heads == [
        "",
        *(f"{head} (n = {N})" for head in ("in-distribution", "OOD: comve", "cross-intervention: adverb")),
    ]
    by_row = {row: texts for row, *texts in lines}
    assert by_row["RQ2-frozen"] == ["undefined", "–", "–"]
    assert by_row["RQ1"][0].startswith(f"{phi(cells['rq1'][HOME]):.3f} [")
    accuracy = blocks[blocks.index("accuracy on X") + 1].split("\n")[3]
    assert accuracy.startswith("| RQ1 ") and accuracy.count(" 0.800 [") == 3
    written = json.loads((tmp_path / "a.json").read_text())["tables"][0]["rows"]
    frozen, rq1 = (written[row]["cells"]["in-distribution"][0] for row in ("RQ2-frozen", "RQ1"))
    assert frozen["phi"]["value"] is None
    assert rq1["gain"]["phi_base"]["value"] == pytest.approx(phi(cells["base"][HOME]))
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and not list(tmp_path.glob("*.part*"))
    smoke = command(capsys, runs["base"], runs["frozen"])[1]
    assert {line.split()[0] for line in smoke.split("\n") if "(smoke test)" in line} == {"RQ2-frozen"}


def test_tables_by_what_was_trained_on(paper_runs, folder):
    """Runs of two interventions make two tables, each with its own cells of the base."""
    runs, cells = paper_runs
    adverb = folder("a", cells["s1"][CROSS], CROSS, intervention="adverb")
    first, second = paper.tables([runs["base"], runs["s1"], adverb], resamples=20)
    assert [table["title"] for table in (first, second)] == ["trained on esnli, adverb", "trained on esnli, bias"]
    assert first["columns"] == ["in-distribution", "cross-intervention: bias"]
    got = first["rows"]["base"]["cells"]["in-distribution"][0]["phi"]["value"]
    assert got == pytest.approx(phi(cells["base"][CROSS]))
    assert [table["rows"]["RQ2-on-policy"]["runs"] for table in (first, second)] == [[str(adverb)], [str(runs["s1"])]]
    alone, untrained = table_of(adverb), table_of(runs["base"])
    assert (list(alone["rows"]), list(untrained["rows"])) == (["RQ2-on-policy"], ["base"])
    assert untrained["columns"] == ["comve, bias", "esnli, adverb", "esnli, bias"]


def test_a_run_of_two_tasks_is_at_home_in_both(paper_runs, tmp_path):
    runs, cells = paper_runs
    rows = cells["s1"] | {("comve", "adverb"): cells["s1"][CROSS]}
    both = write_run(tmp_path / "both", rows, task="esnli,comve", labels="frozen")
    made = table_of(runs["base"], both)
    assert made["title"] == "trained on esnli,comve, bias" and made["columns"] == [
        "in-distribution: esnli", "in-distribution: comve", "cross-intervention: adverb, esnli",
        "cross-intervention: adverb, comve"]  # fmt: skip
    gains = [head for head, (cell,) in made["rows"]["RQ2-frozen"]["cells"].items() if "gain" in cell]
    assert gains == made["columns"][:2]
    assert all(f"initial model reward, {head}" in paper.text(made, False) for head in gains)


def test_bad_input_is_one_line(paper_runs, folder, tmp_path, capsys):
    runs, home = paper_runs[0], paper_runs[1]["s1"][HOME]
    missing = [home[0], {key: value for key, value in home[1].items() if key != "mention"}]
    (tmp_path / "empty").mkdir()
    broken = {name: folder(name, seed=4, logged=2) for name in ("args", "fit", "torn")}
    (broken["args"] / "args.json").write_text("{}")
    (broken["fit"] / "cells" / "esnli-bias.fit.jsonl").write_text("")
    (broken["torn"] / "metrics.jsonl").write_text('{"step": 0}\n{"st\n')
    for message, *folders in (
        ("no measured cells; see faith.py --rows", tmp_path / "empty"),
        ("esnli-bias of .*base and of .*fewer: the ids do not match", runs["base"], folder("fewer", home[1:], seed=4)),
        ("'word' is not the same", runs["s1"], folder("edit", [home[0] | {"word": "other"}, *home[1:]], seed=4)),
        ("its rows are not of adverb", folder("kind", key=CROSS, seed=4)),
        ("esnli-bias.T1.jsonl, line 2: the key 'mention' is missing", folder("key", missing, seed=4)),
        ("give one base", runs["base"], folder("second")),
        ("runs of several models", runs["s1"], folder("model", model="other")),
        ("name a cell by task and intervention", folder("name", key=("esnli", "typo"))),
        ("args/args.json: objective must be a text; it is absent", broken["args"]),
        ("labels/args.json: labels must be on-policy, frozen or shuffled", folder("labels", labels="new")),
        ("task/args.json: task must be a text, not 3", folder("task", task=3)),
        ("fit.jsonl: no rows to fit", broken["fit"]), ("torn/metrics.jsonl", broken["torn"]),
        ("nowhere: no measured cells", runs["s1"], tmp_path / "nowhere"),
    ):  # fmt: skip
        refused(message, *folders)
    for args in ((tmp_path / "empty",), (runs["base"], "--figure", tmp_path / "no" / "a.png"), (tmp_path / "nowhere",)):
        code, out, error = command(capsys, *args)
        assert code == 2 and out == "" and error.startswith("lab.paper: ") and error.count("\n") == 1


def test_a_run_that_stopped_early_is_marked(paper_runs, folder):
    """With how many of its planned steps; the number stays in the JSON."""
    a, b = (folder(n, logged=n, labels="frozen", seed=n) for n in (30, 200))
    alone = table_of(a, folder("rq1", logged=150, objective="detection"))
    assert (alone["rows"]["RQ2-frozen"]["steps"], alone["rows"]["RQ2-frozen"]["planned"]) == ([30], [200])
    names = [line.split("  ")[0] for line in paper.text(alone, False).split("\n")]
    assert "RQ1 (stopped after 150 of 200 steps)" in names and "RQ2-frozen (stopped after 30 of 200 steps)" in names
    taught = table_of(a, *(folder(n, objective="imitation", labels=n) for n in ("shuffled", "frozen")))["rows"]
    assert [*taught] == ["form", "imitation", "RQ2-frozen"]  # labels that were shuffled teach the form alone
    two = "\nRQ2-frozen (2 seeds, 1 of them stopped after 30 of 200 steps)  "
    assert two in paper.text(table_of(a, b), False)
    assert "stopped" not in paper.text(table_of(b, paper_runs[0]["base"]), False)


def test_brackets_are_explained_and_what_few_seeds_have_is_told(paper_runs, folder, tmp_path):
    cells = paper_runs[1]
    one = write_run(tmp_path / "1", {key: cells["s1"][key] for key in (HOME, FAR)}, seed=1)
    never = folder(3, [row | {"mention": 0} for row in cells["s1"][HOME]], seed=3)
    table = table_of(one, folder(2, cells["s2"][HOME], seed=2), never)
    lines = paper.text(table, True).split("\n")
    assert lines[1] == paper.LEGEND and "median and [least, greatest]" in paper.LEGEND
    line = next(line for line in lines if line.startswith("| RQ2-on-policy (3 seeds)"))
    first, second = [part.strip() for part in line.split("|")[2:4]]
    low, high = sorted(phi(cells[name][HOME]) for name in ("s1", "s2"))
    assert first == f"{(low + high) / 2:.3f} [{low:.3f}, {high:.3f}] (1 of 3 seeds undefined)"
    (alone,) = table["rows"]["RQ2-on-policy"]["cells"]["OOD: comve"]
    assert second == tables.cell(alone["phi"]) + " (1 of 3)" and "[" in second


def test_a_folder_spelled_in_two_ways_counts_once(paper_runs, monkeypatch):
    base, s1, s2 = (paper_runs[0][name] for name in ("base", "s1", "s2"))
    monkeypatch.chdir(s1)
    table = table_of(s1, s2, ".", f"{s2}/../s1", base, "../base")
    assert table["rows"]["RQ2-on-policy"]["runs"] == [str(s1), str(s2)]


def test_only_seeds_share_a_row(paper_runs, folder):
    s1 = paper_runs[0]["s1"]
    for name, args, message in (
        ("same", {"seed": 1}, "are the same seed of RQ2-on-policy, --seed 1"),
        ("lr", {"seed": 7, "lr": 1e-3}, "not seeds of one row, RQ2-on-policy: their --lr differs, 1e-05 and 0.001"),
        ("steps", {"seed": 7, "steps": 100}, "their --steps differs, 200 and 100"),
        ("open", {"seed": 7, "anchor_questions": 1}, "their --anchor-questions differs"),
        ("resumed", {"seed": 7, "history": [{"until": 3, "lr": 1.0}]}, "their history of flags differs, None and "),
    ):
        other = folder(name, **args)
        assert refused(message, s1, other).startswith(f"{s1} and {other} are ")
    rows = [folder("i", objective="imitation"), folder("z", labels="shuffled"), folder("y", labels="frozen")]
    assert list(table_of(*rows[::-1])["rows"]) == ["imitation", "RQ2-shuffled", "RQ2-frozen"]
    labelled = [folder(labels, objective="detection", labels=labels) for labels in ("frozen", "x")]
    refused("of one row, RQ1: their --labels differs", *labelled)
    noise = folder("noise", objective="detection", labels="shuffled")
    assert list(table_of(noise, labelled[0])["rows"]) == ["RQ1-shuffled", "RQ1"]
    hashes = {"weights": "1", "questions": "2"}
    alike = [folder(f"alike{n}", labels="frozen", seed=n) for n in (1, 2)]
    for run, more in zip(alike, ({"dataset": "3"}, {}), strict=True):
        (run / "identity.json").write_text(json.dumps({"made_of": hashes | more}))
    for two in (alike, alike[::-1]):
        refused("was made with other dataset", *two)
    free = folder("free", seed=7, out="there", note="hm", checkpoint_every=5, lora=0, log="tensorboard",
                  kernels="plain", eval_before=False, why="leading")  # fmt: skip
    assert len(table_of(s1, free)["rows"]["RQ2-on-policy"]["runs"]) == 2


def test_cells_measured_unlike_are_refused(paper_runs, folder):
    """As the JSON beside them tells, of the base and of any two runs."""
    s1 = paper_runs[0]["s1"]
    asked = {"max_new_tokens": 48, "fit": 300, "calibration": "none", "model": "base"}
    base = folder("base", asked=asked)
    for key, value, message in (("max_new_tokens", 8, "--max-new-tokens 8 and 48"), ("fit", 20, "--fit 20 and 300")):
        other = folder(key, asked=asked | {key: value}, seed=7)
        files_named = f"{key}/cells/esnli-bias.json and .*base/cells/esnli-bias.json were measured differently: "
        refused(files_named + message, base, s1, other)
    letters = [folder(n, asked=asked | {"calibration": f"{n}.json", "model": f"{n}"}, seed=n) for n in (8, 9)]
    assert len(table_of(*letters, s1)["rows"]["RQ2-on-policy"]["runs"]) == 3
    eight, nine = (run / "cells" / "esnli-bias.json" for run in letters)
    files.write_json(eight, {"args": asked | {"calibration": "8.json"}, "mean_logp": [-1, -2]})
    refused(r"the offsets of --calibration None and \[-1, -2\]", *letters)
    files.write_json(nine, {"args": asked | {"calibration": "9.json"}, "mean_logp": [-2, -1]})
    refused(r"the offsets of --calibration \[-2, -1\] and \[-1, -2\]", *letters)
    eight.write_text("[1]")
    refused("esnli-bias.json holds no JSON object", *letters)
