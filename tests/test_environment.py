"settings.ini, environment.yml and constraints.txt name the same packages."

import os
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
CONDA_NAMES = {
    "pytorch-gpu": "torch",
    "py-opencv": "opencv-python-headless",
    "snakemake-minimal": "snakemake",
}


def settings():
    cfg = ConfigParser(delimiters=["="], interpolation=None)
    cfg.read(ROOT / "settings.ini", encoding="utf-8")
    lines = [
        line.strip()
        for k in ("requirements", "dev_requirements")
        for line in cfg["DEFAULT"][k].splitlines()
        if line.strip()
    ]
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


def conda():
    deps = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    flat = [d for d in deps if isinstance(d, str)] + [
        p for d in deps if isinstance(d, dict) for p in d["pip"]
    ]
    out = {}
    for line in flat:
        name, spec = re.fullmatch(r"([A-Za-z0-9_.-]+)(.*)", line).groups()
        out[canonicalize_name(CONDA_NAMES.get(name, name))] = spec
    return out


def pins():
    text = (ROOT / "constraints.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(r.name): next(iter(r.specifier)).version for r in map(Requirement, lines)}


def test_conda_and_settings_name_the_same_packages():
    ours, theirs = set(settings()) - {"faiss-cpu"}, set(conda()) - {"python", "pip"}
    assert ours == theirs, (
        f"only in settings.ini: {sorted(ours - theirs)}; only in environment.yml: {sorted(theirs - ours)}"
    )


@pytest.mark.parametrize("name", sorted(set(settings())))
def test_versions_agree(name):
    req = settings()[name]
    if name in conda():
        assert str(req.specifier) == str(Requirement(f"x{conda()[name]}").specifier), (
            f"{name} differs between settings.ini and environment.yml"
        )
    assert name in pins(), f"{name} is not pinned in constraints.txt"
    assert req.specifier.contains(pins()[name]), (
        f"constraints.txt pins {name} {pins()[name]}, settings.ini asks for {req.specifier}"
    )


def test_installed_versions_are_the_pinned_ones():
    from importlib.metadata import PackageNotFoundError, version

    wrong = {}
    for name in settings():
        try:
            have = version(name)
        except PackageNotFoundError:
            continue  # another platform's package
        if have.partition("+")[0] != pins()[name].partition("+")[0]:
            wrong[name] = (have, pins()[name])
    assert not wrong, f"installed, pinned: {wrong}"


def test_markers_give_plain_packages_where_there_is_no_cuda_build():
    gpu, cpu = settings()["faiss-gpu"].marker, settings()["faiss-cpu"].marker
    for env, wants_gpu in (
        ({"platform_system": "Linux", "platform_machine": "x86_64"}, True),
        ({"platform_system": "Darwin", "platform_machine": "arm64"}, False),
        ({"platform_system": "Linux", "platform_machine": "aarch64"}, False),
    ):
        assert gpu.evaluate(env) == wants_gpu and cpu.evaluate(env) != wants_gpu


def installs(faiss, folder):
    "What pip would be told to install, read from the package's metadata; and what was said."
    env = {k: v for k, v in os.environ.items() if k != "FAISS"} | ({"FAISS": faiss} if faiss else {})
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        return None, done.stderr
    text = (folder / "landmark.egg-info" / "requires.txt").read_text()
    words, marker = {}, ""
    for line in filter(None, text.splitlines()):
        marker = line[1:-1].partition(":")[2] if line.startswith("[") else marker
        if line.startswith("[dev"):
            break
        if not line.startswith("["):
            words[canonicalize_name(Requirement(line).name)] = marker
    return words, done.stderr


def test_faiss_for_cpus_can_be_chosen(tmp_path):
    "One of the two packages, on any machine; the rest stays."
    (usual, _), (cpu, _) = (installs(faiss, tmp_path) for faiss in ("", "cpu"))
    assert usual["faiss-gpu"] and usual["faiss-cpu"], "each for its own machines"
    assert "faiss-gpu" not in cpu and cpu["faiss-cpu"] == ""
    assert set(usual) - set(cpu) == {"faiss-gpu"} and set(cpu) <= set(usual)
    none, said = installs("tpu", tmp_path)
    assert none is None and said.strip() == "FAISS is 'tpu'; allowed are gpu and cpu"


def test_only_one_faiss_is_installed():
    from importlib.metadata import distributions

    there = {canonicalize_name(d.metadata["Name"]) for d in distributions() if d.metadata["Name"]}
    both = there & {"faiss-gpu", "faiss-cpu"}
    assert len(both) < 2, "faiss-gpu and faiss-cpu bring the same module; uninstall both, install one"


def test_the_driver_that_is_named_is_the_one_that_torch_needs():
    "A torch of another CUDA needs another driver, and then CONTRIBUTING.md has to say so."
    import torch

    if not torch.version.cuda:
        pytest.skip("this torch has no CUDA")
    least = {"12": "525.60.13", "13": "580"}[torch.version.cuda.partition(".")[0]]  # NVIDIA's table
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert f"torch is a CUDA {torch.version.cuda.partition('.')[0]} build" in text
    assert f"**driver {least} or newer**" in text
