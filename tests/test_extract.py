"""Extraction: shards, machines, kills, unreadable images."""

import json
import os
import sys
import time
from pathlib import Path

import matplotlib.pyplot
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from test_train import folder_world

from landmark import extract
from landmark.parts.core import ParameterError, parallel_map, write_json
from landmark.parts.data.layout import image_paths, read_boxes, read_ids
from landmark.parts.data.worlds import make_world
from landmark.parts.descriptors import inputs
from landmark.parts.descriptors.extraction import describe_scales
from landmark.parts.descriptors.store import open_store
from landmark.parts.images import batching
from landmark.parts.images.augment import change
from landmark.parts.images.loading import Crops
from landmark.parts.images.reading import image_path
from landmark.parts.nets.backbones import make_model
from landmark.parts.nets.checkpoints import load_model, save_model


def untrained(folder):
    save_model(folder, make_model("test_resnet", d=8), dict(backbone="test_resnet", pooling="gem", dim=8))


@pytest.fixture
def setting(tmp_path, monkeypatch):
    "A folder world of 12 photos and a finished artifact with two untrained models."
    monkeypatch.setenv("LANDMARK_RUNS", str(tmp_path / "runs"))
    world = folder_world(tmp_path / "world", n=12)
    models = tmp_path / "models"
    for name in ("a_v1", "b_v1"):
        untrained(models / name)
    (models / "manifest.json").write_text('{"outputs": {}}')
    return world, dict(
        world=str(world),
        models=str(models),
        splits=["v1_train"],
        sizes="64",
        min_side=32,
        device="cpu",
        n_workers=1,
        shard_size=5,
        dtype="float32",
    )


def test_a_killed_run_goes_on_with_the_missing_shards(setting, monkeypatch):
    world, args = setting
    cfg = extract.Config(**args)
    whole = extract.extract_shard
    made = []

    def dies(job):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(job[5])
        return whole(job)

    monkeypatch.setattr(extract, "extract_shard", dies)
    with pytest.raises(KeyboardInterrupt):
        extract.run(cfg)
    made.clear()
    monkeypatch.setattr(extract, "extract_shard", lambda job: made.append(job[5]) or whole(job))
    out = extract.run(cfg)
    assert len(made) == 4, "2 of 6 shards were there already"
    store = open_store(out / "a_v1" / "v1_train")
    assert store.shape == (12, 8)
    np.testing.assert_allclose(np.linalg.norm(store[:], axis=1), 1, rtol=1e-5)
    made.clear()
    assert extract.run(cfg) == out and not made


def test_a_run_killed_in_the_middle_of_a_shard_goes_on_there(setting, monkeypatch):
    world, args = setting
    args |= dict(shard_size=12, batch_size=2, save_every=0, in_memory=False)
    whole = extract.run(extract.Config(**args, name="whole"))
    read, original = [], Crops.__getitem__

    def dies(self, key):
        if len(read) == 7:
            raise KeyboardInterrupt
        read.append(key[1])
        return original(self, key)

    with monkeypatch.context() as m:
        m.setattr(Crops, "__getitem__", dies)
        with pytest.raises(KeyboardInterrupt):
            extract.run(extract.Config(**args, name="killed"))
    assert len(list((whole.parent).glob("killed-*/a_v1/v1_train/unfinished-00000.npz"))) == 1
    read.clear()
    with monkeypatch.context() as m:
        m.setattr(Crops, "__getitem__", lambda self, key: read.append(key[1]) or original(self, key))
        again = extract.run(extract.Config(**args, name="killed"))
    assert len(read) == 6 + 12, "of the first model half was done, in batches of two"
    for name in ("a_v1", "b_v1"):
        a, b = (open_store(d / name / "v1_train") for d in (whole, again))
        assert list(a.ids) == list(b.ids)
        np.testing.assert_array_equal(a[:], b[:])
    assert not list(again.rglob("unfinished-*"))


def test_images_stay_decoded_from_model_to_model(setting, monkeypatch):
    _, args = setting
    read, original = [], Crops.__getitem__
    monkeypatch.setattr(Crops, "__getitem__", lambda self, key: read.append(key[1]) or original(self, key))
    extract.run(extract.Config(**args, name="once"))
    assert len(read) == 12
    read.clear()
    extract.run(extract.Config(**{**args, "in_memory": False}, name="twice"))
    assert len(read) == 24


