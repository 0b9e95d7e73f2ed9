"What goes wrong is said in plain words, at once, and nothing half-written is taken for finished."

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from landmark import graph
from landmark.parts import artifacts, core

ROOT = Path(__file__).resolve().parent.parent


def papermill(notebook, *args, runs):
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "papermill",
            str(ROOT / "nbs" / notebook),
            str(runs / "out.ipynb"),
            "-k",
            "python3",
            *args,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "LANDMARK_RUNS": str(runs), "LANDMARK_WORLD": "tiny", "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize(
    "args, words",
    [
        (("-p", "n_bootz", "3"), "there is no parameter `n_bootz`, did you mean `n_boot`?"),
        (("-p", "n_boot", "many"), "`n_boot` is 'many'"),
    ],
)
def test_a_wrong_parameter_stops_before_any_work(tmp_path, args, words):
    r = papermill("07_tables.ipynb", *args, runs=tmp_path)
    assert r.returncode != 0 and words in r.stderr
    assert not list(tmp_path.glob("*/seed*")), "no artifact is begun"


def test_a_right_parameter_passes(tmp_path):
    r = papermill("07_tables.ipynb", "-p", "n_boot", "50", runs=tmp_path)
    assert r.returncode == 0, r.stderr[-1500:]
    man = json.loads(next(tmp_path.glob("tiny/seed1/tables/*/manifest.json")).read_text())
    assert man["config"]["n_boot"] == 50 and man["metrics"]["made_up"] is True and man["world"] == "tiny"


