"""tests/gpu.sh without a GPU: every stage writes its figures; one that fails or overruns does not stop the next."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import tiny
import torch


def run(*stages, **environment):
    given = {"OMP_NUM_THREADS": "1", "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"} | environment
    return subprocess.run(["bash", tiny.ROOT / "tests" / "gpu.sh", *stages], capture_output=True, text=True,
                          env=os.environ | {key: str(value) for key, value in given.items()}, timeout=300)  # fmt: skip


def positive(figures: dict, *names) -> bool:
    return all(figures[name] > 0 for name in names)


def test_every_stage_writes_its_figures(tmp_path):
    triton = pytest.importorskip("triton", reason="nothing is fused without it")
    done = run(DRY=1, OUT=tmp_path / "out")
    assert done.returncode == 0, done.stdout[-5000:]
    files = {file.name for file in (tmp_path / "out").iterdir()}
    whole = json.loads((tmp_path / "out" / "gpu.json").read_text())
    stages = whole["stages"]
    assert [*stages] == ["kernels", "tests", "rollout", "train", "toy"]
    assert files == {"gpu.json", "gpu.log", *(f"{stage}.json" for stage in stages)}
    assert (tmp_path / "out" / "gpu.log").read_text() == done.stdout
    assert whole["machine"]["torch"] == torch.__version__ and whole["machine"]["triton"] == triton.__version__
    assert whole["machine"]["date"].startswith("20") and (len(whole["commit"]) == 40 or whole["commit"] == "unknown")
    for stage, figures in stages.items():
        assert figures["status"] == "passed" and not figures["problems"] and 0 <= figures["seconds"] < 120
        assert f"{stage:8} passed " in done.stdout and "; ".join(figures["lines"]) in done.stdout
        assert json.loads((tmp_path / "out" / f"{stage}.json").read_text())["lines"] == figures["lines"]
    of = stages["kernels"]
    assert len(of["errors"]) == 3 and of["steps"].keys() == {"4 rows", "4 rows, LoRA 2"} and of["copy"] > 0
    for errors in of["errors"].values():
        assert all(max(some.values()) < 1e-4 and len(some) == 4 for some in (errors["plain"], errors["fused"]))
    for what, name in itertools.product(of["steps"], ("plain", "fused")):
        assert positive(of["steps"][what][name], "ms", "launches", "in kernels, ms", "tokens/s", "share of bandwidth")
    assert stages["tests"]["count"]["passed"] == 1 and stages["tests"]["count"]["skipped"] >= 36
    for rows in (4, 8):
        of = stages["rollout"][f"{rows} rows"]
        assert of["rows"] == rows and of["tokens"] == rows * 6 and positive(of, "share of the limit", "limit, s")
        assert positive(of["rates"]["forced ends"], "ours", "theirs", "ratio")
    of = stages["train"]
    assert positive(of, "labels, s", "rollout, s", "forward, s", "backward, s", "optimizer, s", "step, s",
                    "peak memory, GB", "planned, GB", "peak / planned")  # fmt: skip
    of = stages["toy"]
    assert len(of["phi"]) == 2 and of["measured"]["n"]["value"] == 5 and of["seconds_by_phase"]["update_s"] > 0


STAND_IN = """#!/bin/sh
case "$2" in
kernels) exit 3 ;;
tests) sleep 60 ;;
rollout) echo '{"lines": ["all is well"], "machine": {"device": "a stand-in"}}' > "$3/rollout.json" ;;
*) exec PYTHON "$@" ;;
esac
"""


def test_a_stage_that_fails_or_overruns_does_not_stop_the_next(tmp_path):
    (tmp_path / "python3").write_text(STAND_IN.replace("PYTHON", sys.executable))
    (tmp_path / "python3").chmod(0o755)
    (tmp_path / "kernels.json").write_text('{"lines": ["of an earlier run"]}')
    done = run("kernels", "tests", "rollout", DRY=1, BOX=1, OUT=tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}")
    whole = json.loads((tmp_path / "gpu.json").read_text())
    assert [of["status"] for of in whole["stages"].values()] == ["failed", "cut short", "passed"]
    assert 1 <= whole["stages"]["tests"]["seconds"] <= 7 and whole["machine"] == {"device": "a stand-in"}
    assert done.returncode == 1 and "all is well" in done.stdout and "of an earlier run" not in done.stdout
    assert run("nonsense", DRY=1, OUT=tmp_path).returncode == 2


def test_what_fails_a_stage(tmp_path):
    """Without a GPU, and not dry: the line says it. The figures so far are kept."""
    done = subprocess.run([sys.executable, tiny.ROOT / "tests" / "gpu.py", "rollout", tmp_path], capture_output=True,
                          text=True, env=os.environ | {"DRY": "", "SCRATCH": str(tmp_path)})  # fmt: skip
    figures = json.loads((tmp_path / "rollout.json").read_text())
    assert done.returncode == 1 and figures["machine"]["torch"] == torch.__version__
    assert figures["problems"] == ["AssertionError: no CUDA device; DRY=1 runs tiny shapes on the CPU"]
