"""The fused decode step: what interpreted.py and compiled.py find, where it runs, and its form of the adapters."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_lora import disturb

import kernels
import model as models
import rollout
from run import lora

pytest.importorskip("triton")
HERE = Path(__file__).parent
NAMES = [name for name in vars(kernels) if name.endswith("_kernel")]


def close(a, b, dtype=torch.float32, scale=1.0):
    """Equal up to rounding: 1e-5, in bf16 a unit in the last place or two, of the largest value."""
    a, b = a.double(), b.double()
    limit = scale * (1e-5 if dtype == torch.float32 else 2.0**-7) * max(1.0, b.abs().max().item())
    assert a.shape == b.shape and (a - b).abs().max() <= limit, ((a - b).abs().max().item(), limit)


def in_a_process(*command, **environment):
    """Runs Python without this process's settings of pytest and Triton."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_"))}
    return subprocess.run([sys.executable, *command], env=kept | environment, capture_output=True, text=True)


def test_in_the_interpreter():
    done = in_a_process("-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / "interpreted.py", TRITON_INTERPRET="1")
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]


def test_compiled_for_gpus(tmp_path):
    """At the sizes of 8B, bf16: registers suffice, loads are wide, attention uses the matrix units; few launches."""
    done = in_a_process(HERE / "compiled.py", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout)
    launches = {name: kinds["triton"] + sum(kinds["torch"].values()) for name, kinds in result["launches"].items()}
    bare, _, adapted, _ = launches.values()
    assert bare <= 12 * 32 + 20 and adapted <= bare + 6 * 32 and result["plain"] > 3 * bare, launches
    found = {(row["kernel"], row["sm"], row["rows"]) for row in result["kernels"]}
    assert len(NAMES) == 7 and {(name, sm, "16 x 8") for name in NAMES for sm in (80, 90)} <= found and len(found) == 32
    wide = {(True, False): 48, (True, True): 24, (False, False): 2, (False, True): 2}  # Qwen2's heads are half as wide
    for row in result["kernels"]:
        assert row["spilled"] == row["stack"] == 0 and row["registers"] <= 128 and row["shared"] < 48 * 1024, row
        assert row["wide loads"] >= wide[row["kernel"] == "attend_kernel", "Qwen2" in row["rows"]], row
        assert bool(row["mma"]) == (row["kernel"] == "attend_kernel"), row


def test_where_it_runs(monkeypatch):
    cpu, cuda, bf16 = torch.device("cpu"), torch.device("cuda"), torch.bfloat16

    def asked(how, device=cuda, dtype=bf16, capability=(8, 0), triton="there", fails=""):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(kernels, "launch_fails", lambda device: fails)
        monkeypatch.setattr(kernels, "triton", triton)
        return kernels.may_fuse(how, device, dtype)

    assert asked("auto") and asked("fused") and not asked("plain")
    refused = {"is on the cpu": {"device": cpu}, "in bf16": {"dtype": torch.float32}, "not installed": {"triton": None},
               "no gcc": {"fails": "no gcc"}, "Ampere": {"capability": (7, 5)}}  # fmt: skip
    for message, changes in refused.items():
        assert not asked("auto", **changes) and not asked("plain", **changes)
        with pytest.raises(ValueError, match=message):
            asked("fused", **changes)
    with pytest.raises(ValueError, match="must be auto"):
        asked("quick")


def test_a_cpu_decodes_plainly(network):
    assert not rollout.Sampler(network).fused
    assert torch.version.cuda or kernels.triton is None  # its import would only cost time
    with pytest.raises(ValueError, match="CUDA device"):
        rollout.Sampler(network, kernels="fused")


@torch.inference_mode()
@pytest.mark.parametrize("targets", [lora.TARGETS, ("k_proj", "layers.1.mlp.up_proj")])
def test_adapters_in_one_matrix(folder, targets):
    """`stack`: `decode` is `forward`, W moves to another place once, and the model can still be trained."""
    with torch.inference_mode(False):
        net = disturb(lora.attach(models.load(folder), 3, 6.0, targets))
    before, addresses = {name: w.clone() for name, w in net.named_parameters()}, None
    for _ in range(2):
        lora.stack(net)
        held = [x.data_ptr() for a in lora.adapters(net) for x in (a.base.weight, *a.stacked)]
        assert addresses in (None, held)
        addresses = held
        for adapter in lora.adapters(net):
            x, (whole, _) = torch.randn(4, adapter.base.in_features), adapter.stacked
            close(adapter.decode(x), adapter(x), scale=5)
            assert len(whole) % 16 == 0 and whole.data_ptr() == adapter.base.weight.data_ptr()
            with lora.without(net):
                lora.stack(net)
                close(adapter.decode(x), adapter(x))
            lora.stack(net)
        for name, w in net.named_parameters():
            w.data += ".base." not in name and name.split(".")[-2] in "AB"
    assert all(torch.equal(w, before[name]) for name, w in net.named_parameters() if not w.requires_grad)
    with torch.inference_mode(False):
        net(torch.tensor([[7, 8, 9]])).sum().backward()  # a tensor made in inference_mode would be refused
