"""Files that nobody made on purpose: every reader answers with a value or with a sentence.

Each reader gets valid small files that were cut, overwritten and lengthened, the same ones in every run.
What is promised: no error but the reader's own, in one line; nothing written but where it belongs;
no memory beyond a bound, whatever a header claims. `FUZZ=1000` tries as many changes a reader as that.
"""

import contextlib
import gzip
import io
import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import h5py
import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from landmark.parts.config import read_yaml
from landmark.parts.core import ParameterError
from landmark.parts.data import layout
from landmark.parts.data.download import DownloadError
from landmark.parts.data.revisited import read_ground_truth
from landmark.parts.data.submission import SubmissionError, read_recognition, read_retrieval
from landmark.parts.data.tables import read_table
from landmark.parts.data.tars import unpack, unpack_named
from landmark.parts.descriptors.hdf5 import read_h5
from landmark.parts.descriptors.store import StoreError, open_store, write_store
from landmark.parts.exchange.hloc import read_global, read_local
from landmark.parts.images.formats import ImageError
from landmark.parts.images.reading import image_size, read_image
from landmark.parts.nets.backbones import load_weights
from landmark.parts.nets.checkpoints import CHECKPOINT_VERSION, load_checkpoint, save_checkpoint

N = int(os.environ.get("FUZZ", 300))
MIB = 400  # memory that a reader of a small file may add

# how a file is spoilt


places = st.floats(0, 1, exclude_max=True)
pieces = st.one_of(
    st.binary(min_size=1, max_size=8),
    st.sampled_from(
        [b"\0" * 64, b"\xff" * 8, b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"../", b",\n", b'"']
    ),
)
change = st.tuples(st.sampled_from(["cut", "over", "in", "out", "twice", "flip"]), places, pieces)
changes = st.lists(change, min_size=1, max_size=6)


def spoilt(data, steps):
    "A file after some changes."
    for how, place, piece in steps:
        at = int(place * (len(data) + 1))
        if how == "cut":
            data = data[:at]
        elif how == "over":
            data = data[:at] + piece + data[at + len(piece) :]
        elif how == "in":
            data = data[:at] + piece + data[at:]
        elif how == "out":
            data = data[:at] + data[at + 2 * len(piece) :]
        elif how == "twice":
            data = data[:at] + data[at // 2 : at] + data[at:]
        elif data:
            at = min(at, len(data) - 1)
            data = data[:at] + bytes([data[at] ^ 1 << len(piece) % 8]) + data[at + 1 :]
    return data


# valid files


def pictures():
    "Small pictures of every kind that is read."
    x = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
    image, out = Image.fromarray(x), {}
    exif = image.getexif()
    exif[0x0112] = 6
    for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "AVIF", "JPEG2000"):
        data = io.BytesIO()
        how = dict(exif=exif) if kind in ("JPEG", "PNG", "TIFF", "WEBP", "AVIF") else {}
        image.save(data, kind, **how)
        out[kind] = data.getvalue()
    for name, im, kind, how in (
        ("progressive", image, "JPEG", dict(progressive=True)),
        ("deep", Image.fromarray(x[..., 0].astype(np.uint16) * 16), "PNG", {}),
        ("float", Image.fromarray(x[..., 0] / np.float32(255)), "TIFF", dict(compression="tiff_lzw")),
        ("palette", image.convert("P"), "PNG", dict(transparency=3)),
    ):
        im.save(data := io.BytesIO(), kind, **how)
        out[name] = data.getvalue()
    return out


def tables():
    return {
        "train": b'id,url,landmark_id\nabc1,http://x/y,7\nabc2,,8\nabc3,"a,b",7\n',
        "text": "id,url,landmark_id\nabc1,,Église\nabc2,,Mill\n".encode(),
        "utf16": "id,url,landmark_id\nabc1,,7\n".encode("utf-16"),
    }


def pickles():
    gnd = dict(
        imlist=["a1", "a2"],
        qimlist=["q"],
        gnd=[dict(bbx=np.array([0.0, 1, 9, 9]), easy=[0], hard=np.array([1]), junk=[])],
    )
    return {p: pickle.dumps(gnd, p) for p in range(6)}


