"""lab.paper: hand-made runs against scipy's correlation and a plain bootstrap; what is missing, undefined, wrong."""

import json

import numpy as np
import pytest
from scipy import stats
from test_report import column, command, make_row

import report
from lab import paper
from run import files

N = 240


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
    """A base and four runs, of which two are seeds of one row; e-SNLI and ComVE, bias phrases and adverbs."""
    out, home, far, cross = tmp_path_factory.mktemp("runs"), ("esnli", "bias"), ("comve", "bias"), ("esnli", "adverb")
    fit = some_rows(99, 0.5)
    cells = {}
    for n, (name, link, flips) in enumerate((("base", 0.0, ()), ("rq1", 0.1, (1, 2)), ("frozen", 0.6, range(0, 60, 2)),
                                             ("s1", 0.7, (5,)), ("s2", 0.9, ()), ("s3", 0.5, (9, 11)))):  # fmt: skip
        cells[name] = {home: some_rows(10 + n, link, flips=flips), far: some_rows(20 + n, link / 2),
                       cross: some_rows(30 + n, 0.1, "adverb")}  # fmt: skip
    rng = np.random.default_rng(7)
    for row in cells["rq1"][home]:
        row["detection"] = float(rng.normal() + row["influence"])
    del cells["frozen"][far]
    for row in cells["s2"][far]:
        row["mention"] = 0  # undefined
    runs = {"base": write_run(out / "base", cells["base"], fit)}
    runs["rq1"] = write_run(out / "rq1", cells["rq1"], fit, objective="detection")
    runs["frozen"] = write_run(out / "frozen", cells["frozen"], fit, labels="frozen", logged=19)
    for seed in (1, 2, 3):
        runs[f"s{seed}"] = write_run(out / f"s{seed}", cells[f"s{seed}"], fit, seed=seed, logged=20)
    return runs, cells


@pytest.fixture(scope="module")
def made(paper_runs):
    (table,) = paper.tables(list(paper_runs[0].values())[::-1])
    return table


def test_rows_and_columns(made):
    assert list(made["rows"]) == ["base", "RQ1", "RQ2-frozen", "RQ2-on-policy"]
    assert made["columns"] == ["in-distribution", "OOD: comve", "cross-intervention: adverb"]
    assert (made["title"], set(made["n"].values())) == ("trained on esnli, bias", {N})
    assert {row: of["smoke"] for row, of in made["rows"].items()} == {
        "base": False, "RQ1": False, "RQ2-frozen": True, "RQ2-on-policy": False}  # fmt: skip
    assert len(made["rows"]["RQ2-on-policy"]["runs"]) == 3 and made["rows"]["RQ2-frozen"]["steps"] == [19]


def test_cells_are_scipys(paper_runs, made):
    """Phi, the difference to the base, and RQ1's correlation, with intervals of a plain bootstrap."""
    _, cells = paper_runs
    base, rq1 = (cells[name]["esnli", "bias"] for name in ("base", "rq1"))
    got, cross = made["rows"]["RQ1"]["cells"]["in-distribution"], made["rows"]["RQ1"]["cells"]
    assert len(got) == 1 and got[0]["phi"]["value"] == pytest.approx(phi(rq1), abs=1e-12)
    assert cross["OOD: comve"][0]["phi"]["value"] == pytest.approx(phi(cells["rq1"]["comve", "bias"]), abs=1e-12)
    far = cells["rq1"]["esnli", "adverb"]
    assert cross["cross-intervention: adverb"][0]["phi"]["value"] == pytest.approx(phi(far), abs=1e-12)
    assert got[0]["phi_less_base"]["value"] == pytest.approx(phi(rq1) - phi(base), abs=1e-12)
    wanted = resampled(lambda k: phi([rq1[i] for i in k]) - phi([base[i] for i in k]), rq1)
    assert [got[0]["phi_less_base"][key] for key in ("low", "high")] == pytest.approx(wanted, abs=0.03)
    wanted = stats.pearsonr(column(rq1, "influence"), column(rq1, "detection")).statistic
    assert got[0]["detection"]["value"] == pytest.approx(wanted, abs=1e-12)
    assert "phi_less_base" not in made["rows"]["base"]["cells"]["in-distribution"][0]
    less = got[0]["phi"]["value"] - got[0]["shortcut_phi"]["value"]
    assert got[0]["phi_less_shortcut"]["value"] == pytest.approx(less, abs=1e-12)
    assert got[0]["phi_less_shortcut"] == report.summary(rq1, some_rows(99, 0.5))["phi_less_shortcut"]