def test_unknown_profile(tmp_path):
    r = subprocess.run(
        [sys.executable, "-m", "snakemake", "-n", "--config", "profile=nosuch"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert r.returncode != 0 and "there is no profile 'nosuch'; there are" in r.stdout + r.stderr


@pytest.mark.parametrize(
    "files, words",
    [
        (
            {("data", "main"): {"wrold": "tiny"}},
            "params/p/data/main.yaml: data: there is no parameter `wrold`, did you mean `world`?",
        ),
        ({("data", "main"): {"world": ["tiny"]}}, "params/p/data/main.yaml"),
        (
            {("tables", "main"): {"data": ["@data/nothing"]}},
            "refers to @data/nothing, but there is no params/p/data/nothing.yaml",
        ),
        ({("tables", "a"): {"data": ["@tables/b"]}, ("tables", "b"): {"data": ["@tables/a"]}}, "in a circle"),
    ],
)
def test_parameter_files_are_checked_before_a_kernel_starts(monkeypatch, files, words):
    monkeypatch.setattr(graph, "read_profile", lambda p, given=None: files)
    with pytest.raises(core.ParameterError) as e:
        graph.plan("p")
    assert words in str(e.value)


def test_made_up_numbers_reach_no_table(tmp_path):
    from landmark import tables

    core.write_json(
        tmp_path / "a" / "manifest.json", dict(config=dict(seed=1), metrics=dict(made_up=True), outputs={})
    )
    with pytest.raises(core.ParameterError, match="invented"):
        tables.read_all([tmp_path / "a"], "metrics.csv")


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("old")
    with pytest.raises(OSError, match="the disk is full"), core.atomic_path(path) as tmp:
        tmp.write_text("ha")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.csv"]


def test_two_notebooks_that_want_the_same_world_draw_it_once(tmp_path):
    code = """if True:
        import sys
        from landmark.parts.data import layout, worlds      # slow imports first: both ask at the same moment
        def say(*words): print(*words, flush=True)
        def wait(): sys.stdin.readline()
        say('ready'); wait()
        world = worlds.make_world('tiny')
        say((world/'world.json').stat().st_ino); wait()
        say((world/'world.json').stat().st_ino, len(layout.read_images(world, 'index')))"""
    env = {**os.environ, "LANDMARK_RUNS": str(tmp_path), "PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for _ in range(2)
    ]

    def tell():
        [(p.stdin.write("go\n"), p.stdin.flush()) for p in both]

    assert [p.stdout.readline() for p in both] == ["ready\n"] * 2
    tell()
    drawn = [p.stdout.readline().strip() for p in both]
    tell()
    later = [p.communicate()[0].split() for p in both]
    assert drawn[0] == drawn[1] == later[0][0] == later[1][0], "one world, and nobody replaced it"
    assert later[0][1] == later[1][1] != "0" and not list(tmp_path.glob("worlds/*.tmp"))


def test_an_artifact_without_manifest_is_no_artifact(tmp_path, monkeypatch):
    monkeypatch.setenv("LANDMARK_RUNS", str(tmp_path))
    from landmark.tables import Config

    (tmp_path / "x").mkdir()
    with pytest.raises(core.ParameterError, match="unfinished, or no artifact"):
        artifacts.artifact(Config(), str(tmp_path / "x"))
    with pytest.raises(core.ParameterError, match="is not there"):
        artifacts.artifact(Config(), str(tmp_path / "y"))


def test_work_that_no_longer_fits_is_set_aside_and_comes_back(tmp_path, monkeypatch, capsys):
    "Other inputs under an unfinished artifact: it is named, kept, and taken up when they are as they were."
    monkeypatch.setenv("LANDMARK_RUNS", str(tmp_path))
    from landmark.tables import Config

    given = tmp_path / "given.csv"

    def work(text, finish=False):
        given.write_text(text)
        with artifacts.open_stage("tables", Config(), inputs=[given]) as st:
            found = sorted(p.name for p in st.dir.glob("*.bin"))
            (st.dir / f"{text}.bin").write_text(text)
            if not finish:
                raise KeyboardInterrupt
        return found

    def killed(text):
        with pytest.raises(KeyboardInterrupt):
            work(text)

    killed("one")
    killed("two")
    said = capsys.readouterr().err
    assert "was made with other inputs (given.csv); it is set aside" in said
    d = artifacts.stage_dir("tables", Config())
    assert [p.name for p in d.glob("*.bin")] == ["two.bin"] and [
        p.name for p in d.parent.glob(".*.aside/*.bin")
    ] == ["one.bin"]
    assert work("one", finish=True) == ["one.bin"] and "is wanted again" in capsys.readouterr().err, (
        "it goes on where it was"
    )
    assert [p.name for p in d.parent.glob(".*.aside/*.bin")] == ["two.bin"] and (d / "manifest.json").exists()
    killed("three")
    assert [p.name for p in d.parent.glob(".*.aside/*")] and sorted(
        p.name for p in d.parent.glob(".*.aside/*.bin")
    ) == ["one.bin"], "only the last is kept"
    from landmark import graph

    monkeypatch.setattr(sys, "argv", ["landmark_graph", "runs"])
    graph.main()
    said = capsys.readouterr().out
    assert (
        "made by other code or from other inputs: 1 of them, " in said
        and "unfinished" in said
        and ".aside " not in said
    )


def test_a_gpu_that_is_not_there():
    with pytest.raises(core.ParameterError, match="was asked for, but this machine shows"):
        core.pick_device("cuda:63")


def test_workers_end_with_their_parent(tmp_path):
    "SIGKILL to a run takes its worker processes along."
    import signal
    import time

    code = """
import time
from landmark.parts.core import parallel_map
if __name__ == "__main__":
    print("up", flush=True)
    parallel_map(time.sleep, [60] * 4, n_workers=2)
"""
    script = tmp_path / "pool.py"
    script.write_text(code)
    p = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    p.stdout.readline()

    def children():
        return [
            int(d.name)
            for d in Path("/proc").iterdir()
            if d.name.isdigit() and _parent(d) == p.pid and b"spawn_main" in (d / "cmdline").read_bytes()
        ]

    for _ in range(100):
        kids = children()
        if len(kids) >= 2:
            break
        time.sleep(0.2)
    assert len(kids) >= 2
    time.sleep(2.5)  # they import and start to watch
    os.kill(p.pid, signal.SIGKILL)
    p.wait()
    for _ in range(50):
        alive = [k for k in kids if Path(f"/proc/{k}").exists()]
        if not alive:
            break
        time.sleep(0.2)
    assert not alive


def _parent(d):
    try:
        return int((d / "stat").read_text().rsplit(")", 1)[1].split()[1])
    except (OSError, ValueError):
        return -1
