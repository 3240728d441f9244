"""`mopl doctor`: what is installed, what is missing for which command, and whether the numbers are right."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mopl import ops
from mopl._extras import PACKAGES, is_installed
from mopl.cli import main
from mopl.commands import doctor, doctor_checks

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Importing everything takes many seconds; the test of the function itself has packages of its own."""
    monkeypatch.setattr(doctor, "import_errors", lambda modules: {})


IMPORT_ERRORS = doctor.import_errors


def test_a_machine_in_order_is_said_to_be_so(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    packages = sum(version is not None for version in doctor.diagnose()["packages"].values())
    checks = len(doctor_checks.PROBLEMS) * (1 + torch.cuda.is_available())
    assert f"torch {torch.__version__}" in out
    assert out.endswith(f"\n\n{packages} packages can be imported and {checks} checks passed\n")
    assert out.count(" ok  largest error ") == len(doctor_checks.PROBLEMS) * (1 + torch.cuda.is_available())


def test_json_holds_the_same(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["torch"] == torch.__version__ and found["packages"]["numpy"]
    assert all(check["works"] for check in found["checks"])
    assert {"rank", "align", "clp", "generate", "export", "serve", "report", "steer"} <= found["commands"].keys()


@pytest.mark.parametrize(
    "wrong", [lambda s, z, b: 2 * ops.plackett_luce_nll(s, z, b), lambda s, z, b: s.sum(1, keepdim=True).sqrt()]
)
def test_a_wrong_number_fails_the_check_and_the_command(monkeypatch, capsys, wrong):
    monkeypatch.setattr(doctor_checks.ops, "listwise_cross_entropy", wrong)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "WRONG" in out and "1 of " in out.splitlines()[-1]


def test_an_op_that_raises_is_said_with_its_error(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no such\ninstruction")

    monkeypatch.setattr(doctor_checks.ops, "listwise_cross_entropy", broken)
    assert main(["doctor"]) == 1
    assert "WRONG  RuntimeError: no such instruction" in capsys.readouterr().out


def test_what_is_missing_is_said_for_each_command_with_the_remedy(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("gguf", "uvicorn", "torch") else "1.0")
    assert main(["doctor"]) == 1  # without torch nothing runs
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("  serve"))
    assert lines[at].endswith("needs uvicorn") and "[serve]" in lines[at + 1]
    at = next(i for i, line in enumerate(lines) if line.startswith("  align --demo"))
    assert lines[at].endswith("needs gguf") and "[demo-lm]" in lines[at + 1]
    assert any("torch is not installed" in line for line in lines)
    assert max(len(line) for line in lines if "run: " not in line) <= 80


def test_what_packages_raise_is_found_in_a_process_of_its_own(tmp_path, monkeypatch):
    for name, text in (
        ("fine", "print('hello')"),
        ("raising", "raise RuntimeError('broken\\nbuild')"),
        ("leaving", "raise SystemExit(3)"),
        ("crashing", "import os; os.abort()"),
        ("behind", ""),
        ("slow", "import time; time.sleep(60)"),
    ):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    found = IMPORT_ERRORS(["fine", "raising", "leaving", "crashing", "behind"])
    assert found["crashing"] == "the process ended with status -6" and found.keys() == {
        "raising",
        "leaving",
        "crashing",
    }
    assert (found["raising"], found["leaving"]) == ("RuntimeError: broken build", "SystemExit: 3")
    monkeypatch.setattr(doctor, "SECONDS_TO_IMPORT", 0.5)
    assert IMPORT_ERRORS(["slow"]) == {"slow": "not imported within 0.5 seconds"}


def test_a_broken_package_is_said_beside_its_version_and_for_what_needs_it(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_version", lambda name: "1.0")
    monkeypatch.setattr(doctor, "import_errors", lambda _: {"uvicorn": "OSError: no"})
    assert main(["doctor"]) == 1
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert {"uvicorn 1.0 BROKEN OSError: no", "serve cannot import uvicorn", "rank ready"} <= set(lines)
    assert lines[-1].startswith("1 of ") and lines[-1].endswith(" packages cannot be imported")


def test_torch_that_cannot_be_imported_does_not_hide_the_rest(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mopl.commands.doctor_checks", None)
    monkeypatch.setattr(doctor, "import_errors", lambda _: {"torch": "OSError: libcudart.so.12: cannot open"})
    assert main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["broken"] == {"torch": "OSError: libcudart.so.12: cannot open"} and found["checks"] == []
    assert found["packages"]["numpy"] and "torch" in found["commands"]["rank"]["broken"]


def test_a_folder_of_the_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "only_a_folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not is_installed("only_a_folder") and is_installed("json")


def test_what_mopl_needs_is_what_its_package_says_it_needs():
    text = (ROOT / "pyproject.toml").read_text()
    needed = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.DOTALL | re.MULTILINE)[1]
    names = set(re.findall(r'^    "([a-z]+)', needed, re.MULTILINE))
    assert {PACKAGES.get(name, name) for name in doctor.BASE} == names


def test_what_a_plain_command_needs_is_not_left_out(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("peft", "statsmodels", "yaml") else "1.0")
    assert main(["doctor"]) == 1
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert {"rank needs statsmodels", "align needs peft", "serve needs peft", "steer cannot import pyyaml"} <= set(
        lines
    )
    assert "pyyaml BROKEN not installed, but mopl needs it" in lines


def test_it_needs_no_torch(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mopl.commands.doctor_checks", None)
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["checks"] == []


@pytest.mark.parametrize(
    ("module", "name", "other"),
    [
        (doctor_checks.losses, "pairwise_logistic", {"margin": 0.1}),
        (doctor_checks.losses, "policy_gradient", {"kl_weight": 0.3}),
        (doctor_checks.ops, "linear_jsd", {"beta": 0.4}),
    ],
)
def test_losses_policies_and_divergences_are_checked_too(monkeypatch, module, name, other):
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *tensors, **options: right(*tensors, **{**options, **other}))
    assert sum(not check["works"] for check in doctor_checks.run_checks()) == 1 + torch.cuda.is_available()


def test_with_a_gpu_every_check_is_made_there_too(monkeypatch):
    """The table of a machine with a GPU, and every problem on fake tensors of one, which no op may leave."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from triton.runtime.jit import JITFunction

    from bench import recording
    from bench.cards import CARDS

    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(doctor_checks, "_checked", lambda problem, device: asked.append(device.type) or {})
        names = [check["name"] for check in doctor_checks.run_checks()]
    assert names == [f"{name}, {where}" for where in ("CPU", "GPU") for name in doctor_checks.PROBLEMS]
    assert asked == ["cpu"] * len(doctor_checks.PROBLEMS) + ["cuda"] * len(doctor_checks.PROBLEMS)
    launched = {}
    for name, problem in doctor_checks.PROBLEMS.items():
        seen = recording.Recording()
        with FakeTensorMode(), recording.Recorder(seen), recording.card(CARDS["H200"]), monkeypatch.context() as patch:
            patch.setattr(FakeTensor, "cpu", torch.Tensor.cpu)  # problems take what they expect from there
            patch.setattr(JITFunction, "run", recording.record_triton(seen))
            op, _, inputs = problem(recording.DEVICE)
            results = doctor_checks._results(op, inputs)
        assert len(results) == 1 + len(inputs) and all(each.device.type == "cuda" for each in results)
        launched[name] = any(launch.kind == "triton" for launch in seen.launches)
    kernels = ("ListNet", "Plackett-Luce", "log-probabilities from logits", "log-probabilities from hidden states")
    assert [name for name, any_ in launched.items() if any_] == list(kernels)


def test_a_gpu_is_named_with_its_memory_and_the_driver(monkeypatch, tmp_path):
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19\n")
    monkeypatch.setattr(doctor_checks, "DRIVER", tmp_path / "version")
    device = SimpleNamespace(name="NVIDIA H200", total_memory=139 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    named = f"NVIDIA H200, 139 GiB; NVIDIA H200, 139 GiB (torch {torch.__version__}, driver 535.104.05)"
    assert doctor_checks.describe_gpu() == named
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert doctor_checks.describe_gpu().endswith("built for CUDA 13.0, sees no device, driver 535.104.05")
    monkeypatch.setattr(doctor_checks, "DRIVER", tmp_path / "none")
    assert doctor_checks.describe_gpu().endswith("sees no device or no driver")