def test_the_gain_that_vanishes(paper_runs, made):
    """From the correlations, and its interval by a plain bootstrap; turned labels make some of it vanish."""
    _, cells = paper_runs
    base, run = (cells[name]["esnli", "bias"] for name in ("base", "frozen"))

    def share(k):
        a, b = ([rows[i] for i in k] for rows in (base, run))
        return 1 - (phi(b) - phi(a)) / (phi(b, a) - phi(a))

    got = made["rows"]["RQ2-frozen"]["cells"]["in-distribution"][0]["gain"]
    assert got["phi_base"]["value"] == pytest.approx(phi(base), abs=1e-12)
    assert got["phi_initial"]["value"] == pytest.approx(phi(run, base), abs=1e-12)
    assert got["phi_own"]["value"] == pytest.approx(phi(run), abs=1e-12)
    assert got["vanished"]["value"] == pytest.approx(share(range(N)), abs=1e-9) and abs(share(range(N))) > 0.2
    wanted = resampled(share, base)
    width = wanted[1] - wanted[0]
    assert [got["vanished"][key] for key in ("low", "high")] == pytest.approx(wanted, abs=0.15 * width)


def test_a_share_by_hand():
    """Base 0; after, mentions are the initial I. Of own labels that are the same all stays, of others all may go."""
    base = [make_row(k, k % 2, k // 2 % 2) for k in range(80)]
    after = [row | {"mention": row["influence"]} for row in base]
    got = paper.gain(base, after, resamples=200)
    assert [got[key]["value"] for key in ("phi_base", "phi_initial", "phi_own", "vanished")] == [0, 1, 1, 0]
    turned = [make_row(k, k // 2 % 2, row["influence"]) for k, row in enumerate(base)]
    got = paper.gain(base, turned, resamples=200)
    assert [got[key]["value"] for key in ("phi_base", "phi_initial", "phi_own", "vanished")] == [0, 1, 0, 1]
    little = [row | {"mention": row["influence"]} if k < 4 else row for k, row in enumerate(base)]
    got = paper.gain(base, little, resamples=200)  # there is a share, but of a gain that may be none
    assert got["gain"]["value"] > 0 >= got["gain"]["low"] and np.isnan(got["vanished"]["value"])
    got = paper.gain(base, base, resamples=200)
    assert got["gain"]["value"] == 0 and np.isnan(got["vanished"]["value"])
    assert report.cell(got["vanished"]).startswith("undefined")


def test_seeds_give_median_and_extremes(paper_runs, made):
    _, cells = paper_runs
    values = sorted(phi(cells[f"s{seed}"]["esnli", "bias"]) for seed in (1, 2, 3))
    row = made["rows"]["RQ2-on-policy"]["cells"]
    got = paper.over_seeds([figures["phi"] for figures in row["in-distribution"]])
    assert [got[key] for key in ("low", "value", "high")] == pytest.approx(values, abs=1e-12)
    got = paper.over_seeds([figures["phi"] for figures in row["OOD: comve"]])
    two = [phi(cells[f"s{seed}"]["comve", "bias"]) for seed in (1, 3)]
    assert (got["value"], got["undefined"]) == (pytest.approx(np.mean(two), abs=1e-12), 1)
    nothing = {"value": np.nan, "low": np.nan, "high": np.nan, "undefined": 5}
    assert report.cell(paper.over_seeds([nothing, nothing])) == "undefined" and paper.over_seeds([]) is None


def test_command_prints_what_is_missing_and_what_is_undefined(paper_runs, tmp_path):
    runs, cells = paper_runs
    none = {("esnli", "bias"): [row | {"mention": 0} for row in cells["s1"]["esnli", "bias"]]}
    never = write_run(tmp_path / "never", none, labels="frozen")
    got = command(runs["base"], runs["rq1"], never, runs["s1"], "--json", tmp_path / "a.json",
                  "--figure", tmp_path / "a.png", "--markdown", of="lab.paper")  # fmt: skip
    assert got.returncode == 0 and got.stderr == "", got.stderr
    blocks = got.stdout.split("\n\n")
    lines = [[text.strip() for text in line.split("|")[1:-1]] for line in blocks[2].split("\n")]
    assert blocks[1] == "Phi-CCT" and lines[0] == ["", f"in-distribution (n = {N})", f"OOD: comve (n = {N})",
                                                   f"cross-intervention: adverb (n = {N})"]  # fmt: skip
    by_row = {line[0]: line[1:] for line in lines[2:]}
    accuracy = dict(zip(blocks, blocks[1:], strict=False))["accuracy on X"].split("\n")[3]
    assert accuracy.startswith("| RQ1 ") and accuracy.count(" 0.800 [") == 3
    assert by_row["RQ2-frozen"] == ["undefined", "–", "–"]
    assert by_row["RQ1"][0].startswith(f"{phi(cells['rq1']['esnli', 'bias']):.3f} [")
    written = json.loads((tmp_path / "a.json").read_text())["tables"][0]["rows"]
    assert written["RQ2-frozen"]["cells"]["in-distribution"][0]["phi"]["value"] is None
    assert written["RQ1"]["cells"]["in-distribution"][0]["gain"]["phi_base"]["value"] == pytest.approx(
        phi(cells["base"]["esnli", "bias"])
    )
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and not list(tmp_path.glob("*.part*"))
    smoke = command(runs["base"], runs["frozen"], of="lab.paper").stdout
    marked = [line for line in smoke.split("\n") if "(smoke test)" in line]
    assert marked and all(line.startswith("RQ2-frozen") for line in marked)


def test_tables_by_what_was_trained_on(paper_runs, tmp_path):
    """Runs of two interventions make two tables, of the base's cells each its own."""
    runs, cells = paper_runs
    adverb = write_run(tmp_path / "a", {("esnli", "adverb"): cells["s1"]["esnli", "adverb"]}, intervention="adverb")
    first, second = paper.tables([runs["base"], runs["s1"], adverb], resamples=20)
    assert [table["title"] for table in (first, second)] == ["trained on esnli, adverb", "trained on esnli, bias"]
    assert first["columns"] == ["in-distribution", "cross-intervention: bias"]
    wanted = phi(cells["base"]["esnli", "adverb"])
    assert first["rows"]["base"]["cells"]["in-distribution"][0]["phi"]["value"] == pytest.approx(wanted)
    assert [table["rows"]["RQ2-on-policy"]["runs"] for table in (first, second)] == [[str(adverb)], [str(runs["s1"])]]
    (alone,) = paper.tables([adverb], resamples=20)
    assert list(alone["rows"]) == ["RQ2-on-policy"]
    (untrained,) = paper.tables([runs["base"]], resamples=20)
    assert untrained["columns"] == ["comve, bias", "esnli, adverb", "esnli, bias"] and list(untrained["rows"]) == [
        "base"
    ]


def test_bad_input_is_one_line(paper_runs, tmp_path):
    runs, cells = paper_runs
    home = cells["s1"]["esnli", "bias"]
    other = [home[0] | {"word": "other"}, *home[1:]]
    (tmp_path / "empty").mkdir()
    cases = {
        "no measured cells; see faith.py --rows": [tmp_path / "empty"],
        "esnli-bias of .*base and of .*fewer: the ids do not match": [
            runs["base"], write_run(tmp_path / "fewer", {("esnli", "bias"): home[1:]}, seed=4)],
        "'word' is not the same": [
            runs["s1"], write_run(tmp_path / "edit", {("esnli", "bias"): other}, seed=4)],
        "its rows are not of adverb": [write_run(tmp_path / "kind", {("esnli", "adverb"): home}, seed=4)],
        "esnli-bias.T1.jsonl, row 2: the key 'mention' is missing": [write_run(tmp_path / "key", {("esnli", "bias"): [
            home[0], {k: v for k, v in home[1].items() if k != "mention"}]}, seed=4)],
        "give one base": [runs["base"], write_run(tmp_path / "second", {("esnli", "bias"): home})],
        "runs of several models": [runs["s1"], write_run(tmp_path / "model", {("esnli", "bias"): home}, model="other")],
        "name a cell by task and intervention": [write_run(tmp_path / "name", {("esnli", "typo"): home})],
        "args.json: not of a run of train.py": [write_run(tmp_path / "args", {("esnli", "bias"): home}, labels="x")],
        "fit.jsonl: no rows to fit": [write_run(tmp_path / "fit", {("esnli", "bias"): home}, seed=4)],
        "cannot be read|not a folder|no measured cells": [runs["s1"], tmp_path / "nowhere"],
        "labels/args.json: not of a run of train.py": [
            write_run(tmp_path / "labels", {("esnli", "bias"): home}, labels="new")],
        "task/args.json: not of a run of train.py": [write_run(tmp_path / "task", {("esnli", "bias"): home}, task=3)],
        "torn/metrics.jsonl": [write_run(tmp_path / "torn", {("esnli", "bias"): home}, logged=2, seed=4)],
    }  # fmt: skip
    (tmp_path / "args" / "args.json").write_text("{}")
    (tmp_path / "fit" / "cells" / "esnli-bias.fit.jsonl").write_text("")
    (tmp_path / "torn" / "metrics.jsonl").write_text('{"step": 0}\n{"st\n')
    for message, folders in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            paper.tables(folders, resamples=20)
        assert "\n" not in str(error.value)
    got = command(tmp_path / "empty", of="lab.paper")
    assert got.returncode == 2 and got.stdout == "" and got.stderr.count("\n") == 1
    got = command(runs["base"], "--figure", tmp_path / "no" / "a.png", of="lab.paper")
    assert got.returncode == 2 and got.stderr.count("\n") == 1
    got = command(tmp_path / "nowhere", of="lab.paper")
    assert got.returncode == 2 and got.stderr.count("\n") == 1


def test_a_run_that_stopped_early_is_marked(paper_runs, tmp_path):
    """With how many of its planned steps; the number stays in the JSON."""
    runs, cells = paper_runs
    home = {("esnli", "bias"): cells["s1"]["esnli", "bias"]}
    a, b = (write_run(tmp_path / str(n), home, logged=n, labels="frozen", seed=n) for n in (30, 200))
    rq1 = write_run(tmp_path / "rq1", home, logged=150, objective="detection")
    (alone,) = paper.tables([a, rq1], resamples=20)
    assert (alone["rows"]["RQ2-frozen"]["steps"], alone["rows"]["RQ2-frozen"]["planned"]) == ([30], [200])
    names = [line.split("  ")[0] for line in paper.text(alone, False).split("\n")]
    assert "RQ1 (stopped after 150 of 200 steps)" in names and "RQ2-frozen (stopped after 30 of 200 steps)" in names
    (both,) = paper.tables([a, b], resamples=20)
    assert "\nRQ2-frozen (2 seeds, 1 of them stopped after 30 of 200 steps)  " in paper.text(both, False)
    (whole,) = paper.tables([b, runs["base"]], resamples=20)
    assert "stopped" not in paper.text(whole, False)


def test_brackets_are_explained_and_what_few_seeds_have_is_told(paper_runs, tmp_path):
    runs, cells = paper_runs
    home, far = ("esnli", "bias"), ("comve", "bias")
    never = {home: [row | {"mention": 0} for row in cells["s1"][home]]}
    given = [write_run(tmp_path / "1", {key: cells["s1"][key] for key in (home, far)}, seed=1),
             write_run(tmp_path / "2", {home: cells["s2"][home]}, seed=2),
             write_run(tmp_path / "3", never, seed=3)]  # fmt: skip
    (table,) = paper.tables(given, resamples=50)
    text = paper.text(table, True)
    assert text.split("\n")[1] == paper.LEGEND and "median and [least, greatest]" in paper.LEGEND
    line = next(line for line in text.split("\n") if line.startswith("| RQ2-on-policy (3 seeds)"))
    first, second = [part.strip() for part in line.split("|")[2:4]]
    low, high = sorted(phi(cells[name][home]) for name in ("s1", "s2"))
    assert first == f"{(low + high) / 2:.3f} [{low:.3f}, {high:.3f}] (1 of 3 seeds undefined)"
    one = table["rows"]["RQ2-on-policy"]["cells"]["OOD: comve"][0]["phi"]
    assert second == report.cell(one) + " (1 of 3)" and "[" in second


def test_a_folder_spelled_in_two_ways_counts_once(paper_runs, monkeypatch):
    runs, _ = paper_runs
    monkeypatch.chdir(runs["s1"])
    (table,) = paper.tables([runs["s1"], ".", f"{runs['s2']}/../s1", runs["s2"], runs["base"], "../base"], resamples=20)
    assert table["rows"]["RQ2-on-policy"]["runs"] == [str(runs["s1"]), str(runs["s2"])]


def test_only_seeds_share_a_row(paper_runs, tmp_path):
    runs, cells = paper_runs
    home = {("esnli", "bias"): cells["s1"]["esnli", "bias"]}
    for name, args, message in (
        ("same", {"seed": 1}, "are the same seed of RQ2-on-policy, --seed 1"),
        ("lr", {"seed": 7, "lr": 1e-3}, "not seeds of one row, RQ2-on-policy: their --lr differs, None and 0.001"),
        ("steps", {"seed": 7, "steps": 100}, "their --steps differs, 200 and 100"),
        ("open", {"seed": 7, "anchor_questions": 1}, "their --anchor-questions differs"),
    ):
        other = write_run(tmp_path / name, home, **args)
        with pytest.raises(ValueError, match=message) as error:
            paper.tables([runs["s1"], other], resamples=20)
        assert str(error.value).startswith(f"{runs['s1']} and {other} are ") and "\n" not in str(error.value)
    labelled = [write_run(tmp_path / labels, home, objective="detection", labels=labels) for labels in ("frozen", "x")]
    with pytest.raises(ValueError, match="of one row, RQ1: their --labels differs"):
        paper.tables(labelled, resamples=20)
    free = write_run(tmp_path / "free", home, seed=7, out="there", note="hm", checkpoint_every=5, lora=0)
    (table,) = paper.tables([runs["s1"], free], resamples=20)
    assert len(table["rows"]["RQ2-on-policy"]["runs"]) == 2


def test_cells_measured_unlike_are_refused(paper_runs, tmp_path):
    """As the JSON beside them tells, of the base and of any two runs."""
    runs, cells = paper_runs
    home = {("esnli", "bias"): cells["s1"]["esnli", "bias"]}
    asked = {"opening": "", "max_new_tokens": 48, "seed": 0, "words": "all", "fit": 300, "calibration": "none",
             "model": "base"}  # fmt: skip
    base = write_run(tmp_path / "base", home, asked=asked)
    for key, value, message in (("opening", "My", "--opening '' and 'My'"), ("words", "held-out", "--words 'all' and"),
                                ("max_new_tokens", 8, "--max-new-tokens 48 and 8"), ("seed", 1, "--seed 0 and 1"),
                                ("fit", 20, "--fit 300 and 20"),
                                ("calibration", "a.json", "one with --calibration, one without")):  # fmt: skip
        other = write_run(tmp_path / key, home, asked=asked | {key: value}, seed=7)
        with pytest.raises(ValueError, match=message) as error:
            paper.tables([base, runs["s1"], other], resamples=20)
        assert f"esnli-bias of {base} and of {other}: measured differently, " in str(error.value)
    letters = [write_run(tmp_path / f"c{n}", home, asked=asked | {"calibration": f"{n}.json", "model": f"{n}"}, seed=n)
               for n in (8, 9)]  # fmt: skip
    (table,) = paper.tables([*letters, runs["s1"]], resamples=20)
    assert len(table["rows"]["RQ2-on-policy"]["runs"]) == 3
    for folder, means, also in zip(letters, ([-1, -2], [-2, -1]), ("8.json", "9.json"), strict=True):
        files.write_json(
            folder / "cells" / "esnli-bias.json", {"args": asked | {"calibration": also}, "mean_logp": means}
        )
    with pytest.raises(ValueError, match="with other letter offsets; give both the same --calibration FILE"):
        paper.tables(letters, resamples=20)
    (letters[0] / "cells" / "esnli-bias.json").write_text("[1]")
    with pytest.raises(ValueError, match="esnli-bias.json: not of a measurement"):
        paper.tables(letters, resamples=20)
