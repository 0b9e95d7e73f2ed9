"What a run costs: the whole is the sum of its parts, and what is known replaces what is assumed."

import json
import shutil
import sys
from dataclasses import replace

import pytest

from landmark import cost, graph
from landmark.parts.bench.rates import rates_dir
from landmark.parts.core import ParameterError
from landmark.parts.data.worlds import make_world
from landmark.parts.images.batching import size_table


@pytest.fixture(scope="module")
def gld():
    return graph.plan("gld", [1])


@pytest.fixture(scope="module")
def estimated(gld):
    return cost.estimate(gld, gpus=8)


def in_world(profile, world):
    "The steps of a profile, all in one world."
    steps = graph.plan(profile, [1])
    for s in steps:
        if s.stage != "tables":
            s.cfg = replace(s.cfg, world=str(world))
    return steps


def test_every_step_has_a_line_and_the_whole_is_the_sum(gld, estimated):
    named = {(s.stage, s.name) for s in gld}
    assert set(zip(estimated.work.stage, estimated.work.step)) == named
    assert set(zip(estimated.steps.stage, estimated.steps.step)) == named
    by_step = estimated.work.groupby(["stage", "step"]).hours.sum()
    for row in estimated.steps.itertuples():
        assert by_step[row.stage, row.step] == pytest.approx(row.hours)
    *stages, whole = cost.by_stage(estimated.steps).itertuples()
    for column in ("steps", "gpu_hours", "hours", "disk_gb"):
        parts = [getattr(s, column) for s in stages]
        assert getattr(whole, column) == pytest.approx(sum(parts)), column
    assert whole.hours == pytest.approx(estimated.steps.hours.sum())


def test_loaders_share_the_cores_that_there_are(gld, estimated):
    "Where loading decides, twelve loaders on two cores load as two."
    few = cost.estimate(gld, gpus=8, cores=2)
    loads = estimated.work.source.str.startswith("loading decides") & (
        estimated.work.what != "attention of DELF"
    )
    twelve = loads & estimated.work.stage.isin(["train", "extract"])
    assert twelve.sum() > 5
    assert (few.work.hours[twelve] / estimated.work.hours[twelve]).tolist() == pytest.approx(
        [6] * twelve.sum()
    )


def test_a_network_without_a_head_describes_by_all_its_channels():
    "Begun from ImageNet, cleaning compares 2,048 numbers of a photo, and says so of disk and search."
    steps = {f"{s.stage}/{s.name}": s for s in graph.plan("gld", given=dict(begin="imagenet"))}
    (model,) = cost.models_of(steps["extract/clean_source"])
    assert model.dim == 2048
    found = cost.needs_of_step(steps["verify/main"])
    search = next(w.amount for w in found.work if w.kind == "search")
    assert search == pytest.approx(2 * 4_132_914**2 * 2048 / 1e12)


def test_photos_that_stay_in_memory_are_counted(gld):
    step = next(s for s in gld if s.stage == "extract")
    kept, read = (
        cost.needs_of_step(replace(step, cfg=replace(step.cfg, n_loaders=0, in_memory=m))).memory
        for m in (True, False)
    )
    w, h = size_table(step.cfg.sizes)[1][1]
    assert kept - read == 3 * w * h * step.cfg.shard_size


def test_every_line_says_where_its_rate_comes_from(estimated):
    how = estimated.work.source.str.replace("loading decides; ", "").str.partition(":")[0]
    known = ("published", "computed", "assumed", "measured on a core of cpu", "not measured, not counted")
    assert set(how) <= set(known)


def test_wall_hours_lie_between_the_longest_chain_and_one_gpu(gld, estimated):
    one = cost.estimate(gld, gpus=1)
    chain = sum(h for h, _ in estimated.longest)
    assert max(chain, estimated.steps.gpu_hours.sum() / 8) <= estimated.wall + 1e-9
    assert estimated.wall <= one.wall
    assert one.steps.gpu_hours.sum() <= one.wall <= one.steps.hours.sum() + 1e-9


