"""What every command shares: how it ends, its console, its place among ranks, folders in use, free memory."""

import io
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
import tiny
from launch import flags, start, wait_for_step

from run import files, memory, progress
from run.args import Args, command, said

FEW = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               10.
Pages active:                            500.
Pages inactive:                           20.
"""


def shell(line, **environment):
    """A shell's (exit status, stdout, stderr) of a line in which `python` is this one."""
    line = line.replace("python", shlex.quote(sys.executable))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    done = subprocess.run(["bash", "-c", line], cwd=tiny.ROOT, env=environment, capture_output=True, timeout=200)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


# ---- how a command ends ----------------------------------------------------------------------------------------


def signalled(number):
    def main(argv):
        signal.raise_signal(number)
        time.sleep(5)

    return main


def fails(error, *notes):
    def main(argv):
        for note in notes:
            progress.add_note(error, note)
        raise error

    return main


ENDS = [
    (lambda argv: None, 0, ""), (lambda argv: 3, 3, ""), (fails(SystemExit(4)), 4, ""),
    (fails(MemoryError()), 2, "a.py: not enough memory\n"),
    (fails(ValueError("wrong"), "do this"), 2, "a.py: wrong; do this\n"), (fails(OSError("disk")), 2, "a.py: disk\n"),
    (fails(KeyboardInterrupt(), "go on so"), 130, "a.py: stopped by SIGINT; go on so\n"),
    (signalled(signal.SIGTERM), 143, "a.py: stopped by SIGTERM\n"),
    (signalled(signal.SIGINT), 130, "a.py: stopped by SIGINT\n"),
]  # fmt: skip