def test_models_of_the_same_name_are_called_by_their_run(setting, tmp_path):
    _, args = setting
    refs = []
    for run in ("v20c-0123abcd", "v21c-4567abcd", "v24c-89ababcd"):
        folder = tmp_path / run
        refs.append(str(folder))
        name = "cosface_v1" if run.startswith("v24c") else "arcface_v1"
        untrained(folder / name)
        (folder / "manifest.json").write_text('{"outputs": {}}')
    out = extract.run(extract.Config(**{**args, "models": refs}, name="six"))
    assert pd.read_csv(out / "stores.csv").model.tolist() == ["v20c", "v21c", "cosface_v1"]
    with pytest.raises(ParameterError, match="two of `models` hold a model called v20c"):
        extract.find_models(extract.Config(**{**args, "models": refs[:1] * 2}))


def test_no_header_is_read_before_its_shard(setting, monkeypatch):
    _, args = setting
    asked, original = [], inputs.scan_sizes
    monkeypatch.setattr(
        inputs, "scan_sizes", lambda paths, cache_dir: asked.append(len(paths)) or original(paths, cache_dir)
    )
    extract.run(extract.Config(**args, name="lazy"))
    assert max(asked) == 5 and sum(asked) == 12


def test_a_header_is_read_once_for_all_models_and_processes(setting, monkeypatch):
    _, args = setting
    read, original = [], batching.image_size
    args |= dict(in_memory=False, save_every=0)
    monkeypatch.setattr(batching, "image_size", lambda path: read.append(path) or original(path))
    one = extract.run(extract.Config(**args, name="one"))
    assert len(read) == len(set(read)) == 12, "two models"
    other = extract.run(extract.Config(**args, name="other"))
    assert len(read) == 12, "another process would find them, too"
    np.testing.assert_array_equal(*(open_store(d / "b_v1" / "v1_train")[:] for d in (one, other)))


def test_the_next_headers_are_read_while_the_network_is_at_work(setting, monkeypatch):
    _, args = setting
    read, original, describe = [], batching.image_size, extract.describe
    monkeypatch.setattr(batching, "image_size", lambda path: read.append(path) or original(path))

    def waits(*a, **k):
        until = time.time() + 20
        while len(read) < 10 and time.time() < until:
            time.sleep(0.01)
        assert len(read) >= 10, "the second shard is not looked at"
        return describe(*a, **k)

    monkeypatch.setattr(extract, "describe", waits)
    extract.run(extract.Config(**{**args, "in_memory": False}, name="ahead"))
    assert len(read) == len(set(read)) == 12


def test_loaders_stay_for_the_next_model(setting, monkeypatch):
    "Two models on two shards: loaders start twice, and end with the run."
    _, args = setting
    args |= dict(in_memory=False, shard_size=6, batch_size=2)
    made, original = [], inputs.make_loader
    alone = extract.run(extract.Config(**args, name="alone"))
    monkeypatch.setattr(inputs, "make_loader", lambda *a, **k: made.append(original(*a, **k)) or made[-1])
    out = extract.run(extract.Config(**args, n_loaders=1, name="loaders"))
    assert len(made) == 2 and all(m.persistent_workers for m in made) and not inputs._loaders
    for name in ("a_v1", "b_v1"):
        np.testing.assert_array_equal(*(open_store(d / name / "v1_train")[:] for d in (alone, out)))


def size_of(w, h, bench):
    "Width and height of the network input at scale 1: the longest side, or the size of the group."
    if bench:
        f = min(1, 192 / max(w, h))
        return round(w * f), round(h * f)
    if h / w < 0.77:
        return 192, 144
    return (160, 160) if h / w < 1.33 else (144, 192)


