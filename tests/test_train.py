"""Training: killed and continued, bad input, one process against two."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from landmark import train
from landmark.parts.core import ParameterError
from landmark.parts.images.reading import image_path
from landmark.parts.training.engine import Trainer, Training, TrainingError

SMALL = dict(
    backbone="test_resnet",
    dim=8,
    sizes="64",
    epochs=2,
    batch_size=4,
    log_every=1,
    checkpoint_every=2,
    device="cpu",
    n_workers=1,
    n_negatives=1,
)


def folder_world(world, n=24, n_labels=3):
    "Noise photos of a few labels, laid like the Google Landmarks sets."
    rng, rows = np.random.default_rng(0), []
    for i in range(n):
        image_id, label = f"{i * 7919:016x}", 10 + i % n_labels
        path = image_path(world / "v1" / "train", image_id[::-1])
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(
            str(path),
            cv2.resize(rng.integers(0, 255, (6, 8, 3), np.uint8), (80, 60)) // 2 + 40 * (i % n_labels),
        )
        rows.append((image_id[::-1], "http://", label))
    pd.DataFrame(rows, columns=["id", "url", "landmark_id"]).to_csv(world / "v1" / "train.csv", index=False)
    return world


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setenv("LANDMARK_RUNS", str(tmp_path / "runs"))
    return folder_world(tmp_path / "world")


def weights(out, name):
    return load_file(out / name / "weights.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.mark.parametrize("loss", ["arcface", "contrastive"])
def test_killed_and_continued_ends_with_the_same_weights(world, loss, monkeypatch):
    cfg = train.Config(world=str(world), loss=loss, name="whole", **SMALL)
    whole = train.run(cfg)

    class Killed(BaseException):
        pass

    class Dies(train.Watch):
        def __call__(self, rows, rate):
            if rows[-1]["step"] == 11:
                raise Killed

    with monkeypatch.context() as m:
        m.setattr(train, "Watch", Dies)
        with pytest.raises(Killed):
            train.run(train.Config(world=str(world), loss=loss, name="killed", **SMALL))
    state = torch.load(
        next((Path(os.environ["LANDMARK_RUNS"])).rglob("killed-*/.state/*/last.pt")), weights_only=True
    )
    assert 0 < state["step"] < 11 and state["at"] > 0, "the checkpoint lies within an epoch"
    again = train.run(train.Config(world=str(world), loss=loss, name="killed", **SMALL))
    assert same(weights(whole, f"{loss}_v1"), weights(again, f"{loss}_v1"))
    pd.testing.assert_frame_equal(
        pd.read_csv(whole / f"{loss}_v1" / "metrics.csv"), pd.read_csv(again / f"{loss}_v1" / "metrics.csv")
    )
    assert not same(
        weights(whole, f"{loss}_v1"),
        weights(
            train.run(train.Config(world=str(world), loss=loss, name="other", **{**SMALL, "lr": 1e-3})),
            f"{loss}_v1",
        ),
    )


def start(world, name, **more):
    "Training in a process of its own."
    given = dict(SMALL, world=str(world), name=name) | more
    code = f"from landmark import train; train.run(train.Config(**{given!r}))"
    root = str(Path(train.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )


def test_sigkill(world):
    "Killed by the system in the middle: the next call finishes with the same weights."
    beside = start(
        world, "whole", epochs=12
    )  # each in a process of its own: the same number of threads, whatever ran here before
    p = start(world, "killed", epochs=12)
    t = time.time()
    while (
        not (found := list(Path(os.environ["LANDMARK_RUNS"]).rglob("killed-*/.state/*/last.pt")))
        and time.time() - t < 60
    ):
        time.sleep(0.02)
    p.send_signal(signal.SIGKILL)
    p.communicate()
    assert found
    assert not list(Path(os.environ["LANDMARK_RUNS"]).rglob("killed-*/manifest.json")), (
        "it was killed before it was done"
    )
    assert start(world, "killed", epochs=12).wait() == 0 == beside.wait()
    whole, again = (
        next(Path(os.environ["LANDMARK_RUNS"]).rglob(f"{n}-*/manifest.json")).parent
        for n in ("whole", "killed")
    )
    assert same(weights(whole, "arcface_v1"), weights(again, "arcface_v1"))


@pytest.mark.parametrize("loss", ["arcface", "contrastive"])
def test_two_processes_follow_the_curve_of_one(world, loss):
    "With batch norm frozen, a batch on two processes is the batch of one."
    args = {
        **SMALL,
        "frozen_bn": True,
        "drop_uneven": True,
        "lr": 1e-3,
        "optimizer": "sgd",
        "loss": loss,
        "batch_size": 4 if loss == "arcface" else 12,
    }
    one = train.run(train.Config(world=str(world), name="one", **args))
    two = train.run(train.Config(world=str(world), name="two", **{**args, "devices": 2}))
    a, b = (pd.read_csv(d / f"{loss}_v1" / "metrics.csv") for d in (one, two))
    np.testing.assert_allclose(a.loss, b.loss, rtol=1e-4)
    np.testing.assert_allclose(a.accuracy, b.accuracy)
    for k, v in weights(one, f"{loss}_v1").items():
        torch.testing.assert_close(v, weights(two, f"{loss}_v1")[k], rtol=1e-3, atol=1e-5)


def test_two_processes_with_all_that_is_uneven(world):
    """Layers that no photo passes, accumulated batches of other lengths, a last epoch at another size,
    photos that only one process finds unreadable."""
    for i in range(4):
        (
            p := image_path(world / "v1" / "train", pd.read_csv(world / "v1" / "train.csv", dtype=str).id[i])
        ).write_bytes(p.read_bytes()[: len(p.read_bytes()) // 2])
    args = {
        **SMALL,
        "backbone": "test_convnext",
        "frozen_bn": True,
        "lr": 1e-3,
        "optimizer": "sgd",
        "batch_size": 14,
        "accumulate": 3,
        "scale_up": "96",
        "in_memory": False,
        "max_bad": 0.5,
    }
    one = train.run(train.Config(world=str(world), name="one", **args))
    two = train.run(train.Config(world=str(world), name="two", **{**args, "devices": 2}))
    a, b = (pd.read_csv(d / "arcface_v1" / "metrics.csv") for d in (one, two))
    assert a.step.tolist() == b.step.tolist()
    for k, v in weights(one, "arcface_v1").items():
        torch.testing.assert_close(v, weights(two, "arcface_v1")[k], rtol=1e-3, atol=1e-5)
    assert (
        set(pd.read_csv(one / "arcface_v1" / "unreadable.csv").path)
        == set(pd.read_csv(two / "arcface_v1" / "unreadable.csv").path)
        and len(pd.read_csv(two / "arcface_v1" / "unreadable.csv")) == 4
    )


@pytest.mark.parametrize(
    "change,says",
    [
        (dict(sizes="XXL"), r"^train: one of 2 processes failed: `sizes` is 'XXL'; allowed are SS"),
        (dict(batch_size=2), "failed: `batch_size` 2 leaves fewer than 2 photos to each of 2 processes"),
        (
            dict(loss="softmax", optimizer="sgd", lr=1e30, clip=0.0, warmup=0.0),
            r"failed: The loss of batch \d+ in epoch \d+ is (nan|inf).*\.jpg",
        ),
        (dict(train_set="v1+v2"), "^train: .* starts from arcface_v1: give the artifact"),
    ],
)
def test_what_one_of_several_processes_says(world, change, says):
    "The sentence arrives, not the line of code that said it."
    with pytest.raises((RuntimeError, ParameterError), match=says):
        train.run(train.Config(world=str(world), devices=2, **{**SMALL, **change}))


def test_a_parent_gives_its_weights_and_loses_its_classifier(world, tmp_path):
    (world / "v2").mkdir()
    (world / "v2" / "train").symlink_to(world / "v1" / "train")
    pd.read_csv(world / "v1" / "train.csv", dtype=str).assign(
        landmark_id=lambda d: [i % 5 for i in range(len(d))]
    ).to_csv(world / "v2" / "train.csv", index=False)
    v1 = train.run(train.Config(world=str(world), name="v1", **SMALL))
    still = {**SMALL, "lr": 0.0, "lr_end": 0.0, "frozen_bn": True, "weight_decay": 0.0}
    both = train.run(train.Config(world=str(world), name="both", train_set="v1+v2", parent=str(v1), **still))
    assert same(weights(v1, "arcface_v1"), weights(both, "arcface_v1+v2")), (
        "without learning it still is its parent"
    )
    card = json.loads((both / "arcface_v1+v2" / "card.json").read_text())
    assert card["result"]["classes"] == 5
    with pytest.raises(ParameterError, match="starts from cosface_v1, but .* has only arcface_v1"):
        train.run(train.Config(world=str(world), loss="cosface", train_set="v1+v2", parent=str(v1), **SMALL))
    with pytest.raises(
        ParameterError,
        match="is test_resnet with gem and 8 numbers, the parameters ask for test_resnet, gem, 16",
    ):
        train.run(train.Config(world=str(world), train_set="v1+v2", parent=str(v1), **{**SMALL, "dim": 16}))


def test_scale_up_freezes_batch_norm(world):
    out = train.run(
        train.Config(
            world=str(world), name="up", scale_up="96", **{**SMALL, "lr": 0.0, "lr_end": 0.0, "epochs": 1}
        )
    )
    plain = train.run(
        train.Config(world=str(world), name="plain", **{**SMALL, "lr": 0.0, "lr_end": 0.0, "epochs": 1})
    )
    a, b = weights(out, "arcface_v1"), weights(plain, "arcface_v1")
    assert same(a, b), "the last epoch changes no statistics"
    table = pd.read_csv(out / "arcface_v1" / "metrics.csv")
    assert table.epoch.tolist()[-1] == 1


def damage(world, k, text=b"\xff\xd8 cut"):
    for i in range(k):
        image_path(
            world / "v1" / "train", pd.read_csv(world / "v1" / "train.csv", dtype=str).id[i]
        ).write_bytes(text)


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_corrupt_photo_is_counted_and_listed(world, in_memory):
    damage(world, 1)
    out = train.run(train.Config(world=str(world), in_memory=in_memory, **SMALL))
    assert len(pd.read_csv(out / "arcface_v1" / "unreadable.csv")) == 1
    assert json.loads((out / "manifest.json").read_text())["metrics"]["arcface_v1"]["loss"] > 0


def test_a_photo_that_goes_bad_in_the_middle(world):
    "Its header can be read, so that it is met inside a batch; for tuples the whole tuple goes."
    path = image_path(world / "v1" / "train", pd.read_csv(world / "v1" / "train.csv", dtype=str).id[0])
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2])
    for loss in ("arcface", "contrastive"):
        out = train.run(train.Config(world=str(world), loss=loss, in_memory=False, name=loss, **SMALL))
        assert pd.read_csv(out / f"{loss}_v1" / "unreadable.csv").path.tolist() == [str(path)]


def test_too_many_corrupt_photos(world):
    damage(world, 5)
    with pytest.raises(TrainingError, match="5 of 24 photos cannot be read, more than `max_bad` = 0.01"):
        train.run(train.Config(world=str(world), **SMALL))


def test_a_training_that_met_too_many_corrupt_photos_goes_on_when_more_are_allowed(world, monkeypatch):
    for i in (0, 1):
        path = image_path(world / "v1" / "train", pd.read_csv(world / "v1" / "train.csv", dtype=str).id[i])
        path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2])
    steps, original = [], Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self, *a: steps.append(self.step) or original(self, *a))
    args = dict(world=str(world), **{**SMALL, "checkpoint_every": 1, "in_memory": False})
    with pytest.raises(TrainingError, match="2 of 24 photos cannot be read"):
        train.run(train.Config(**args))
    before = len(steps)
    assert before > 1
    out = train.run(train.Config(**args, max_bad=0.5))
    assert steps[before] > 0 and steps[-1] == 11, "from the last checkpoint on"
    whole = train.run(train.Config(**args, max_bad=0.5, name="whole"))
    assert out.name.split("-")[1] == whole.name.split("-")[1]
    assert (out / "arcface_v1" / "weights.safetensors").read_bytes() == (
        whole / "arcface_v1" / "weights.safetensors"
    ).read_bytes()


def test_a_loss_that_explodes_names_its_batch(world):
    with pytest.raises(
        TrainingError, match=r"The loss of batch \d+ in epoch \d+ is (nan|inf).*Its images: .*\.jpg"
    ):
        train.run(
            train.Config(
                world=str(world),
                loss="softmax",
                **{**SMALL, "optimizer": "sgd", "lr": 1e30, "clip": 0.0, "warmup": 0.0},
            )
        )


@pytest.mark.parametrize(
    "change,says",
    [
        (dict(loss="archface"), "`loss` is 'archface'; allowed are"),
        (dict(train_set="v3"), "`train_set` is 'v3'; allowed are"),
        (dict(train_set="v1+v2"), "starts from arcface_v1: give the artifact"),
        (dict(device="cuda:7"), "cuda:7 was asked for"),
        (dict(frozen_stages=2, backbone="test_vit"), "`frozen_stages` is 2, but this network's stages are"),
        (dict(frozen_stages=2, pooling="G,G,G,G,G"), "`frozen_stages` is 2, but this network's stages are"),
        (dict(frozen_stages=9), "`frozen_stages` is 9; this network has 5 stages"),
        (dict(frozen_stages=-2), "`frozen_stages` is -2; this network has 5 stages"),
    ],
)
def test_wrong_parameters_stop_at_once(world, change, says):
    before = torch.get_rng_state()
    with pytest.raises(ParameterError, match=says):
        train.run(train.Config(world=str(world), **{**SMALL, **change}))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "change,says",
    [
        (dict(sizes="XXL"), "`sizes` is 'XXL'; allowed are"),
        (dict(augment="hard"), "`augment` is 'hard'"),
        (dict(optimizer="lion"), "`optimizer` is 'lion'"),
        (dict(pooling="gemm"), "`pooling` is 'gemm'"),
        (dict(backbone="resnet1001"), "neither fishnet150 nor fishnet150_wide nor a model of timm"),
        (dict(batch_size=64, drop_uneven=True), "No batch of 64 photos can be filled from 24"),
        (dict(weights="gone.pth"), "There are no weights at gone.pth"),
        (dict(batch_size=1), "`batch_size` is 1; it must be at least 2"),
        (dict(accumulate=0), "`accumulate` is 0; it must be at least 1"),
        (dict(precision="fp8"), "`precision` is 'fp8'; allowed are"),
        (dict(precision="fp16"), "fp16, which needs a GPU"),
        (dict(sizes=[]), "`sizes` is empty"),
    ],
)
def test_other_wrong_values(world, change, says):
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        train.run(train.Config(world=str(world), **{**SMALL, **change}))


def test_a_file_of_weights_is_an_input(world, tmp_path):
    "Other weights under the same name are another model."
    from landmark.parts.nets.backbones import make_backbone

    def trained(seed):
        torch.manual_seed(seed)
        torch.save(make_backbone("test_resnet").net.state_dict(), tmp_path / "w.pth")
        return weights(
            train.run(
                train.Config(world=str(world), weights=str(tmp_path / "w.pth"), **{**SMALL, "epochs": 1})
            ),
            "arcface_v1",
        )

    assert not same(trained(0), trained(1))


def test_labels_with_one_image_and_one_label(world):
    csv = world / "v1" / "train.csv"
    df = pd.read_csv(csv, dtype=str)
    df.loc[0, "landmark_id"] = "999"
    df.to_csv(csv, index=False)
    for loss in ("arcface", "contrastive"):
        train.run(train.Config(world=str(world), loss=loss, name=loss, **SMALL))
    df.assign(landmark_id=1).to_csv(csv, index=False)
    with pytest.raises(ParameterError, match="shows 1 landmark; at least 2 are needed"):
        train.run(train.Config(world=str(world), name="single", **SMALL))


def test_evaluation_after_each_epoch(tmp_path, monkeypatch):
    "The benchmarks join the table, and the best model is kept; a run may stop before its cosine ends."
    from landmark.parts.data.worlds import make_world

    tiny = make_world("tiny", 1)
    monkeypatch.setenv("LANDMARK_RUNS", str(tmp_path / "runs"))
    args = {**SMALL, "world": str(tiny), "evaluate": True, "tensorboard": True, "batch_size": 8}
    out = train.run(train.Config(name="whole", **args))
    table = pd.read_csv(out / "arcface_v1" / "metrics.csv")
    assert (
        table["rnorth M"].notna().sum() == 2
        and (out / ".state" / "arcface_v1" / "best.pt").exists()
        and list((out / ".logs").rglob("events*"))
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(out / ".logs" / "arcface_v1")).Reload().Scalars("rnorth M")
    seen = table[table["rnorth M"].notna()]
    assert [(v.step, round(v.value, 4)) for v in shown] == list(zip(seen.step, seen["rnorth M"])), (
        "the last epoch, too"
    )
    early = train.run(train.Config(name="early", stop_after=1, **args))
    half = pd.read_csv(early / "arcface_v1" / "metrics.csv")
    pd.testing.assert_frame_equal(half, table.iloc[: len(half)])
    assert half.epoch.max() == 0


def test_benchmarks_without_images_give_no_figures(tmp_path, monkeypatch, capfd):
    "It is said before the first step; a world without benchmarks is trained all the same."
    import shutil

    from landmark.parts.data.worlds import make_world

    tiny = Path(shutil.copytree(make_world("tiny", 1), tmp_path / "world"))
    monkeypatch.setenv("LANDMARK_RUNS", str(tmp_path / "runs"))
    args = {**SMALL, "world": str(tiny), "evaluate": True, "batch_size": 8, "epochs": 1}
    shutil.rmtree(tiny / "revisited" / "rnorth" / "jpg")
    with monkeypatch.context() as m:
        m.setattr(Trainer, "train_step", lambda *_: pytest.fail("it began to train"))
        with pytest.raises(
            ParameterError,
            match=r"(\d+) of \1 images to be described cannot be read, more than .* 0.01: .*/rnorth/jpg/",
        ):
            train.run(train.Config(**args))
    shutil.rmtree(tiny / "revisited")
    out = train.run(train.Config(**args))
    assert (
        f"nothing to evaluate in {tiny}" in capfd.readouterr().err
        and not (out / "arcface_v1" / "best").exists()
        and "rnorth M" not in pd.read_csv(out / "arcface_v1" / "metrics.csv")
    )


def stripes(n=24):
    "Three kinds of stripes, and their classes."
    rng, y, x = np.random.default_rng(0), *np.mgrid[:36, :48]
    kinds = [x // 4 % 2, (x // 4 + y // 4) % 2, y // 4 % 2]
    return [
        np.clip(kinds[i % 3][..., None] * 120 + rng.integers(0, 60, (36, 48, 3)) + 40, 0, 255).astype(
            np.uint8
        )
        for i in range(n)
    ], torch.arange(n) % 3


def train_stripes(state_dir, stop_at=None, dropout=0.3, loss="arcface", **kw):
    "A training of a few steps, with dropout, that may die after a step."
    from landmark.parts.images.loading import Photos
    from landmark.parts.nets.backbones import make_model
    from landmark.parts.nets.losses import make_head
    from landmark.parts.training.recipe import Recipe

    class Killed(BaseException):
        pass

    class Dies(Trainer):
        def train_step(self, *args):
            super().train_step(*args)
            if self.step + 1 == stop_at:
                raise Killed

    images, labels = stripes()
    torch.manual_seed(0)
    net = Training(make_model("test_resnet", d=8), make_head(loss, 8, torch.bincount(labels)))
    net.model.fc = torch.nn.Sequential(torch.nn.Dropout(dropout), net.model.fc)
    recipe = Recipe(
        **{
            **dict(
                epochs=2,
                batch_size=6,
                lr=5e-3,
                optimizer="adamw",
                drop_uneven=False,
                min_batch=2,
                log_every=1,
                checkpoint_every=1,
            ),
            **kw,
        }
    )
    trainer = Dies(
        net,
        Photos([f"{i}.jpg" for i in range(len(images))], "48", "soft", images=images),
        labels,
        recipe,
        state_dir,
    )
    try:
        table = trainer.run()
    except Killed:
        table = None
    return net.state_dict(), table, trainer


@pytest.mark.parametrize(
    "kw",
    [
        dict(),
        dict(accumulate=2, scale_up="64", checkpoint_every=3),
        dict(rising=("32", "48"), warmup=0.2, optimizer="sgd"),
    ],
    ids=["plain", "accumulated and scaled up", "rising sizes"],
)
def test_killed_after_any_step(tmp_path, kw):
    "Sampler, schedule, dropout and optimizer go on as if nothing had happened."
    whole, table, trainer = train_stripes(tmp_path / "whole", **kw)
    for k in range(1, trainer.total + 1, 1 if not kw else 3):
        train_stripes(tmp_path / f"{k}", stop_at=k, **kw)
        again, same_table, _ = train_stripes(tmp_path / f"{k}", **kw)
        assert same(whole, again), f"killed after step {k}"
        pd.testing.assert_frame_equal(table, same_table)
    assert not same(whole, train_stripes(tmp_path / "undropped", dropout=0.0, **kw)[0]), (
        "dropout plays a part"
    )


def test_the_scaler_of_fp16_is_continued(tmp_path, monkeypatch):
    "On a CPU Accelerate brings no gradient scaler, so it is given one that changes every other step."
    from landmark.parts.training import engine

    usual = engine._accelerator

    def scaled(*args):
        acc = usual(*args)
        acc.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        return acc

    monkeypatch.setattr(engine, "_accelerator", scaled)
    whole, _, one = train_stripes(tmp_path / "whole")
    train_stripes(tmp_path / "killed", stop_at=4)
    again, _, two = train_stripes(tmp_path / "killed")
    assert one.acc.scaler.get_scale() == two.acc.scaler.get_scale() == 8 * 2 ** (one.total // 2) and same(
        whole, again
    )
    state = torch.load(tmp_path / "killed" / "last.pt", weights_only=True)
    assert state["scaler"]["scale"] == one.acc.scaler.get_scale()


def test_out_of_memory_names_batch_and_size(tmp_path, monkeypatch):
    from landmark.parts.nets.backbones import RetrievalModel

    usual = RetrievalModel.forward

    def greedy(self, images):
        if images.shape[3] > 48:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB")
        return usual(self, images)

    monkeypatch.setattr(RetrievalModel, "forward", greedy)
    with pytest.raises(
        TrainingError,
        match="Out of memory with 6 images a batch at size 64. Lower `batch_size`.*set `precision` to bf16",
    ):
        train_stripes(tmp_path, scale_up="64")


def test_a_size_the_network_cannot_take(world):
    with pytest.raises(ParameterError, match="gives no feature map of a photo .*takes images of any size"):
        train.run(train.Config(world=str(world), **{**SMALL, "backbone": "beit_base_patch16_224"}))


def test_a_size_that_only_the_last_epoch_has_is_refused_before_the_first(tmp_path, monkeypatch):
    from landmark.parts.nets.backbones import RetrievalModel

    usual = RetrievalModel.forward

    def fixed(self, images):
        assert images.shape[3] <= 64, "too wide"
        return usual(self, images)

    monkeypatch.setattr(RetrievalModel, "forward", fixed)
    monkeypatch.setattr(Trainer, "train_step", lambda *_: pytest.fail("it began to train"))
    with pytest.raises(TrainingError, match="cannot take images of 96 × 64 pixels .too wide."):
        train_stripes(tmp_path, scale_up="96")


def test_two_runs_in_one_folder_wait_for_each_other(world, capfd):
    import threading

    from filelock import FileLock

    from landmark.parts.artifacts import stage_dir

    cfg = train.Config(world=str(world), name="shared", **SMALL)
    d = stage_dir("train", cfg)
    d.parent.mkdir(parents=True)
    with FileLock(str(d.parent / f".{d.name}.lock")):  # another run is at work
        second = threading.Thread(target=train.run, args=(cfg,))
        second.start()
        time.sleep(1.5)
        assert second.is_alive() and not list(d.glob("**/*.pt")) and not (d / "manifest.json").exists()
    second.join()
    assert (d / "manifest.json").exists() and "another process is at work" in capfd.readouterr().err
    when = (d / "manifest.json").stat().st_mtime_ns
    train.run(cfg)
    assert (d / "manifest.json").stat().st_mtime_ns == when, "the third finds it done"


def test_a_checkpoint_of_something_else(world):
    "A state folder that holds another network's checkpoint, or half of one, stops the run with a sentence."

    whole = train.run(train.Config(world=str(world), name="whole", **SMALL))
    state = whole / ".state" / "arcface_v1" / "last.pt"
    good = torch.load(state, weights_only=True)

    def with_state(content):
        for p in (whole / "manifest.json", whole / "arcface_v1" / "card.json"):
            p.unlink(missing_ok=True)
        content() if callable(content) else torch.save(content, state)
        return train.run(train.Config(world=str(world), name="whole", **SMALL))

    smaller = {k: v[:-1] if k.startswith("head.weight") else v for k, v in good["net"].items()}
    for content, says in (
        (dict(good, net=smaller), "2 classes instead of 3"),
        (dict(good, net={f"x{k}": v for k, v in good["net"].items()}), "belongs to another architecture"),
        (dict(good, version=0), "has version 0"),
        (lambda: state.write_bytes(state.read_bytes()[:3000]), r"no readable checkpoint \(truncated\?\)"),
    ):
        with pytest.raises(ValueError, match=says):
            with_state(content)
    assert with_state(good) == whole


def test_card_and_best_epoch(tmp_path, monkeypatch):
    from landmark.parts.artifacts import digest_of
    from landmark.parts.core import read_json
    from landmark.parts.data.worlds import make_world
    from landmark.parts.nets.checkpoints import load_model

    tiny = make_world("tiny", 1)
    monkeypatch.setenv("LANDMARK_RUNS", str(tmp_path / "runs"))
    scores = iter([0.7, 0.9, 0.4])
    monkeypatch.setattr(train, "benchmark_maps", lambda *a: {"rnorth M": next(scores)})
    out = (
        train.run(train.Config(world=str(tiny), evaluate=True, **{**SMALL, "batch_size": 8, "epochs": 3}))
        / "arcface_v1"
    )
    last, best = read_json(out / "card.json"), read_json(out / "best" / "card.json")
    assert (
        last["metrics"] == {"rnorth M": 0.4} and best["metrics"] == {"rnorth M": 0.9} and best["epoch"] == 1
    )
    assert (
        last["data"] == {"world": digest_of(tiny)}
        and last["params"]["epochs"] == 3
        and last["params"]["margin"] is None
        and "device" not in last["params"]
    )
    assert last["recipe"]["seed"] == 1 and last["result"]["classes"] > 1
    a, b = load_model(out).state_dict(), load_model(out / "best").state_dict()
    assert a.keys() == b.keys() and not same(a, b), "best and last are two epochs"


def test_curves_come_to_the_notebook_while_it_trains(tmp_path):
    "A cell that trains shows one picture and renews it before it has ended."
    import nbformat
    from nbclient import NotebookClient

    cell = f"""import time