@pytest.mark.parametrize(("main", "status", "says"), ENDS)
def test_how_a_command_ends(capsys, main, status, says):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert progress.command("a.py")(main)([]) == status
    assert capsys.readouterr().err == says
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.parametrize("ended", [False, True])
def test_another_rank_speaks_late(capsys, monkeypatch, ended):
    """Rank 0 may not know of its error. If it does, it has said so, and torchrun ends this rank."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", **MASTER}.items():
        monkeypatch.setenv(name, value)
    waits = (lambda s: signal.raise_signal(signal.SIGTERM)) if ended else (lambda s: None)
    monkeypatch.setattr(time, "sleep", waits)
    assert progress.command("a.py", ranks=True)(fails(ValueError("wrong"), "do this"))([]) == 2
    assert capsys.readouterr().err == ("" if ended else "rank 1: a.py: wrong; do this\n")


def test_a_fault_of_the_product_is_not_hidden():
    with pytest.raises(RuntimeError, match="a bug"):
        progress.command("a.py")(fails(RuntimeError("a bug")))([])


@pytest.mark.parametrize(("start", "status"), [(signal.SIG_DFL, 129), (signal.SIG_IGN, 0)])
def test_a_closed_terminal(start, status):
    """SIGHUP stops a command, unless it was ignored from the start, as by nohup."""
    before = signal.signal(signal.SIGHUP, start)
    try:
        assert progress.command("a.py")(lambda argv: signal.raise_signal(signal.SIGHUP))([]) == status
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("given", ["train.py", "faith.py ask", "-m lab.base", "model.py x", "-m lab.report x"])
def test_ctrl_c_while_torch_is_imported(tmp_path, given):
    (tmp_path / "torch.py").write_text("import signal, time\nsignal.raise_signal(signal.SIGINT)\ntime.sleep(9)\n")
    status, out, error = shell(f"exec python {given}", PYTHONPATH=str(tmp_path))
    assert (status, out, error) == (-signal.SIGINT, "", "")


PRINTS = "import sys; from run.progress import add_note, command; "
PRINTS += "sys.exit(command('a.py')(lambda argv: print('\\u2192 \\xe9\\n' * 9999))())"
CONSOLES = [
    ("| head -1", {}, 0, "→ é\n", ""), ("| true", {}, 0, "", ""), (">&-", {}, 0, "", ""), (">&- 2>&-", {}, 0, "", ""),
    ("> /dev/full", {}, 2, "", "a.py: its output cannot be written (No space left on device)\n"),
    ("| head -1", {"PYTHONIOENCODING": "ascii"}, 0, "\\u2192 \\xe9\n", ""),
    ("| head -1", {"PYTHONIOENCODING": "", "PYTHONUTF8": "0", "LC_ALL": "C"}, 0, "\\u2192 \\xe9\n", ""),
]  # fmt: skip


@pytest.mark.parametrize(("to", "environment", "status", "out", "error"), CONSOLES)
def test_any_console(to, environment, status, out, error):
    """It may be closed, full or not UTF-8."""
    line = f'python -c "{PRINTS}" {to}; exit ${{PIPESTATUS[0]}}'
    assert shell(line, **{"PYTHONIOENCODING": "utf-8"} | environment) == (status, out, error)


@pytest.mark.parametrize("given", ["tasks.py esnli tests/data/esnli", "model.py MODEL"])
def test_every_command_may_lose_its_reader(folder, given):
    line = f"python {given.replace('MODEL', str(folder))}"
    assert shell(f"{line} | true; exit ${{PIPESTATUS[0]}}") == (0, "", "")
    status, _, error = shell(f"{line} > /dev/full")
    assert status == 2 and error.count("\n") == 1 and "its output cannot be written" in error


def test_a_run_whose_log_is_closed_or_full(folder, tmp_path):
    for number, to in enumerate(("| true", "> /dev/full")):
        out = tmp_path / str(number)
        status, _, error = shell(f"python train.py {shlex.join(flags(folder, out))} {to}; exit ${{PIPESTATUS[0]}}")
        assert (status, "output cannot be written" in error) == ((0, False), (2, True))[number]
        assert (out / "model" / "model.safetensors").exists() and (out / "after.json").exists()


def test_texts_that_are_not_utf8_for_the_system():
    assert said("né") == "né" and said("n\udcc3\udca9") == "né" and said("\udce9") == "�"


def test_a_clock_that_stands_still_or_goes_back(monkeypatch):
    for clock in ([5.0, 5.0], [5.0, 3.0]):
        monkeypatch.setattr(time, "monotonic", iter(clock * 2).__next__)
        shown, laps = progress.Progress("phase", file=io.StringIO()), progress.Laps
        shown(1, 1)
        assert shown.file.getvalue() == "phase: 1/1 questions, 0.0 min left\n"
        lap = laps()
        lap("x")
        assert lap.seconds == {"x": 0.0}


# ---- commands to paste -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["out/a", "my runs/ä 'one'", "-x", "$HOME;", "--out"])
def test_a_command_can_be_pasted(monkeypatch, out):
    monkeypatch.setattr(sys, "argv", ["/some where/train.py"])
    launcher, script, resume, flag, path = shlex.split(progress.again(out))
    assert (launcher, script, resume, flag) == ("torchrun", "/some where/train.py", "--resume", "--out")
    assert not path.startswith("-") and os.path.normpath(path) == out
    assert command(Args(opening="-x")) == "--opening=-x"


def test_it_names_the_processes(monkeypatch):
    for name, value in {"RANK": 1, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "a",
                        "MASTER_PORT": 1}.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    assert progress.again("o") == "torchrun --nproc-per-node 2 train.py --resume --out o"


# ---- among ranks -----------------------------------------------------------------------------------------------

MASTER = {"MASTER_ADDR": "host", "MASTER_PORT": "29500"}
PLACES = [
    ({}, (0, 1, 0, 1)), ({"RANK": "0"}, (0, 1, 0, 1)), ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1, 0, 1)),
    ({"RANK": "1", "WORLD_SIZE": "2"} | MASTER, (1, 2, 0, 1)),  # a launcher that names no local ranks
    ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"} | MASTER, (3, 4, 1, 2)),
    ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"} | MASTER, (3, 4, 1, 2)),
    ({"RANK": "1"}, None), ({"WORLD_SIZE": "2"}, None), ({"RANK": "1", "WORLD_SIZE": "2"}, None),
    ({"RANK": "x"}, None), ({"RANK": "-1"}, None), ({"LOCAL_RANK": "1"}, None), ({"WORLD_SIZE": "2"} | MASTER, None),
    ({"RANK": "2", "WORLD_SIZE": "2"} | MASTER, None), ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, None),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "x"}, None),
]  # fmt: skip


@pytest.mark.parametrize(("environment", "place"), PLACES)
def test_what_a_launcher_says(monkeypatch, capsys, environment, place):
    """A place among the ranks. What was left behind in the environment is refused, by the process that has it."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", *MASTER):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    main = progress.command("a.py", ranks=True)(lambda argv: print(progress.launched()))
    assert main([]) == (0 if place else 2)
    out, error = capsys.readouterr()
    if place:
        assert out == f"{place}\n" and progress.command("a.py", ranks=True)(fails(ValueError("wrong")))([]) == 2
        assert capsys.readouterr().err == f"rank {place[0]}: " * (place[0] > 0) + "a.py: wrong\n"
    else:
        assert all(f"{name}={value}" in error for name, value in environment.items()) and error.count("\n") == 1