@pytest.mark.parametrize("split", ["index", "rnorth_index", "rnorth_query"])
def test_the_protocol_written_out_plainly_describes_alike(setting, split):
    "Photo by photo: crop, resize to the group or the longest side, three scales, mean, one normalisation."
    world, bench = make_world("tiny", 1), split != "index"
    sizes = dict(sizes="192", bench_side=192, min_side=48, shard_size=7)
    chosen = dict(world="tiny", splits=[split], select=["a_v1"])
    out = extract.run(extract.Config(**(setting[1] | chosen | sizes), name="plain"))
    store, model = open_store(out / "a_v1" / split), load_model(Path(setting[1]["models"]) / "a_v1", "cpu")
    ids, boxes = read_ids(world, split), read_boxes(world, split)
    assert list(store.ids) == list(ids) and (boxes is not None) == (split == "rnorth_query")
    least, scales = (16, (0.5**0.5, 1, 2**0.5)) if bench else (48, (0.75, 1, 1.25))
    for i, path in enumerate(image_paths(world, split, ids)):
        im = Image.open(path).convert("RGB")
        if boxes is not None:
            im = im.crop([round(v) for v in boxes[i]])
        size = size_of(*im.size, bench)
        x = torch.from_numpy(change(np.array(im), size).transpose(2, 0, 1).copy())[None].float()
        y = 0
        for scale in scales:
            sides = [max(least, int(v * scale // 16) * 16) for v in size[::-1]]
            scaled = torch.nn.functional.interpolate(x, sides, mode="bilinear", align_corners=True)
            with torch.no_grad():
                y = y + model(scaled)[0].numpy()
        np.testing.assert_allclose(store[i], y / np.linalg.norm(y), atol=5e-6, err_msg=str(path))


@pytest.mark.parametrize("backbone", ["test_resnet", "resnet10t", "mobilenetv3_small_050"])
def test_bfloat16_describes_as_float32_does(backbone):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = make_model(backbone, d=32).eval()
    images = torch.randint(256, (4, 3, 64, 96), dtype=torch.uint8)
    full, half = (describe_scales(model, images, (0.75, 1, 1.25), 16, 48, p) for p in ("fp32", "bf16"))
    assert (full * half).sum(1).min() > 0.999 and not torch.equal(full, half)


def test_several_machines_make_the_same_store(setting):
    _, args = setting
    one = extract.run(extract.Config(**args, name="one"))
    first = extract.run(extract.Config(**args, name="two", shard=1, n_shards=2))
    assert not (first / "manifest.json").exists()
    both = extract.run(extract.Config(**args, name="two", shard=0, n_shards=2))
    assert (both / "manifest.json").exists()
    for name in ("a_v1", "b_v1"):
        a, b = (open_store(d / name / "v1_train") for d in (one, both))
        assert list(a.ids) == list(b.ids)
        np.testing.assert_array_equal(a[:], b[:])


@pytest.mark.parametrize("stage,args", [("04_extract", dict(shard_size=16)), ("01_verify", dict())])
def test_a_notebook_ends_well_on_every_machine(stage, args, tmp_path, monkeypatch):
    "The cells below the seam, on the first machine (which leaves work, or has no pair) and on the last."
    monkeypatch.setenv("LANDMARK_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = json.loads((Path(__file__).parents[1] / "nbs" / f"{stage}.ipynb").read_text())["cells"]
    code = [("".join(c["source"]), c["metadata"].get("tags")) for c in cells if c["cell_type"] == "code"]
    seam = next(i for i, (_, tags) in enumerate(code) if tags)
    for shard in (0, 1):
        ns = {"__name__": "notebook"}
        for text, _ in [
            *[c for c in code[: seam - 1] if "import" in c[0] and "def " not in c[0]],
            *code[seam - 1 : seam + 1],
        ]:
            exec(text, ns)
        ns.update(args, world="tiny", n_shards=2, shard=shard)
        for text, _ in code[seam + 1 :]:
            exec(text, ns)
        assert stage == "01_verify" or bool(ns["left"]) == (shard == 0)
        matplotlib.pyplot.close("all")


def test_the_command_says_what_other_machines_have_left(setting, monkeypatch, capsys):
    _, args = setting
    args |= dict(n_shards=2)

    def command(shard):
        given = args | dict(shard=shard)
        typed = {k: v if isinstance(v, str) else json.dumps(v) for k, v in given.items()}
        options = [x for k, v in typed.items() for x in ("-p", k, v)]
        monkeypatch.setattr(sys, "argv", ["landmark_extract", *options])
        extract.main()
        return capsys.readouterr().out.strip()

    first = command(0)
    assert first.startswith("unfinished: 3 shards left; ") and not Path(first).exists()
    last = Path(command(1))
    assert (last / "manifest.json").exists() and first.endswith(str(last)) and command(0) == str(last)


def test_two_processes_make_the_same_bytes(setting, monkeypatch):
    "The pool is real: this process may not describe anything, and its changes do not reach the others."
    _, args = setting
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the pool: the number of threads moves the last digits
    one = extract.run(extract.Config(**args, name="one"))
    torch.set_num_threads(threads)

    def here(*a, **k):
        raise AssertionError("described in this process")

    monkeypatch.setattr(extract, "describe", here)
    monkeypatch.setattr(extract, "MANY", 0)
    two = extract.run(extract.Config(**{**args, "n_workers": 2}, name="two"))
    kept = [p for p in one.rglob("*") if p.suffix in (".npy", ".csv") or p.name == "card.json"]
    files = sorted(p.relative_to(one) for p in kept)
    assert len(files) == 2 * (3 * 3 + 1) + 2
    for f in files:
        assert (two / f).read_bytes() == (one / f).read_bytes(), f


def gpu_of_this_worker(folder):
    (folder / str(os.getpid())).touch()
    while len(list(folder.iterdir())) < 2:
        time.sleep(0.01)  # until both are at work
    return extract.device_of("cuda", 2)


def test_workers_of_a_pool_take_different_gpus(tmp_path):
    assert sorted(parallel_map(gpu_of_this_worker, [tmp_path] * 2, 2)) == ["cuda:0", "cuda:1"]


def test_a_model_trained_again_in_its_folder_is_loaded_again(setting):
    "A kernel outlives a training: the old weights must not describe under the name of the new ones."
    _, args = setting
    cfg = extract.Config(**args, name="again")
    models = Path(args["models"])
    old = open_store(extract.run(cfg) / "a_v1" / "v1_train")[:]
    untrained(models / "a_v1")
    write_json(models / "manifest.json", dict(outputs={"a_v1/weights.safetensors": dict(size=1)}))
    new = open_store(extract.run(cfg) / "a_v1" / "v1_train")[:]
    fresh = open_store(extract.run(extract.Config(**args, name="fresh")) / "a_v1" / "v1_train")[:]
    assert not np.array_equal(old, new)
    np.testing.assert_array_equal(new, fresh)


def test_unreadable_images_of_all_shards_count_together(setting, monkeypatch):
    world, args = setting
    ids = pd.read_csv(world / "v1" / "train.csv", dtype=str).id
    for i in (0, 6):
        image_path(world / "v1" / "train", ids[i]).write_bytes(b"")
    with pytest.raises(ValueError, match="2 of 12 images of v1_train cannot be read"):
        extract.run(extract.Config(**args, name="stops"))
    runs = Path(os.environ["LANDMARK_RUNS"])
    made = sorted(p.name for p in runs.glob("*/*/extract/stops-*/a_v1/v1_train/0000?.npy"))
    assert made == ["00000.npy"], "the second shard is one too many"
    made, original = [], extract.extract_shard
    monkeypatch.setattr(extract, "extract_shard", lambda job: made.append(job[5]) or original(job))
    out = extract.run(extract.Config(**args, max_bad=0.2, name="stops"))
    assert ids[0] == "0" * 16 and made == [1, 1, 2, 2], "what was finished stays"
    assert pd.read_csv(out / "unreadable.csv", dtype=str).image_id.tolist() == [ids[0], ids[6]]


def test_unreadable_images_are_listed_and_bounded(setting):
    world, args = setting
    ids = pd.read_csv(world / "v1" / "train.csv", dtype=str).id
    image_path(world / "v1" / "train", ids[3]).write_bytes(b"no picture")
    out = extract.run(extract.Config(**args))
    wrong = pd.read_csv(out / "unreadable.csv", dtype=str)
    assert wrong.image_id.tolist() == [ids[3]] and "not an image" in wrong.reason[0]
    assert len(open_store(out / "a_v1" / "v1_train")) == 11
    image_path(world / "v1" / "train", ids[4]).unlink()
    with pytest.raises(ValueError, match="2 of 12 images of v1_train cannot be read, more than `max_bad`"):
        extract.run(extract.Config(**args, name="more"))


@pytest.mark.parametrize(
    "change,says",
    [
        (dict(splits=["indexx"]), "there is no split 'indexx'"),
        (dict(select=["c_v1"]), "`select` names c_v1, but there are a_v1, b_v1"),
        (dict(models="gone"), "gone is not there"),
        (dict(models=""), "an upstream artifact is missing"),
        (dict(shard=2, n_shards=2), "it counts from 0"),
        (dict(device="cuda:99"), "device cuda:99 was asked for"),
    ],
)
def test_wrong_parameters_stop_at_once(setting, change, says):
    _, args = setting
    with pytest.raises(ParameterError, match=says):
        extract.run(extract.Config(**{**args, **change}))


def test_the_full_profile_ranks_with_the_ensemble_of_six():
    "Every stage of `gld` that reads descriptors has the six models and the weights of the paper's table."
    from landmark.graph import read_profile

    files = read_profile("gld")
    weights = dict(v19c=0.5, v20c=1, v21c=1, v22c=0.5, v23c=1, v24c=1)
    assert files["extract", "ensemble"]["models"] == [f"@train/{m}" for m in weights]
    for stage in ("rerank", "recognize"):
        assert dict(zip(files[stage, "ensemble"]["models"], files[stage, "ensemble"]["weights"])) == weights