def tars():
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name in ("0/1/2/012aaaaaaaaaaaaa.jpg", "./f/f/f/fffaaaaaaaaaaaaa.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 700
            tar.addfile(info, io.BytesIO(bytes(range(100)) * 7))
    return {"tar": data.getvalue()}


def h5s(folder):
    out = {}
    for name, how in dict(plain={}, packed=dict(compression="gzip", chunks=(4, 8))).items():
        with h5py.File(folder / "made.h5", "w") as f:
            f["ids"] = np.array([b"i%d" % i for i in range(9)])
            f.create_dataset("feats", data=np.eye(9, 8, dtype="f4") + 0.1, **how)
        out[name] = (folder / "made.h5").read_bytes()
    (folder / "made.h5").unlink()
    return out


def hloc_files(folder):
    "A file of hloc with two photos, global and local."
    with h5py.File(folder / "made.h5", "w", libver="latest") as f:
        for i in range(2):
            for name, value in dict(
                global_descriptor=np.eye(2, 8)[i].astype("f2"),
                keypoints=np.arange(10, dtype="f2").reshape(5, 2),
                descriptors=np.eye(128, 5, dtype="f2"),
                scores=np.ones(5, "f2"),
                image_size=np.array([64, 48]),
            ).items():
                f[f"db/{i}.jpg/{name}"] = value
    out = {"plain": (folder / "made.h5").read_bytes()}
    (folder / "made.h5").unlink()
    return out


YAML = {"plain": b"loss: arcface\nepochs: 3\nlr: 1.0e-3\nsizes: [64, '96']\noptions: {a: 1, b: null}\n"}
NET = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))


def weights(folder):
    "The same small network in the ways in which people keep it."
    torch.save(NET.state_dict(), folder / "w")
    pth = (folder / "w").read_bytes()
    torch.save(NET.state_dict(), folder / "w", _use_new_zipfile_serialization=False)
    old = (folder / "w").read_bytes()
    save_file(NET.state_dict(), folder / "w")
    safe = (folder / "w").read_bytes()
    save_checkpoint(folder / "w", dict(version=CHECKPOINT_VERSION, net=NET.state_dict(), step=3))
    return {"w.pth": pth, "old.pth": old, "w.safetensors": safe, "c.ckpt": (folder / "w").read_bytes()}


# what is promised


def memory() -> int:
    "Largest memory of this process since it was asked to forget, in MiB; 0 where the system does not tell."
    try:
        text = Path("/proc/self/status").read_text()
        return int(text.partition("VmHWM:")[2].split()[0]) // 1024
    except (OSError, IndexError):
        return 0


def forget():
    "Count the largest memory anew."
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def fuzz(files, read, errors, tmp_path, name="file"):
    "Spoil valid files in `N` ways and read each."
    home = tmp_path / "inside"
    home.mkdir()
    files = {
        **files,
        "nothing": b"",
        "noise": np.random.default_rng(0).bytes(500),
        "page": b"<html>404</html>",
    }
    for data in files.values():  # what is whole is read, and all that is loaded late is loaded
        (home / name).write_bytes(data)
        answer(read, home / name, errors)

    @settings(
        max_examples=N,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(sorted(files.items(), key=str)), changes)
    def run(chosen, steps):
        (home / name).write_bytes(spoilt(chosen[1], steps))
        answer(read, home / name, errors)

    forget()
    before = memory()
    run()
    assert memory() - before < MIB, f"{memory() - before} MiB"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["inside"], "something was written outside"


def answer(read, path, errors):
    "Read; the only way to fail is the reader's own error, in one line."
    try:
        return read(path)
    except Exception as e:
        if type(e) not in errors:
            raise
        assert str(e).strip() and len(str(e).splitlines()) == 1, repr(str(e))


def test_pictures(tmp_path):
    def read(path):
        for one in (image_size, read_image, lambda p: read_image(p, 16)):
            answer(one, path, [ImageError])

    fuzz(pictures(), read, [ImageError], tmp_path)


