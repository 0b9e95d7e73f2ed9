"""The whole graph through a real Slurm on this machine: shards as jobs, one killed, two with a GPU each.

`make test-slurm` runs it. What comes out is compared with a run without Slurm, table by table.
LANDMARK_TEST_RUNS=folder keeps that one, for this module and for test_graph.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import slurm

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(
    not os.environ.get("LANDMARK_TEST_SLURM"),
    reason="`make test-slurm` runs it: it starts a Slurm of its own",
)
ON_SLURM = [
    *("--profile", "profiles/slurm", "--jobs", "3", "--latency-wait", "10"),
    *("--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "3"),
    *("--set-resources", "train_v1_seed1:gpu=1", "train_shuffled_seed1:gpu=1"),
]
HERE = ["--cores", "all", "--nolock", "--rerun-incomplete", "--rerun-triggers", "mtime"]


def snakemake(runs, options, given="", env=os.environ):
    env = {**env, "LANDMARK_RUNS": str(runs), "PYTHONPATH": str(ROOT)}
    config = ["--config", "profile=tiny", *([f"given={given}"] if given else [])]
    command = [sys.executable, "-m", "snakemake", *options, *config]
    with open(runs.parent / f"{runs.name}.log", "w") as log:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)


def ended_well(process, runs):
    assert process.wait(3600) == 0, (runs.parent / f"{runs.name}.log").read_text()[-6000:]


def requeue_once_at_work(cluster, runs, shard, process):
    "Kill a shard's job as soon as its artifact is begun, and let Slurm start it again without a pause."
    while not (begun := list(runs.glob(f"tiny/seed1/verify/{shard}-*/state.json"))):
        assert process.poll() is None, "the run ended before the shard began"
        time.sleep(0.1)
    rule = f"rule_verify_{shard.replace('.', '_')}_seed1"
    jobs = [line.split() for line in cluster.run("squeue", "-h", "-o", "%A %k").splitlines()]
    (job,) = [number for number, comment in jobs if comment == rule]
    cluster.run("scontrol", "requeue", job)
    assert not begun[0].with_name("manifest.json").exists(), "killed too late to prove anything"
    while "PENDING" not in cluster.run("squeue", "-h", "-j", job, "-o", "%T"):
        time.sleep(0.2)
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")
    return job


@pytest.fixture(scope="module")
def on_slurm(tmp_path_factory):
    "A run of the profile tiny on Slurm, verification and one extraction as two jobs each."
    runs = tmp_path_factory.mktemp("slurm") / "on slurm"
    given = runs.parent / "given.yaml"
    given.write_text("n_shards: 2\n")
    try:
        with slurm.Cluster(tmp_path_factory.mktemp("cluster") / "c") as cluster:
            process = snakemake(runs, ON_SLURM, given, cluster.env)
            killed = requeue_once_at_work(cluster, runs, "main.shard0of2", process)
            ended_well(process, runs)
            (runs.parent / "killed.txt").write_text(cluster.run("scontrol", "show", "job", killed))
    except slurm.NoSlurm as e:
        pytest.skip(str(e))
    return runs


@pytest.fixture(scope="module")
def on_one_machine(on_slurm):
    runs = Path(os.environ.get("LANDMARK_TEST_RUNS") or on_slurm.parent / "here")
    ended_well(snakemake(runs, HERE), runs)
    return runs


def results(folder, pattern):
    "Files of an artifact; what is hidden is how far it came, and how fast."
    files = [p for p in sorted(folder.rglob(pattern)) if p.is_file()]
    return [p for p in files if not any(part.startswith(".") for part in p.relative_to(folder).parts)]


def artifact(runs, stage, name):
    (path,) = runs.glob(f"tiny/seed1/{stage}/{name}-????????/manifest.json")
    return path.parent


def manifest(runs, stage, name):
    return json.loads((artifact(runs, stage, name) / "manifest.json").read_text())


def test_every_step_ran_as_a_job(on_slurm):
    made = [json.loads(p.read_text()) for p in on_slurm.glob("tiny/seed1/*/*/manifest.json")]
    jobs = [m["environment"]["job"].get("SLURM_JOB_ID") for m in made]
    assert len(made) >= 19 and None not in jobs
    assert len({m["name"] for m in made if m["stage"] == "verify"}) == 3, "two shards and the whole"


def test_the_killed_job_was_started_again(on_slurm):
    said = dict(
        word.split("=", 1) for word in (on_slurm.parent / "killed.txt").read_text().split() if "=" in word
    )
    job = manifest(on_slurm, "verify", "main.shard0of2")["environment"]["job"]
    assert (said["Restarts"], said["JobState"]) == ("1", "COMPLETED") and said["JobId"] == job["SLURM_JOB_ID"]


def test_the_whole_takes_over_what_the_shards_did(on_slurm):
    whole = artifact(on_slurm, "verify", "main")
    for shard in range(2):
        files = list((artifact(on_slurm, "verify", f"main.shard{shard}of2") / "pairs").glob("*.npz"))
        assert all(f.samefile(whole / "pairs" / f.name) for f in files)
        stamps = list(on_slurm.glob(f"tiny/seed1/stamps/extract-models.shard{shard}of2-*.done"))
        assert len(stamps) == 1


def test_two_steps_have_a_gpu_each(on_slurm):
    one, two = (manifest(on_slurm, "train", name) for name in ("v1", "shuffled"))
    ends = [pd.Timestamp(m["finished"]).timestamp() for m in (one, two)]
    starts = [end - m["seconds"] for end, m in zip(ends, (one, two))]
    assert max(starts) < min(ends), "they did not run side by side"
    given = [m["environment"]["job"]["CUDA_VISIBLE_DEVICES"] for m in (one, two)]
    assert sorted(given) == ["0", "1"]


def test_the_tables_are_those_of_one_machine(on_slurm, on_one_machine):
    "All tables but those of durations; pairs and descriptors, too."
    n = 0
    for path in sorted(on_one_machine.glob("tiny/seed1/*/*-????????/manifest.json")):
        here, (stage, name) = path.parent, (path.parent.parent.name, path.parent.name[:-9])
        there = artifact(on_slurm, stage, name)
        for file in results(here, "*.csv"):
            a, b = (pd.read_csv(d / file.relative_to(here)) for d in (here, there))
            timed = [c for c in a if "second" in c]
            pd.testing.assert_frame_equal(a.drop(columns=timed), b.drop(columns=timed), obj=f"{stage}/{file}")
            n += 1
        for file in results(here, "*.np[yz]"):
            a, b = (np.load(d / file.relative_to(here)) for d in (here, there))
            both = [(a, b)] if file.suffix == ".npy" else [(a[k], b[k]) for k in a.files]
            assert all(np.array_equal(x, y) for x, y in both), f"{stage}/{file}"
    assert n >= 19, "a table of every step, at least"
