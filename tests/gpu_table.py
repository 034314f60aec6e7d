"""The last part of tests/gpu.sh: a table of its stages, and OUT/gpu.json with all their figures.

python tests/gpu_table.py OUT STAGE:STATUS:SECONDS …     exit status 0 if every stage ended with 0
"""

import json
import subprocess
import sys
from pathlib import Path


def commit() -> str:
    """Of the working tree, if git knows it."""
    try:
        git = subprocess.run(["git", "rev-parse", "--verify", "-q", "HEAD"], capture_output=True, text=True)
        return git.stdout.strip() or "unknown"
    except OSError:  # there is no git
        return "unknown"


def main(out: Path, results: list[str]) -> int:
    if not results:
        print("no such stage; there are kernels, tests, rollout, train and toy")
        return 2
    whole = {"commit": commit(), "machine": {}, "stages": {}}
    for stage, code, seconds in (result.split(":") for result in results):
        file = out / f"{stage}.json"  # it is missing if the stage could not even start
        figures = json.loads(file.read_text()) if file.exists() else {}
        whole["machine"] |= figures.pop("machine", {})
        status = {"0": "passed", "124": "cut short", "137": "cut short"}.get(code, "failed")
        whole["stages"][stage] = {"status": status, "seconds": int(seconds)} | figures
    (out / "gpu.json").write_text(json.dumps(whole, indent=1) + "\n")
    facts = [f"{name} {value}" for name, value in whole["machine"].items() if value]
    print("", ", ".join([*facts, f"commit {whole['commit'][:12]}"]), sep="\n")
    for stage, figures in whole["stages"].items():
        line = "; ".join([*figures.get("lines", []), *figures.get("problems", [])])
        print(f"{stage:8} {figures['status']:9} {figures['seconds']:4} s  {line}")
    print(f"figures: {out}/gpu.json")
    return int(any(figures["status"] != "passed" for figures in whole["stages"].values()))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