def test_tables(tmp_path):
    def read(path):
        table = read_table(path, ["id", "landmark_id"])
        assert all(str(v).strip() for v in table.landmark_id)

    fuzz(tables(), read, [ValueError], tmp_path, "train.csv")


def test_worlds_solutions_and_submissions(tmp_path):
    files = {
        "retrieval": b"id,images,Usage\nabc1,abc2 abc3,Public\nabc2,None,Ignored\nabc3,,Private\n",
        "recognition": b"id,landmarks,Usage\nabc1,7 9,Public\nabc2,None,Ignored\nabc3,,Private\n",
        "train": b"id,landmark_id\nabc1,7\nabc2,8\n",
        "ranks": b"id,images\nabc1,abc2 abc3\nabc2,\n",
        "answers": b"id,landmarks\nabc1,7 0.5\nabc2,\n",
    }

    def read(path):
        v2, text = path.parent / "v2", path.read_bytes()
        v2.mkdir(exist_ok=True)
        for name in ("retrieval_solution.csv", "recognition_solution.csv", "train.csv"):
            (v2 / name).write_bytes(text)
        readers = [
            lambda: layout.read_retrieval_solution(path.parent),
            lambda: layout.read_recognition_solution(path.parent),
            lambda: layout.read_images(path.parent, "v2_train"),
            lambda: read_retrieval(path),
            lambda: read_recognition(path),
        ]
        for one in readers:
            found = answer(lambda _, one=one: one(), path, errors)
            for place in [] if found is None or "path" not in found else found.path:
                assert os.path.normpath(place).startswith(f"{v2 / 'train'}/")

    errors = [ValueError, SubmissionError]
    fuzz(files, read, errors, tmp_path, "a.csv")


def test_ground_truth(tmp_path):
    def read(path):
        truth = read_ground_truth(path)
        assert all(isinstance(i, str) and "/" not in i for i in truth["imlist"] + truth["qimlist"])

    fuzz(pickles(), read, [ValueError], tmp_path, "gnd_rx.pkl")


def test_tars(tmp_path):
    fuzz(tars(), lambda p: unpack(p, p.parent / "train"), [DownloadError], tmp_path, "images_000.tar")


def test_named_members_of_archives(tmp_path):
    names = {"012aaaaaaaaaaaaa"}
    packed = {"tgz": gzip.compress(tars()["tar"])}
    fuzz(packed, lambda p: unpack_named(p, p.parent / "train", names), [DownloadError], tmp_path, "toy.tgz")


def test_h5(tmp_path):
    fuzz(h5s(tmp_path), lambda p: read_h5(p, p.parent / "store"), [StoreError], tmp_path, "d.h5")


def test_h5_of_hloc(tmp_path):
    def read(path):
        for kind in ("", "rootsift"):
            shutil.rmtree(path.parent / "out", ignore_errors=True)
            if kind:
                read_local(path, path.parent / "out", kind)
            else:
                answer(lambda p: read_global(p, p.parent / "out"), path, [StoreError])

    fuzz(hloc_files(tmp_path), read, [StoreError], tmp_path, "d.h5")


def test_weights_and_checkpoints(tmp_path):
    files = weights(tmp_path)
    (tmp_path / "w").unlink()

    def read(path):
        for suffix in (".pth", ".safetensors"):
            path.with_suffix(suffix).write_bytes(path.read_bytes())
            answer(lambda p: load_weights(NET, p), path.with_suffix(suffix), [ValueError, ParameterError])
        load_checkpoint(path, NET)

    fuzz(files, read, [ValueError, ParameterError], tmp_path, "w.ckpt")


def test_parameter_files(tmp_path):
    fuzz(YAML, read_yaml, [ParameterError], tmp_path, "p.yaml")


def test_stores(tmp_path):
    store = write_store(tmp_path / "s", [f"i{n}" for n in range(9)], np.eye(9, 8) + 0.1, dict(a=1))
    card = (store.dir / "card.json").read_bytes()
    for path in store.dir.iterdir():
        path.unlink()
    store.dir.rmdir()
    assert json.loads(card)["n"] == 9
    fuzz({"card": card}, lambda p: open_store(p.parent).ids, [StoreError], tmp_path, "card.json")