def test_a_step_with_more_gpus_holds_more_and_takes_less(gld):
    step = next(s for s in gld if s.stage == "extract")
    one, four = (cost.estimate(_alone(step, n)).steps.iloc[-1] for n in (1, 4))
    assert (one.gpus, four.gpus) == (1, 4)
    assert four.hours < 0.3 * one.hours and four.gpu_hours == pytest.approx(one.gpu_hours, rel=0.05)


def _alone(step, devices):
    "A step with what it reads, on so many GPUs."
    return [*step.upstream, replace(step, cfg=replace(step.cfg, devices=devices, n_shards=1))]


def test_tables_of_a_world_replace_published_sizes(gld, estimated):
    world = make_world("tiny")
    step = next(s for s in gld if s.stage == "train" and s.cfg.train_set == "v1")
    drawn = replace(step, cfg=replace(step.cfg, world=str(world)))
    small = cost.estimate([drawn], gpus=8)
    n = len((world / "v1" / "train.csv").read_text().splitlines()) - 1
    sizes = small.sizes.set_index("set")
    assert sizes.images["v1_train"] == n and sizes.source["v1_train"] == world.name
    assert estimated.sizes.set_index("set").images["v1_train"] == 1_225_029
    (whole,) = estimated.steps.hours[estimated.steps.step == step.name]
    assert small.steps.hours.sum() < 0.01 * whole


def test_a_measured_rate_replaces_an_assumed_one(gld, estimated, tmp_path):
    for p in rates_dir().glob("*"):
        shutil.copyfile(p, tmp_path / p.name)
    row = dict(
        name="verify/batches", size="99,840 pairs, 1000 × 40-d", ours_s=1 / 400_000, plain_s=1.0, threads=1
    )
    (tmp_path / "nvidia-h100.jsonl").write_text(json.dumps(row | dict(device="NVIDIA H100 80GB HBM3")) + "\n")
    now = cost.estimate(gld, gpus=8, home=tmp_path).work
    verified = [w[(w.stage == "verify") & w.unit.eq("pairs")].iloc[-1] for w in (now, estimated.work)]
    assert verified[0].source.startswith("measured on NVIDIA H100 80GB HBM3: verify/batches")
    assert verified[1].source.startswith("computed")
    shards = next(s.cfg.n_shards for s in gld if s.stage == "verify" and s.name == "main")
    assert verified[0].hours == pytest.approx(verified[0].amount / 400_000 / 3600 / shards)
    another = cost.estimate(gld, gpus=8, gpu="a100", home=tmp_path).work
    assert not another.source.str.contains("H100").any(), "measured on another GPU"


def test_a_drawn_world_on_a_cpu():
    "Every kind of step has a rate there, too."
    e = cost.estimate(in_world("tiny", make_world("tiny")), gpus=0)
    assert e.steps.gpus.sum() == 0 and e.steps.hours.gt(0).all()
    assert e.wall == pytest.approx(e.steps.hours.sum()), "one after another"


def says(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["landmark_graph", "cost", *words])
    with pytest.raises(SystemExit) as stopped:
        graph.main()
    return str(stopped.value)


def test_what_is_wrong_is_a_sentence(monkeypatch, capsys):
    assert "there is no profile 'glt'" in says(monkeypatch, "glt")
    assert "no rates are known for a GPU called 'voodoo2'" in says(monkeypatch, "gld", "--gpu", "voodoo2")
    assert "gpus is -1" in says(monkeypatch, "gld", "--gpus", "-1")
    assert "so it needs a GPU" in says(monkeypatch, "gld", "--gpus", "0")
    assert "there are no tables of the world" in says(monkeypatch, "midi")
    assert (
        says(monkeypatch, "gld", "--gpus", "many") == "2"
        and "invalid int value: 'many'" in capsys.readouterr().err
    )


def test_the_command_prints_the_whole(gld, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["landmark_graph", "cost", "gld", "--gpus", "8"])
    graph.main()
    said = capsys.readouterr().out
    for words in ("Estimates:", "the longest chain", "on 1 H100:", "on 8 H100:", gld[-1].name, "published"):
        assert words in said
    with pytest.raises(ParameterError, match="cores is 0"):
        cost.estimate(gld, cores=0)
