"""A run that is killed again and again, at random moments and by any signal, ends as if nobody had disturbed it.

FAITH_KILLS=20 pytest tests/test_kills.py        twenty runs with five kills each, instead of four
"""

import contextlib
import os
import random
import re
import shutil
import signal
import time

import launch
import pytest

SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FLAGS = {"steps": 40, "checkpoint_every": 2, "decay": "linear", "anchor": 0.5, "anchor_questions": 5, "kl": 0.01,
         "calibrate": True, "calibration_questions": 5, "labels": "frozen"}  # fmt: skip
PHASES = {  # name: has a process come so far? new(file): it has written the file. And the longest wait from then on.
    "starting": (lambda out, new: True, 3.0),
    "measuring and labelling": (lambda out, new: new(out / "args.json"), 0.5),
    "training": (lambda out, new: new(out / "metrics.jsonl"), 0.3),
    "saving a checkpoint": (lambda out, new: any(map(new, out.glob("checkpoints/*"))), 0.02),
    "saving the model, measuring": (lambda out, new: any(map(new, out.glob("model*"))), 0.1),
}


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    launch.ran(launch.flags(folder, out, **FLAGS))
    return out


@pytest.mark.parametrize("number", range(int(os.environ.get("FAITH_KILLS", "4"))))
def test_killed_at_random_moments(folder, whole, tmp_path, number):
    """Five kills, one in each phase, each time resumed. In four runs every signal comes in every phase."""
    out, draw, logged = tmp_path / "out", random.Random(number), 0
    for turn, (phase, (reached, longest)) in enumerate(PHASES.items()):
        sent, before = SIGNALS[(turn + number) % 4], tmp_path / phase
        if out.exists():
            shutil.copytree(out, before)
        for _ in range(5):  # where the machine stands still for a moment, the run may end before it is killed
            begun = time.time()

            def new(file):
                with contextlib.suppress(FileNotFoundError):
                    return file.stat().st_mtime > begun  # noqa: B023

            given = ["--resume", "--out", out] if (out / "args.json").exists() else launch.flags(folder, out, **FLAGS)
            process = launch.start(given)
            while process.poll() is None and not reached(out, new):
                time.sleep(0.002)
            time.sleep(draw.uniform(0, longest))
            process.send_signal(sent)
            code, printed, error = launch.finish(process)
            if code:
                break
            shutil.rmtree(out)
            if before.exists():
                shutil.copytree(before, out)
        if phase == "starting":  # Ctrl-C may meet Python or torch before they know about signals
            assert code, error
        else:
            assert code in (-sent, 128 + sent) and "Traceback" not in error, (phase, code, error)
        for done in re.findall(r"continuing after step (\d+)", printed):
            assert logged - 3 <= int(done) <= logged  # a checkpoint every two steps, and one line may be torn
        logged = len(launch.lines(out / "metrics.jsonl"))
    assert launch.finish(launch.start(["--resume", "--out", out]))[0] == 0
    launch.same(whole, out)
    assert (out / "calibration.json").read_text() == (whole / "calibration.json").read_text()
