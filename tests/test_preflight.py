"""Nothing starts that cannot end: whatever a later step would miss is named before the first, with that step.

The plan is that of `gld`; its folder is made here, complete and small, and loses one thing at a time.
"""

import csv
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from landmark import graph, preflight
from landmark.parts import needs
from landmark.parts.core import ParameterError, write_text
from landmark.parts.data.layout import image_paths, read_ids
from landmark.parts.nets import backbones

ROOT = Path(__file__).resolve().parent.parent


def table(path, head, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as f:
        csv.writer(f).writerows([head, *rows])


def complete(world):
    "Every table of the real data sets with three images, and empty files in their places."
    ids = [f"{k:016x}"[::-1] for k in (1, 2, 3)]
    for v in ("v1", "v2"):
        table(world / v / "train.csv", ("id", "url", "landmark_id"), *((i, "", 7) for i in ids))
    for name in ("index", "test"):
        table(world / "v2" / f"{name}.csv", ("id",), *((i,) for i in ids))
    table(world / "v2/train_clean.csv", ("landmark_id", "images"), (7, " ".join(ids)))
    for kind, column in (("retrieval", "images"), ("recognition", "landmarks")):
        table(world / f"v2/{kind}_solution.csv", ("id", column, "Usage"), *((i, "", "Ignored") for i in ids))
    for name in ("roxford5k", "rparis6k"):
        home = world / "revisited" / name
        home.mkdir(parents=True)
        gnd = [dict(bbx=[0, 0, 9, 9], easy=[0], hard=[], junk=[])]
        (home / f"gnd_{name}.pkl").write_bytes(pickle.dumps(dict(imlist=["a", "b"], qimlist=["q"], gnd=gnd)))
    benches = [f"{b}_{k}" for b in ("roxford5k", "rparis6k") for k in ("query", "index")]
    for split in ("v1_train", "v2_train", "index", "test", *benches):
        for path in map(Path, image_paths(world, split, read_ids(world, split))):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return world


@pytest.fixture
def world(tmp_path, monkeypatch):
    "A machine on which everything is there: data, weights, GPUs, memory, room."
    monkeypatch.setenv("LANDMARK_DATA", str(tmp_path))
    monkeypatch.setenv("LANDMARK_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(preflight, "project_root", lambda: tmp_path)
    monkeypatch.setattr(backbones, "pretrained_out_of_reach", lambda name, sha256="": "")
    monkeypatch.setattr(needs, "gpus_here", lambda: (1, ""))
    monkeypatch.setattr(preflight, "machine_memory", lambda: 2**40)
    monkeypatch.setattr(preflight, "free_disk", lambda folder: 2**50)
    weights = tmp_path / "data/weights/fishnet150.pth"
    weights.parent.mkdir(parents=True)
    weights.touch()
    return complete(tmp_path / "gld")


def steps(**given):
    "The plan, its world checked already: nothing more will be fetched."
    plan = graph.plan("gld", given=given)
    write_text(plan[0].stamp, "")
    return plan


def test_a_complete_machine_is_told_nothing(world):
    for begin in ("v1", "official", "imagenet"):
        assert preflight.in_words(preflight.look_ahead(steps(begin=begin))) == ""


LOST = {  # what is removed → the step that would have missed it, what is said
    "v1/train.csv": ("train/", "split v1_train"),
    "v2/train": ("verify/", "split v2_train: of its first 3 images none is there"),
    "v2/index.csv": ("extract/losses", "split index"),
    "v2/test.csv": ("extract/losses", "split test"),
    "revisited/roxford5k": ("extract/losses", "split roxford5k_query"),
    "revisited/rparis6k/jpg": ("extract/losses", "split rparis6k_index: of its first 2 images none is there"),
    "v2/retrieval_solution.csv": ("rerank/losses", "retrieval_solution.csv is not there"),
    "v2/recognition_solution.csv": ("recognize/ensemble", "recognition_solution.csv is not there"),
}


@pytest.mark.parametrize("lost", LOST)
def test_what_the_world_lacks_is_named_with_its_step(world, lost):
    gone = world / lost
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    found, (step, says) = preflight.look_ahead(steps()), LOST[lost]
    rows = found[found.missing.str.contains(says, regex=False)]
    assert len(rows) == 1 and rows.step.iloc[0].startswith(step) and rows.stops.all(), found
    assert rows.to_do.str.contains("world: gld|BEGIN=official").all()
    assert len(found) == 1 + lost.startswith("revisited"), (
        "a benchmark has queries and index, the others one thing"
    )


def test_the_published_list_is_asked_for_only_where_it_is_read(world):
    (world / "v2/train_clean.csv").unlink()
    assert not len(preflight.look_ahead(steps()))
    found = preflight.look_ahead(steps(begin="official"))
    assert (
        found.step.str.startswith("train/").all() and "train_clean.csv is not there" in found.missing.iloc[0]
    )


def test_without_v1_nothing_of_it_is_missed(world):
    shutil.rmtree(world / "v1")
    assert preflight.look_ahead(steps()).missing.str.contains("v1_train").sum() == 1
    for begin in ("official", "imagenet"):
        assert not len(preflight.look_ahead(steps(begin=begin)))


def test_a_file_of_weights(world, tmp_path):
    weights = tmp_path / "data/weights/fishnet150.pth"
    weights.unlink()
    (row,) = preflight.look_ahead(steps()).itertuples()
    assert (
        row.step.startswith("train/fishnet150") and "fishnet150.pth is not there" in row.missing and row.stops
    )
    weights.write_bytes(b"another")
    step = next(s for s in steps() if s.name.startswith("fishnet150_v1"))
    pinned = replace(step, cfg=replace(step.cfg, sha256="00ff"))
    (lack,) = preflight.lacking_weights(pinned)
    assert "pinned is 00ff" in lack.what


def test_weights_out_of_reach_are_a_warning(world, monkeypatch, capfd):
    monkeypatch.setattr(backbones, "pretrained_out_of_reach", lambda name, sha256="": "huggingface.co")
    found = preflight.look_ahead(steps())
    assert (
        len(found) == 2
        and not found.stops.any()
        and found.missing.str.contains("no way to huggingface.co").all()
    )
    preflight.check(steps())
    assert "resnet101.tv_in1k are not on this machine" in capfd.readouterr().err


def test_local_features_that_others_trained(world, monkeypatch):
    monkeypatch.setattr(preflight, "wheel_out_of_reach", lambda name: "the package index")
    step = next(s for s in steps() if s.stage == "recognize")
    for kind, n in (("xfeat", 1), ("rootsift", 0)):
        other = replace(step, cfg=replace(step.cfg, kind=kind, delf="", verified=""))
        assert len(preflight.lacking_weights(other)) == n


def test_gpus(world, monkeypatch):
    monkeypatch.setattr(needs, "gpus_here", lambda: (0, "PyTorch needs NVIDIA's driver 580.65.06 or newer"))
    (row,) = preflight.look_ahead(steps()).itertuples()
    assert "driver 580.65.06 or newer" in row.missing and row.stops and "more" in row.step
    assert not len(preflight.look_ahead(steps(), here=False)), "on a cluster other machines have the GPUs"
    assert not len(preflight.look_ahead(steps(device="cpu")))


def test_more_gpus_than_there_are(world):
    step = next(s for s in steps() if s.stage == "extract")
    many = replace(step, cfg=replace(step.cfg, devices=8))
    (row,) = preflight.look_ahead([many]).itertuples()
    assert "8 GPUs" in row.missing and "shows 1" in row.missing and "1 or less" in row.to_do


def test_disk_and_memory_are_asked_for_the_published_sizes(world, monkeypatch):
    shutil.rmtree(world)
    monkeypatch.setattr(preflight, "machine_memory", lambda: 52 * 10**9)
    monkeypatch.setattr(preflight, "free_disk", lambda folder: 100 * 10**9)
    found = preflight.look_ahead(graph.plan("gld", given=dict(begin="imagenet")))
    (disk,) = found[found.missing.str.startswith("room on the disk")].itertuples()
    assert "100 GB are free" in disk.missing and disk.step == "verify/main"  # its local features
    (memory,) = found[found.missing.str.contains("of memory")].itertuples()
    assert memory.step == "rerank/ensemble_memory" and "this machine has 52 GB" in memory.missing


def test_of_a_part_nobody_knows_how_large_it_will_be(world, monkeypatch):
    "Two tars are not the whole: nothing is refused for the size of all."
    shutil.rmtree(world)
    monkeypatch.setattr(preflight, "machine_memory", lambda: 10**10)
    monkeypatch.setattr(preflight, "free_disk", lambda folder: 10**9)
    plan = graph.plan("gld", given=dict(begin="official"))
    plan[0].cfg = replace(plan[0].cfg, n_tars=2)
    found = preflight.look_ahead(plan)
    assert not found.missing.str.contains("room on the disk|of memory").any()
    plan[0].cfg = replace(plan[0].cfg, n_tars=0)
    assert preflight.look_ahead(plan).missing.str.contains("room on the disk").any()


def test_an_empty_folder_lists_all_at_once(world, tmp_path, monkeypatch):
    "Nothing is there, nothing will be fetched: every split, table, weight and GPU stands in one table."
    shutil.rmtree(world)
    world.mkdir()
    shutil.rmtree(tmp_path / "data")
    monkeypatch.setattr(needs, "gpus_here", lambda: (0, "there is none"))
    monkeypatch.setattr(backbones, "pretrained_out_of_reach", lambda name, sha256="": "huggingface.co")
    said = preflight.in_words(preflight.look_ahead(steps()))
    benches = [f"split {b}_{k}" for b in ("roxford5k", "rparis6k") for k in ("query", "index")]
    splits = [f"split {s}" for s in ("v1_train", "v2_train", "index", "test")]
    for what in (
        *splits,
        *benches,
        "retrieval_solution",
        "recognition_solution",
        "fishnet150.pth",
        "a CUDA GPU",
    ):
        assert what in said
    with pytest.raises(ParameterError, match="nothing was begun, for this would be missed"):
        preflight.check(steps())


def test_what_a_step_will_fetch_is_not_missed(world):
    shutil.rmtree(world)
    found = preflight.look_ahead(graph.plan("gld", given=dict(begin="official")))
    (row,) = found.itertuples()
    assert row.step == "data/main" and "not there yet" in row.missing and not row.stops
    found = preflight.look_ahead(graph.plan("gld"))
    assert found[found.stops.astype(bool)].missing.str.contains("v1_train").tolist() == [True], (
        "v1 is not fetched"
    )


@pytest.mark.parametrize("profile", ["tiny", "mini"])
def test_drawn_profiles_stay_silent(profile, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("LANDMARK_RUNS", str(tmp_path))
    preflight.check(graph.plan(profile))
    assert capfd.readouterr().err == ""


def test_what_is_done_is_asked_nothing(world):
    shutil.rmtree(world)
    plan = steps()
    for step in plan:
        write_text(step.stamp, "")
    assert not len(preflight.look_ahead(plan))


def test_the_command_says_it_and_ends_badly(world, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["landmark_graph", "check", "gld"])
    (world / "v2/index.csv").unlink()
    check = graph.plan("gld")[0]
    write_text(check.dir / "manifest.json", "{}")
    write_text(check.stamp, "")
    with pytest.raises(SystemExit, match="split index: .*index.csv is not there") as e:
        graph.main()
    assert "Traceback" not in str(e.value)
    shutil.rmtree(world)
    complete(world)
    graph.main()
    assert "nothing will be missed" in capsys.readouterr().out


def test_a_cluster_is_not_this_machine(world, monkeypatch, capsys):
    "Its GPUs are its own; weights that its machines will ask for are fetched here."
    asked = []
    monkeypatch.setattr(backbones, "pretrained_file", lambda name, sha256: asked.append(name))
    monkeypatch.setattr(preflight, "lacking_gpus", lambda *_: [needs.Lack("a GPU", "take one")])
    monkeypatch.setattr(sys, "argv", ["landmark_graph", "check", "gld", "--cluster"])
    graph.main()
    assert "nothing will be missed" in capsys.readouterr().out
    assert asked == ["legacy_seresnext101_32x4d", "resnet101.tv_in1k"]
    monkeypatch.setattr(sys, "argv", ["landmark_graph", "check", "gld"])
    with pytest.raises(SystemExit, match="a GPU"):
        graph.main()


def test_what_a_killed_step_has_written_is_not_asked_for_again(world):
    "A file of a shard, which has a second name in the whole, is room that is taken already, once."
    step = next(s for s in steps() if s.stage == "verify")
    whole = preflight.leaves_and_holds(step, {}, set())[0]
    assert whole > 100
    shard = step.dir.with_name(f"{step.name}.shard0of8-01234567") / "local/00000/xy.npy"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(bytes(100))
    os.makedirs(step.dir)
    os.link(shard, step.dir / "xy.npy")
    assert preflight.leaves_and_holds(step, {}, set())[0] == whole - 100


def test_an_ensemble_is_joined_once(monkeypatch, tmp_path):
    "Re-ranking with and without memory, and recognition, read the one that the first of them wrote."
    monkeypatch.setenv("LANDMARK_DATA", str(tmp_path))
    plan, joined = graph.plan("gld"), set()
    steps = [s for s in plan if s.name.startswith("ensemble") and s.stage in ("rerank", "recognize")]
    once = [preflight.leaves_and_holds(s, {}, joined)[0] for s in steps]
    alone = [preflight.leaves_and_holds(s, {}, set())[0] for s in steps]
    assert len(steps) == 3 and once[0] == alone[0] and all(b - a > 30e9 for a, b in zip(once[1:], alone[1:]))


def test_a_run_begins_nothing(tmp_path):
    "Through Snakemake: a sentence, no step, and a name that nobody left open is refused, too."
    env = {**os.environ, "LANDMARK_DATA": str(tmp_path), "LANDMARK_RUNS": str(tmp_path / "runs")}
    run = [
        sys.executable,
        "-m",
        "snakemake",
        "--cores",
        "1",
        "--nolock",
        "--directory",
        str(ROOT),
        "--config",
    ]
    how = dict(cwd=ROOT, env=env | dict(PYTHONPATH=str(ROOT)), capture_output=True, text=True)
    p = subprocess.run([*run, "profile=gld", "begin=v1", "device=cpu"], **how)
    said = p.stdout + p.stderr
    assert p.returncode and "nothing was begun, for this would be missed" in said and "v1/train.csv" in said
    assert "Traceback" not in said and not list(tmp_path.glob("runs/gld/seed1/notebooks/*"))
    p = subprocess.run([*run, "profile=gld", "begn=official"], **how)
    assert (
        p.returncode and "begn cannot be given: params/gld leaves open begin, device" in p.stdout + p.stderr
    )