# ---- a folder in use -------------------------------------------------------------------------------------------


def test_a_folder_is_used_by_one(tmp_path):
    new, old = tmp_path / "a" / "new", tmp_path
    for folder in (new, old):
        with files.in_use(folder):
            assert not files.holds_something(new)
            with (
                pytest.raises(ValueError, match=rf"in use by another process \({os.getpid()} on "),
                files.in_use(folder),
            ):
                pass
        assert not list(tmp_path.glob("*.lock")) and not new.exists()  # it stayed empty
    (old / "in-use.lock").write_text("1 on another")  # of a process that was killed
    with files.in_use(old):
        (new / "x").mkdir(parents=True)
    assert files.holds_something(new) and not (old / "in-use.lock").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written"), files.in_use(tmp_path / "file" / "x"):
        pass


def test_a_folder_whose_holder_is_killed(folder, tmp_path):
    out = tmp_path / "o"
    first = start(flags(folder, out, steps=4000, checkpoint_every=1))
    wait_for_step(first, out, 2)
    status, _, error = shell(f"python train.py --resume --out {out}")
    assert status == 2 and f"in use by another process ({first.pid} on " in error and error.count("\n") == 1
    first.kill()
    first.communicate()
    status, _, error = shell(f"python train.py --resume --out {out} --steps 1")
    assert status == 2 and "--steps 1: the run has done" in error and error.count("\n") == 1


# ---- memory ----------------------------------------------------------------------------------------------------


def test_memory_as_the_system_tells_it(tmp_path):
    assert memory.meminfo("MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable:   7 kB\n") == 7 * 1024
    assert memory.vm_stat(FEW) == 30 * 16384 and memory.vm_stat("") == memory.meminfo("") == sys.maxsize


@pytest.mark.parametrize(("line", "where", "left"), [
    ("0::/a/b", "a/b", 700), ("0::/a/b", "a", 700), ("0::/a/b", "", 700), ("0::/a/b", "other", None),
    ("4:memory:/a", "memory/a", 700), ("4:memory:/a", "memory", 700), ("3:cpuset:/a", "a", None),
])  # fmt: skip
def test_memory_in_a_container(tmp_path, line, where, left):
    names = "memory.max", "memory.current"
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if "memory" in line else names
    here = {"proc/self/cgroup": line, "proc/meminfo": "MemAvailable: 8 kB\n"}
    group = tmp_path / "sys/fs/cgroup" / where
    here |= {
        group / names[0]: "1000\n",
        group / names[1]: "400\n",
        group / "memory.stat": "anon 5\ninactive_file 100\n",
    }
    for name, text in here.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory.limits(tmp_path) == [left] * (left is not None)
    if sys.platform == "linux":
        assert memory.available(tmp_path) == (left or 8192)
        (group / names[0]).write_text("max\n")
        assert memory.available(tmp_path) == 8192
