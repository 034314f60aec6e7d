"""runs/travel.py: what arrives is what was packed, to the bit. runs/qwen_gpu.sh: it keeps its time, and goes on."""

import json
import os
import subprocess
import sys

import gguf
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file

from run import args

sys.path.append(str(tiny.ROOT / "runs"))
import travel  # noqa: E402


@pytest.fixture(scope="module")
def blocks():
    """{kind: blocks of all kinds of bits, 3 rows of them}. Scales are between 2^-9 and 2^-5."""
    random, found = np.random.default_rng(0), {}
    for kind, layout in travel.BLOCKS.items():
        some = np.frombuffer(random.bytes(24 * layout.itemsize), layout).copy()
        for name in {"d", "dmin"} & {*layout.names}:
            some[name] = random.uniform(2**-9, 2**-5, 24)
        found[kind] = some.view("u1").reshape(3, -1)
    return found


@pytest.mark.parametrize("kind", travel.BLOCKS)
def test_blocks(blocks, kind):
    """Equal to the bit to what ggml's own package makes of them."""
    there = gguf.quants.dequantize(blocks[kind], gguf.GGMLQuantizationType[kind])
    assert travel.decode(kind, blocks[kind]).tobytes() == there.tobytes()


@pytest.fixture(scope="module")
def packed(tmp_path_factory, blocks):
    """A model folder, the GGUF file of some of its tensors, and its pieces of 1 MiB."""
    folder = tmp_path_factory.mktemp("travel")
    weights = {kind: torch.from_numpy(travel.decode(kind, some).reshape(3, -1)) for kind, some in blocks.items()}
    weights |= {"fp32": torch.randn(400, 1000), "bf16": torch.randn(300_000).bfloat16(), "one": torch.tensor(1.5)}
    writer = gguf.GGUFWriter(folder / "model.gguf", "qwen2")
    for kind, some in blocks.items():
        writer.add_tensor(f"blk.{kind}", some, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    tiny.build(folder / "model")  # a second file of weights, config and tokenizer
    save_file(weights, folder / "model" / "more.safetensors", metadata={"format": "pt"})
    return folder


def command(capfd, *words):
    code = travel.main([*map(str, words)])
    return code, *capfd.readouterr()


def test_nothing_is_lost(packed, capfd):
    for name, given, found in (("plain", [], 0), ("pieces", [packed / "model.gguf"], 4)):
        code, out, _ = command(capfd, "pack", packed / "model", packed / name, "--piece", 1, *given)
        assert code == 0 and f"; {found} tensors as quantised blocks" in out
        sizes = [path.stat().st_size for path in sorted((packed / name).glob("0*"))]
        assert len(sizes) == 3 and sizes[:-1] == [2**20] * 2 and 0 < sizes[-1] < 2**20
        assert command(capfd, "unpack", packed / name, packed / "out" / name)[0] == 0
        there, back = ({path.name: path.read_bytes() for path in folder.iterdir()}
                       for folder in (packed / "model", packed / "out" / name))  # fmt: skip
        assert there == back and len(there) == 6


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def turn(file):
    file.write_bytes(file.read_bytes()[:-1] + b"?")


def other(file):
    index = json.loads(file.read_text())
    index["entries"][0][-1] = "0" * 64
    file.write_text(json.dumps(index))


WRONG = [  # what is spoiled, how, what is said
    ({"01": os.unlink}, "of 3 pieces 01 is missing; copy these"),
    ({"00": cut}, "of 3 pieces 00 is torn; copy these"),
    ({"01": turn, "02": os.unlink}, "of 3 pieces 01 is torn, 02 is missing; copy these"),
    ({"index.json": other}, "config.json: a part of it is not what was packed"),
    ({"index.json": os.unlink}, "index.json is missing"),
]


@pytest.mark.parametrize("spoiled, said", WRONG, ids=[said[:30] for _, said in WRONG])
def test_what_did_not_arrive(packed, tmp_path, capfd, spoiled, said):
    """One line and status 2, and no folder that looks like a model."""
    travel.main(["pack", str(packed / "model"), str(tmp_path / "pieces"), str(packed / "model.gguf"),
                 "--piece", "1"])  # fmt: skip
    for name, how in spoiled.items():
        how(tmp_path / "pieces" / name)
    code, _, error = command(capfd, "unpack", tmp_path / "pieces", tmp_path / "out")
    assert code == 2 and said in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["pieces"]


def test_wrong_commands(packed, tmp_path, capfd):
    for words, said in (
        (("pack", tmp_path / "none", tmp_path / "a"), "must be a folder"),
        (("pack", packed / "model", tmp_path / "a", "--piece", 0), "at least 1"),
        (("pack", packed / "model", packed), "already there"),
        (("pack", packed / "model", tmp_path / "a", packed / "model" / "config.json"), "GGUF magic invalid"),
    ):
        code, _, error = command(capfd, *words)
        assert code == 2 and said in error and error.count("\n") == 1
    assert not [*tmp_path.iterdir()]


STAND_IN = r"""#!/bin/bash
[ "$1" = -c ] && exit
echo "$@" >> commands
case "$*" in
    *unpack*) sleep 2; mkdir -p $4 ;;
    *train.py*)
        mkdir -p $3 && cd $3 && touch args.json metrics.jsonl && trap "sleep 0.5; echo >> metrics.jsonl; exit 143" TERM
        steps=$(sed 's/.*--steps \([0-9]*\).*/\1/' <<< "$*")
        while [ $(wc -l < metrics.jsonl) -lt $steps ]; do echo >> metrics.jsonl; sleep 0.1; done
        touch after.json
esac
"""


def test_the_script_keeps_its_time_and_goes_on(tmp_path):
    """With a stand-in for Python: 2 s to unpack, 0.1 s a step, 0.5 s after SIGTERM, no time to measure."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(STAND_IN.replace("commands", f"{tmp_path}/commands"))
    (tmp_path / "bin" / "python").chmod(0o755)
    run, path = tmp_path / "out" / "seed-0", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"

    def call(**environment):
        """The lines of commands that it ran, and the steps trained by its end."""
        (tmp_path / "commands").write_text("")
        subprocess.run(["bash", tiny.ROOT / "runs" / "qwen_gpu.sh", "pieces", "data", "out"], cwd=tmp_path, check=True,
                       env=os.environ | {"PATH": path, "OUT": str(tmp_path)} | environment)  # fmt: skip
        assert (run / "after.json").exists() and (tmp_path / "run.tar.gz").stat().st_size > 0
        return (tmp_path / "commands").read_text().splitlines(), len((run / "metrics.jsonl").read_text().splitlines())

    (unpack, easy, build, form, train, measure, pack), steps = call(BOX="11", RESERVE="2", STEPS="1000")
    assert unpack == f"runs/travel.py unpack {tmp_path}/pieces {tmp_path}/out/model" and 0 < steps < 13
    kinds = f"{tmp_path}/out/easy/kinds.jsonl"
    assert easy == f"runs/easy.py {tmp_path}/out/easy"
    assert build.startswith(f"-m lab.build --out {tmp_path}/out/labels --model {tmp_path}/out/model --task jsonl")
    assert form.startswith(
        f"train.py --out {tmp_path}/out/form --model {tmp_path}/out/model --task jsonl --data {kinds} "
    )
    parsed = args.parse(train.split()[1:], {}, {})
    args.check(parsed)
    assert (parsed.prompts, parsed.samples, parsed.steps, parsed.data) == (32, 16, 1000, kinds)
    assert measure == f"train.py --out {run} --resume --steps {steps}"
    assert pack == f"runs/travel.py pack {run}/model {tmp_path}/adapter --piece 15"
    (tmp_path / "out" / "labels").mkdir()
    (tmp_path / "out" / "labels" / "manifest.json").write_text('"complete": true')
    (easy, train, pack), more = call(STEPS=str(steps + 2))
    assert train.startswith(f"train.py --out {run} --resume ") and more == steps + 2
    assert len(call(STEPS=str(more))[0]) == 2
    (tmp_path / "out" / "form" / "after.json").unlink()  # cut off while it learned the form
    assert f"train.py --out {tmp_path}/out/form --resume" in call(STEPS=str(more))[0]