from landmark.parts.training.watching import Watch, watching
with watching({str(tmp_path)!r}, ['m'], every=.1):
    watch, rows = Watch({str(tmp_path / ".logs" / "m")!r}), []
    for k in range(1, 4):
        rows.append(dict(epoch=0, step=k, loss=1/k, accuracy=k/4, lr=.1)); watch(rows, 100.); time.sleep(.7)
print('the block has ended')"""
    renewed = []

    class Client(NotebookClient):
        def process_message(self, msg, *args):
            renewed.append(msg["msg_type"] if "stream" not in msg["msg_type"] else msg["content"]["text"])
            return super().process_message(msg, *args)

    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    Client(nb, kernel_name="python3", timeout=60).execute()
    before = renewed[: next(i for i, m in enumerate(renewed) if "has ended" in m)]
    assert before.count("display_data") == 1 and before.count("update_display_data") >= 3, before
    assert [o.output_type for o in nb.cells[0].outputs] == [
        "display_data",
        "stream",
    ] and "image/png" in nb.cells[0].outputs[0].data


def test_accumulated_batches_are_one_batch(tmp_path):
    "Two batches of 6 whose gradients are added make the step of one batch of 12, with batch norm frozen."
    same_for_both = dict(
        epochs=1, optimizer="sgd", lr=1e-2, lr_end=1e-2, dropout=0.0, frozen_bn=True, drop_uneven=True
    )
    one, _, _ = train_stripes(tmp_path / "one", batch_size=12, **same_for_both)
    two, _, _ = train_stripes(tmp_path / "two", batch_size=6, accumulate=2, **same_for_both)
    for k, v in one.items():
        torch.testing.assert_close(v, two[k], rtol=1e-4, atol=1e-5)
    uneven = {**same_for_both, "drop_uneven": False, "epochs": 2}  # 9, 9 and 6 photos are one step, as 24 are
    whole, _, _ = train_stripes(tmp_path / "whole", batch_size=24, **uneven)
    parts, _, _ = train_stripes(tmp_path / "parts", batch_size=9, accumulate=4, **uneven)
    for k, v in whole.items():
        torch.testing.assert_close(v, parts[k], rtol=1e-4, atol=1e-5)
    assert not same(one, train_stripes(tmp_path / "three", batch_size=6, **same_for_both)[0])


def test_bf16_follows_fp32(tmp_path):
    still = dict(epochs=1, lr=0.0, lr_end=0.0, dropout=0.0, frozen_bn=True)
    (_, a, _), (net, b, trainer) = (
        train_stripes(tmp_path / "a", **still),
        train_stripes(tmp_path / "b", precision="bf16", **still),
    )
    assert trainer.acc.mixed_precision == "bf16" and all(
        v.dtype == torch.float32 for k, v in net.items() if v.is_floating_point()
    ), "weights stay in float32"
    np.testing.assert_allclose(a.loss, b.loss, rtol=0.05)
    assert (a.loss != b.loss).any()


def test_every_training_of_a_process_has_its_own_device(monkeypatch):
    "Accelerate keeps the first one unless told; a GPU that is only said to be there is enough to see it."
    from accelerate.state import AcceleratorState

    from landmark.parts.training.engine import _accelerator
    from landmark.parts.training.recipe import Recipe

    set_to = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda d: set_to.append(str(d)))
    assert [_accelerator(Recipe(), d).device.type for d in ("cpu", "cuda:1", "cpu", "cuda:0")] == [
        "cpu",
        "cuda",
        "cpu",
        "cuda",
    ] and set_to == ["cuda:1", "cuda:0"]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(TrainingError, match="`device` is cuda, but Accelerate works on cpu: its settings"):
        _accelerator(Recipe(), "cuda")
    AcceleratorState._reset_state(reset_partial_state=True)


def test_several_models_one_after_another_on_two_processes(world):
    "The second training finds the group of processes that the first one made."
    args = {
        **SMALL,
        "frozen_bn": True,
        "drop_uneven": True,
        "lr": 1e-3,
        "optimizer": "sgd",
        "epochs": 1,
        "loss": ["cosface", "arcface"],
    }
    one = train.run(train.Config(world=str(world), name="one", **args))
    two = train.run(train.Config(world=str(world), name="two", **{**args, "devices": 2}))
    for loss in args["loss"]:
        for k, v in weights(one, f"{loss}_v1").items():
            torch.testing.assert_close(v, weights(two, f"{loss}_v1")[k], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("evaluated", [False, True])
def test_weights_that_are_no_numbers_reach_no_checkpoint(tmp_path, evaluated):
    "A gradient overflows while its loss is finite; a second run goes on from the last good step."
    from landmark.parts.training.errors import DivergenceError

    class Overflows(Trainer):
        def train_step(self, *args):
            hooks = [
                p.register_hook(lambda g: g * float("inf"))
                for p in self.net.model.fc.parameters()
                if self.step == 3
            ]
            super().train_step(*args)
            [h.remove() for h in hooks]

    seen = []

    def train_once(cls):
        from landmark.parts.images.loading import Photos
        from landmark.parts.nets.backbones import make_model
        from landmark.parts.nets.losses import make_head
        from landmark.parts.training.recipe import Recipe

        images, labels = stripes()
        torch.manual_seed(0)
        net = Training(make_model("test_resnet", d=8), make_head("arcface", 8, torch.bincount(labels)))
        recipe = Recipe(epochs=2, batch_size=6, lr=5e-3, optimizer="sgd", log_every=1, checkpoint_every=1)
        cls(
            net,
            Photos([f"{i}.jpg" for i in range(len(images))], "48", "soft", images=images),
            labels,
            recipe,
            tmp_path,
            on_epoch=(lambda *a: seen.append(a) or {"x M": 0.5}) if evaluated else None,
        ).run()
        return net.state_dict()

    with pytest.raises(
        DivergenceError, match="After step 4 a weight is no number .* the batch before may be the cause"
    ):
        train_once(Overflows)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["step"] == 3 and all(v.isfinite().all() for v in state["net"].values()) and not seen
    assert all(v.isfinite().all() for v in train_once(Trainer).values())


def test_a_larger_share_of_unreadable_photos_goes_on_with_the_same_training(world):
    "The parameter that the error names does not throw away what was trained."
    path = [
        image_path(world / "v1" / "train", i) for i in pd.read_csv(world / "v1" / "train.csv", dtype=str).id
    ]

    def cfg(**kw):
        return dict(world=str(world), in_memory=False, **{**SMALL, **kw})

    from landmark.parts.nets.backbones import make_model
    from landmark.parts.nets.losses import make_head

    photos, classes, _ = train.load_photos(train.Config(**cfg()), "v1")
    for p in path[:3]:
        p.write_bytes(p.read_bytes()[: len(p.read_bytes()) // 2])  # found out in the middle of an epoch

    def go(state_dir, **kw):
        torch.manual_seed(0)
        net = Training(make_model("test_resnet", d=8), make_head("arcface", 8, torch.bincount(classes)))
        Trainer(net, photos, classes, train.recipe_of(train.Config(**cfg(**kw))), world / state_dir).run()
        return net.state_dict()

    with pytest.raises(TrainingError, match="more than `max_bad` = 0.01"):
        go("a", checkpoint_every=1)
    assert torch.load(world / "a" / "last.pt", weights_only=True)["step"] > 0
    assert same(go("a", max_bad=0.5, log_every=3, checkpoint_every=1), go("b", max_bad=0.5))


@pytest.mark.parametrize("loss", ["arcface", "triplet", "contrastive"])
def test_a_step_asks_no_device_for_a_number(tmp_path, monkeypatch, loss):
    """On the device `meta` there are no numbers: whoever asks for one fails. So runs a step of one of two
    processes, but for the steps of the optimizer."""
    from landmark.parts.images.loading import Photos
    from landmark.parts.nets.backbones import make_model
    from landmark.parts.nets.losses import make_head
    from landmark.parts.training.recipe import Recipe

    monkeypatch.setattr(
        torch, "autocast", lambda *args, **kw: contextlib.nullcontext()
    )  # it does not know this device

    class Two:  # what a step asks of Accelerate
        num_processes, device = 2, torch.device("meta")

        def reduce(self, x, how):
            assert x.device.type == "meta"
            return x

        def backward(self, loss):
            assert loss.ndim == 0
            loss.backward()

        def clip_grad_norm_(self, *args):
            pass

    images, labels = stripes()
    net = Training(make_model("test_resnet", d=8), make_head(loss, 8, torch.bincount(labels))).to("meta")
    t = Trainer(
        net,
        Photos([f"{i}.jpg" for i in range(24)], "48", images=images),
        labels,
        Recipe(batch_size=6, n_negatives=1),
        tmp_path,
    )
    t.acc, t.ddp, t.opt, t.prepared, t.total, t.plan = (
        Two(),
        net,
        torch.optim.SGD(net.parameters(), 1e-3),
        type("No", (), dict(step=lambda s: None, zero_grad=lambda s: None))(),
        10,
        [np.arange(12)],
    )
    t.train_step(torch.zeros(6, 3, 32, 48, dtype=torch.uint8), torch.arange(6))
    assert t.recent[0][2].device.type == "meta" and net.model.fc.weight.grad is not None


def test_mining_leaves_batch_norm_frozen(tmp_path):
    "To describe photos for tuples is no reason to let statistics move again."
    net, _, _ = train_stripes(tmp_path, loss="contrastive", frozen_bn=True, n_negatives=1)
    assert all((v == (k.endswith("var"))).all() for k, v in net.items() if "running_" in k), (
        "they are those of the start"
    )


@pytest.mark.parametrize("main", [True, False])
def test_one_process_mines_and_the_others_are_told(tmp_path, monkeypatch, main):
    from landmark.parts.training import engine

    mined, sent = [], []
    monkeypatch.setattr(engine, "plan_tuples", lambda *args: mined.append(1) or ["mined"])

    def broadcast(plan):
        sent.append(list(plan))
        plan[0] = ["mined"]

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    _, _, trainer = train_stripes(tmp_path, stop_at=1)
    trainer.tuples, trainer.acc = (
        True,
        type("Two", (), dict(num_processes=2, is_main_process=main, device="cpu"))(),
    )
    assert (
        trainer.make_plan() == ["mined"] and len(mined) == main and sent == [[["mined"] if main else False]]
    )


def test_tuples_are_mined_in_the_precision_of_the_training(tmp_path):
    from landmark.parts.training.recipe import describe

    _, _, trainer = train_stripes(tmp_path, stop_at=1)
    seen = []
    trainer.net.model.fc.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    for precision in ("fp32", "bf16"):
        describe(
            trainer.net.model,
            trainer.photos,
            np.arange(4),
            trainer.recipe.__class__(precision=precision),
            "cpu",
        )
    assert seen == [torch.float32, torch.bfloat16]


def test_the_triplet_loss_meets_positives_on_one_process_and_on_two(world, monkeypatch):
    """Every photo of a step has a partner, also in each process's share; killed and continued it ends with
    the same weights."""
    from landmark.parts.training.recipe import plan_landmarks, share_of

    args = {**SMALL, "loss": "triplet", "batch_size": 16, "epochs": 3, "checkpoint_every": 1}
    photos, classes, _ = train.load_photos(train.Config(world=str(world), **args), "v1")
    for b in plan_landmarks(photos, classes, train.recipe_of(train.Config(**args)), 0):
        for share in (share_of(b, r, 2, labels=classes[b].numpy()) for r in (0, 1)):
            assert (np.unique(classes[share], return_counts=True)[1] > 1).all()
    one = train.run(train.Config(world=str(world), name="one", **args))
    two = train.run(train.Config(world=str(world), name="two", devices=2, **args))
    a, b = (pd.read_csv(d / "triplet_v1" / "metrics.csv") for d in (one, two))
    assert (
        a.step.tolist() == b.step.tolist()
        and a.lr.tolist() == b.lr.tolist()
        and a.lr.iloc[-1] == pytest.approx(1e-5)
    )

    class Killed(BaseException):
        pass

    class Dies(train.Watch):
        def __call__(self, rows, rate):
            if rows[-1]["step"] == 4:
                raise Killed

    with monkeypatch.context() as m:
        m.setattr(train, "Watch", Dies)
        with pytest.raises(Killed):
            train.run(train.Config(world=str(world), name="killed", **args))
    assert same(
        weights(one, "triplet_v1"),
        weights(train.run(train.Config(world=str(world), name="killed", **args)), "triplet_v1"),
    )
    with pytest.raises(
        RuntimeError, match="`batch_size` 12 leaves fewer than 2 landmarks of 4 photos to each of 2 processes"
    ):
        train.run(train.Config(world=str(world), **{**args, "batch_size": 12, "devices": 2}))
