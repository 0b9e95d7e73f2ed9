"""Google Landmarks from a server of this machine that has every trouble of a real one.

The world is small (two tars of each split, a benchmark, a list of addresses), its shape is the real one.
What is promised: whatever happens, and whenever the process is killed, another run ends with the same
folder; no file is taken for what it is not; what cannot be had is a row of a table.
"""

import errno
import functools
import hashlib
import http.server
import io
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from landmark import data
from landmark.parts.core import ParameterError
from landmark.parts.data import download, fetching, tars, v1, wish
from landmark.parts.data.download import DiskError, DownloadError, fetch
from landmark.parts.data.gld import fetch_gld
from landmark.parts.data.layout import read_ids, read_images, read_recognition_solution, splits

TRAIN, INDEX, TEST = [[f"{c}{n:x}" * 8 for n in range(k)] for c, k in (("a", 8), ("b", 4), ("c", 4))]


class Troubled(http.server.BaseHTTPRequestHandler):
    "A server of files in memory; `trouble` maps a path to a method of this class, and how often it is met."

    def __init__(self, shop, *args):
        self.shop = shop
        super().__init__(*args)

    def do_HEAD(self):
        self.answer(head=True)

    def do_GET(self):
        self.answer()

    def answer(self, head=False):
        name = self.path.lstrip("/")
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        whole = self.shop.files.get(name)
        if head and not self.shop.heads:
            self.send_error(501)
            return
        if not head:
            self.shop.asked.append((name, start))
            trouble, turns = self.shop.trouble.get(name, ("", 0))
            if turns:
                self.shop.trouble[name] = (trouble, turns - 1)
                getattr(self, trouble)(whole, start)
                return
        if whole is None:
            self.send_error(404)
            return
        self.send(whole, start, len(whole), head)

    def send(self, whole, start, end, head=False):
        "An honest answer, of which `end` is the last byte that is sent."
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(whole) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
        self.end_headers()
        if not head:
            self.wfile.write(whole[start:end])

    def breaks_off(self, whole, start):
        self.send(whole, start, start + max(1, (len(whole) - start) // 2))

    def says_nothing(self, whole, start):
        "The line is closed before an answer: RemoteDisconnected."
        self.close_connection = True

    def speaks_nonsense(self, whole, start):
        self.wfile.write(b"\x00\x01 nonsense\r\n\r\n")

    def breaks_off_in_pieces(self, whole, start):
        "Chunked, so that no length is announced, and cut: IncompleteRead."
        self.protocol_version = "HTTP/1.1"
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"%x\r\n" % len(whole) + whole[: len(whole) // 2])
        self.close_connection = True

    def knows_no_ranges(self, whole, start):
        self.send(whole, 0, len(whole))

    def sends_another_rest(self, whole, start):
        self.send_response(206)
        self.send_header("Content-Range", f"bytes 0-{len(whole) - 1}/{len(whole)}")
        self.end_headers()
        self.wfile.write(whole)

    def wants_a_login(self, whole, start):
        page = b"<!DOCTYPE html>\n<html><body>Please log in to the guest network</body></html>" * 50
        self.send(page, 0, len(page))

    def is_busy(self, whole, start):
        self.send_response(503)
        self.send_header("Retry-After", "1")
        self.end_headers()

    def is_overrun(self, whole, start):
        self.send_error(429)

    def is_forbidden(self, whole, start):
        self.send_error(403)

    def is_slow(self, whole, start):
        self.send_response(200)
        self.send_header("Content-Length", str(len(whole)))
        self.end_headers()
        for n in range(10):
            self.wfile.write(whole[n : n + 1])
            time.sleep(0.1)

    def hangs(self, whole, start):
        time.sleep(1.5)

    def is_damaged(self, whole, start):
        self.send(whole[:-9] + b"123456789", start, len(whole))

    def outgrown_then_breaks_off(self, whole, start):
        "The part is longer than the file; then a third of the rest comes."
        if start >= len(whole):
            unsatisfied(self, whole)
        else:
            self.send(whole, start, start + max(1, (len(whole) - start) // 3))

    def waits(self, whole, start):
        "Sends half, and the rest when somebody lets it."
        self.send_response(200)
        self.send_header("Content-Length", str(len(whole)))
        self.end_headers()
        self.wfile.write(whole[: len(whole) // 2])
        self.shop.half.set()
        self.shop.go_on.wait(20)
        self.wfile.write(whole[len(whole) // 2 :])

    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    "Whose clients may leave without a word."

    def handle_error(self, request, address):
        pass


class Shop:
    "What is served, and how badly."

    def __init__(self):
        self.files, self.asked, self.trouble, self.heads = {}, [], {}, True
        self.half, self.go_on = threading.Event(), threading.Event()
        self.server = Server(("127.0.0.1", 0), functools.partial(Troubled, self))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.base = f"http://127.0.0.1:{self.server.server_port}"

    def tar(self, split, n, ids, place="{0[0]}/{0[1]}/{0[2]}/{0}.jpg"):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as t:
            for i in ids:
                info, picture = tarfile.TarInfo(place.format(i)), photo(int(i[:8], 16))
                info.size = len(picture)
                t.addfile(info, io.BytesIO(picture))
        self.files[f"{split}/images_{n:03d}.tar"] = out.getvalue()
        self.files[f"md5sum/{split}/md5.images_{n:03d}.txt"] = (
            hashlib.md5(out.getvalue()).hexdigest().encode()
        )


@functools.cache
def photo(seed, w=320, h=280):
    "A JPEG of noise, larger than what is read at once would be without."
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (h, w, 3), np.uint8)).save(out, "JPEG")
    return out.getvalue()


def lines(*rows):
    return ("\n".join(rows) + "\n").encode()


def benchmark(shop):
    gnd = [dict(bbx=[0.0, 0.0, 90.0, 90.0], easy=[0], hard=[1], junk=[])]
    shop.files["toy/gnd_rtoy.pkl"] = pickle.dumps(dict(imlist=["p_1", "p_2"], qimlist=["p_3"], gnd=gnd), 2)
    for n, names in ((1, ("p_1", "p_2")), (2, ("p_3", "p_broken"))):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w:gz") as t:
            for name in names:
                info, picture = tarfile.TarInfo(f"paris/some/{name}.jpg"), photo(9 + n)
                info.size = len(picture)
                t.addfile(info, io.BytesIO(picture))
        shop.files[f"toy/toy_{n}.tgz"] = out.getvalue()
    return dict(rtoy=[f"{shop.base}/toy/{f}" for f in ("toy_1.tgz", "toy_2.tgz", "gnd_rtoy.pkl")])


@pytest.fixture
def shop(monkeypatch):
    s = Shop()
    for split, ids in dict(train=TRAIN, index=INDEX, test=TEST).items():
        s.tar(split, 0, ids[: len(ids) // 2])
        s.tar(split, 1, ids[len(ids) // 2 :])
    # labels 7 and 8 have images in both tars, 9 in the second alone
    labels = [7, 8, 7, 8, 7, 8, 9, 9]
    s.files |= {
        "metadata/train.csv": lines("id,url,landmark_id", *(f"{i},u,{k}" for i, k in zip(TRAIN, labels))),
        "metadata/train_clean.csv": lines("landmark_id,images", f"7,{TRAIN[0]} {TRAIN[4]}", f"9,{TRAIN[6]}"),
        "metadata/train_label_to_category.csv": lines("landmark_id,category", "7,Seven", "8,Eight", "9,Nine"),
        "metadata/index.csv": lines("id", *INDEX),
        "metadata/test.csv": lines("id", *TEST),
        "ground_truth/retrieval_solution_v2.1.csv": lines(
            "id,images,Usage",
            f"{TEST[0]},{INDEX[0]} {INDEX[2]},Public",
            f"{TEST[1]},{INDEX[3]},Private",
            f"{TEST[2]},None,Ignored",
            f"{TEST[3]},None,Ignored",
        ),
        "ground_truth/recognition_solution_v2.1.csv": lines(
            "id,landmarks,Usage",
            f"{TEST[0]},7,Public",
            f"{TEST[1]},9,Private",
            f"{TEST[2]},,Public",
            f"{TEST[3]},,Private",
        ),
    }
    s.revisited = benchmark(s)
    for split, (_, size) in list(wish.TARS.items()):
        monkeypatch.setitem(wish.TARS, split, (2, size))
    yield s
    s.go_on.set()
    s.server.shutdown()
    s.server.server_close()


def get(shop, world, **how):
    "Fetch the world of the shop; what is missing, and what the shop was asked for."
    shop.asked.clear()
    given = dict(bucket=shop.base, revisited=shop.revisited, n_threads=3, pause=0.01, timeout=5)
    missing = fetch_gld(world, **given | how)
    return missing.file.tolist(), sorted({name for name, _ in shop.asked})


def everything(world):
    "All files of a world but the notes, with what is in them."
    found = {p.relative_to(world).as_posix(): p.read_bytes() for p in Path(world).rglob("*") if p.is_file()}
    return {name: text for name, text in found.items() if not name.startswith(".fetch/")}


def complete(world):
    "Whether every image of every table is there, and nothing half done."
    left = [
        p.name for p in Path(world).rglob("*") if p.suffix in (".part", ".tar", ".tgz", ".unpacking", ".tmp")
    ]
    images = [p for s in splits(world) for p in read_images(world, s).path]
    return left == [] and len(images) == 8 + 4 + 4 + 3 and all(Path(p).is_file() for p in images)


def test_an_empty_folder_becomes_a_world(shop, tmp_path):
    missing, asked = get(shop, tmp_path / "gld")
    assert missing == [] and set(asked) == set(shop.files)
    assert complete(tmp_path / "gld")
    assert splits(tmp_path / "gld") == ["v2_train", "index", "test", "rtoy_query", "rtoy_index"]
    assert not (tmp_path / "gld/revisited/rtoy/jpg/p_broken.jpg").exists()
    assert get(shop, tmp_path / "gld") == ([], [])  # complete: nobody is asked
    problems, sizes = data.look_through(tmp_path / "gld", "pixels", 1)
    assert problems.problem.tolist() == [] and len(sizes) == 19


TROUBLES = (
    "breaks_off says_nothing speaks_nonsense breaks_off_in_pieces sends_another_rest wants_a_login is_overrun"
)


@pytest.mark.parametrize("trouble", TROUBLES.split())
def test_what_goes_wrong_twice_is_overcome(shop, tmp_path, trouble):
    for name in ("train/images_000.tar", "metadata/train.csv", "toy/toy_1.tgz", "toy/gnd_rtoy.pkl"):
        shop.trouble[name] = (trouble, 2)
    assert get(shop, tmp_path / "gld")[0] == [] and complete(tmp_path / "gld")


def test_a_server_without_ranges(shop, tmp_path):
    name = "train/images_000.tar"
    part = tmp_path / "gld/.fetch/tars" / f"{name}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(shop.files[name][:1000])
    shop.trouble[name] = ("knows_no_ranges", 9)
    assert get(shop, tmp_path / "gld")[0] == [] and complete(tmp_path / "gld")
    assert (name, 1000) in shop.asked


def test_only_the_rest_is_asked_for(shop, tmp_path):
    name = "train/images_000.tar"
    whole = shop.files[name]
    shop.trouble[name] = ("breaks_off", 1)
    fetch(f"{shop.base}/{name}", tmp_path / "a.tar", pause=0.01)
    assert shop.asked == [(name, 0), (name, len(whole) // 2)] and (tmp_path / "a.tar").read_bytes() == whole
    (tmp_path / "b.tar.part").write_bytes(whole)  # killed between the last byte and its name
    with patch.object(Troubled, "send", lambda self, *a: unsatisfied(self, whole)):
        fetch(f"{shop.base}/{name}", tmp_path / "b.tar", pause=0.01)
    assert (tmp_path / "b.tar").read_bytes() == whole


def unsatisfied(handler, whole):
    "416, as a server answers who asks for what lies behind the end."
    handler.send_response(416)
    handler.send_header("Content-Range", f"bytes */{len(whole)}")
    handler.end_headers()


def test_a_login_page_replaces_nothing(shop, tmp_path):
    "Not even the part that had come before the login ran out."
    whole = shop.files["train/images_000.tar"]
    (tmp_path / "a.tar.part").write_bytes(whole[:5000])
    shop.trouble["train/images_000.tar"] = ("wants_a_login", 99)
    with pytest.raises(DownloadError, match="a web page came in its place"):
        fetch(f"{shop.base}/train/images_000.tar", tmp_path / "a.tar", tries=2, pause=0.01)
    assert (tmp_path / "a.tar.part").read_bytes() == whole[:5000]
    shop.trouble |= {"metadata/test.csv": ("wants_a_login", 99)}
    missing, _ = get(shop, tmp_path / "gld")
    assert missing == ["test.csv"] and not (tmp_path / "gld/v2/published/test.csv").exists()


def test_a_busy_server_is_waited_for_as_it_asks(shop, tmp_path):
    shop.trouble["metadata/test.csv"] = ("is_busy", 2)
    began = time.monotonic()
    fetch(f"{shop.base}/metadata/test.csv", tmp_path / "test.csv", pause=0.0)
    assert 1.9 < time.monotonic() - began < 10


def test_a_slow_line_and_one_that_hangs(shop, tmp_path):
    for trouble, said in (("is_slow", "only .* bytes came in"), ("hangs", "timed out")):
        shop.trouble["train/images_000.tar"] = (trouble, 99)
        with pytest.raises(DownloadError, match=f"2 tries failed, the last with: .*{said}"):
            fetch(f"{shop.base}/train/images_000.tar", tmp_path / trouble, tries=2, pause=0.01, timeout=0.4)
        shop.trouble["train/images_000.tar"] = (trouble, 1)
        fetch(f"{shop.base}/train/images_000.tar", tmp_path / f"{trouble}.tar", pause=0.01, timeout=0.4)
        assert (tmp_path / f"{trouble}.tar").read_bytes() == shop.files["train/images_000.tar"]


def test_what_is_missing_is_a_table_and_the_rest_is_there(shop, tmp_path):
    world = tmp_path / "gld"
    moved = {n: shop.files.pop(n) for n in ("index/images_001.tar", "toy/toy_2.tgz")}
    shop.trouble["test/images_000.tar"] = ("is_damaged", 99)
    missing, _ = get(shop, world)
    assert sorted(missing) == ["index/images_001.tar", "rtoy", "test/images_000.tar"]
    table = pd.read_csv(world / "missing.csv").set_index("file")
    assert table.columns.tolist() == ["why", "what_to_do"] and table.notna().all().all()
    assert "404" in table.why["rtoy"] and "check its address" in table.what_to_do["rtoy"]
    assert "pin it" in table.what_to_do["test/images_000.tar"]
    assert len(list(world.glob("v2/train/?/?/?/*.jpg"))) == 8 and "rtoy_query" not in splits(world)
    shop.files |= moved
    shop.trouble.clear()
    missing, asked = get(shop, world)
    assert missing == [] and complete(world) and not (world / "missing.csv").exists()
    assert not [a for a in asked if a.startswith("train/") or "toy_1" in a]  # what was there is not asked for


def test_a_tar_with_another_sum_needs_a_pin(shop, tmp_path):
    name = "train/images_000.tar"
    shop.files["md5sum/train/md5.images_000.txt"] = b"0" * 32
    assert get(shop, tmp_path / "gld")[0] == [name]
    found = hashlib.md5(shop.files[name]).hexdigest()
    assert get(shop, tmp_path / "gld", pins={name: "f" * 32})[0] == [name]
    assert get(shop, tmp_path / "gld", pins={name: found})[0] == [] and complete(tmp_path / "gld")


def test_files_that_are_not_what_they_should_be(shop, tmp_path):
    shop.files["md5sum/index/md5.images_000.txt"] = b"see the other page"
    shop.files["toy/gnd_rtoy.pkl"] = pickle.dumps(print)
    shop.tar("test", 0, TEST[:2], "../../../../outside-{0}.jpg")
    missing, _ = get(shop, tmp_path / "gld")
    assert sorted(missing) == ["index/images_000.tar", "rtoy", "test/images_000.tar"]
    why = pd.read_csv(tmp_path / "gld/missing.csv").set_index("file").why
    assert "holds no md5" in why["index/images_000.tar"] and "only plain containers" in why["rtoy"]
    assert "no images at their place" in why["test/images_000.tar"]
    assert not list(tmp_path.rglob("outside*"))
    benchmark(shop)
    shop.files["toy/toy_1.tgz"] = shop.files["toy/toy_1.tgz"][:300]
    assert "rtoy" in get(shop, tmp_path / "gld")[0]
    benchmark(shop)
    assert "rtoy" not in get(shop, tmp_path / "gld")[0]


def test_a_full_disk_stops_at_once(shop, tmp_path):
    "/dev/full answers every write as a full disk does."
    world, name = tmp_path / "gld", "train/images_000.tar"
    part = world / ".fetch/tars" / f"{name}.part"
    part.parent.mkdir(parents=True)
    part.symlink_to("/dev/full")
    with pytest.raises(DiskError, match="the disk is full at .*images_000.tar.part") as said:
        get(shop, world, n_threads=1, revisited={}, wanted=["train", "test"])
    assert "free some space and run again" in said.value.todo
    assert not [a for a, _ in shop.asked if a.startswith("test/images")]  # nothing else was begun
    part.unlink()
    assert get(shop, world)[0] == [] and complete(world)


def test_a_disk_that_fills_while_unpacking(shop, tmp_path):
    world = tmp_path / "gld"
    beside = world / ".fetch/tars/train/images_000.tar.unpacking"
    beside.parent.mkdir(parents=True)
    full = OSError(errno.ENOSPC, "No space left on device")
    with (
        patch.object(tars.Path, "write_bytes", side_effect=full),
        pytest.raises(DiskError, match="is full at"),
    ):
        get(shop, world, wanted=["train"])
    assert not list(world.glob("v2/train/?/?/?/*"))
    assert get(shop, world)[0] == [] and complete(world)


def test_a_disk_that_is_too_small_is_noticed_before(shop, tmp_path):
    small = patch("shutil.disk_usage", return_value=shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    said = "needs room for .* GB more, and 0.0 GB are free; nothing was begun"
    with small, pytest.raises(DiskError, match=said):
        get(shop, tmp_path / "gld")
    assert not [a for a, _ in shop.asked if a.endswith((".tar", ".tgz"))]


def child(shop, world, code="", home=""):
    "A process that fetches the world of the shop, after some other code."
    given = dict(bucket=shop.base, revisited=shop.revisited, n_threads=2, pause=0.01)
    source = f"""
from landmark.parts.data import wish
from landmark.parts.data.gld import fetch_gld

wish.TARS.update(dict.fromkeys(wish.TARS, (2, 1e6)))
given, home = {given!r}, {home!r}
{textwrap.dedent(code)}
print(len(fetch_gld({str(world)!r}, **given)))
"""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen([sys.executable, "-c", source], text=True, **pipes)


def test_two_downloads_into_one_folder(shop, tmp_path):
    world = tmp_path / "gld"
    shop.trouble["train/images_000.tar"] = ("waits", 1)
    first = child(shop, world)
    assert shop.half.wait(60), first.stderr.read()
    with pytest.raises(ParameterError, match=rf"is being filled by process {first.pid} on .*, since 20"):
        get(shop, world)
    shop.go_on.set()
    said, error = first.communicate(timeout=60)
    assert said == "0\n", error
    assert get(shop, world) == ([], []) and complete(world)


@pytest.mark.parametrize("name", ["metadata/train.csv", "train/images_001.tar", "toy/toy_2.tgz"])
def test_killed_while_a_file_comes(shop, tmp_path, name):
    "The lock goes with the process, the part stays."
    world = tmp_path / "gld"
    shop.trouble[name] = ("waits", 1)
    first = child(shop, world)
    assert shop.half.wait(60), first.stderr.read()
    while not list(world.rglob(f"{Path(name).name}.part")):
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    shop.go_on.set()
    assert get(shop, world)[0] == [] and complete(world)


DEADLY = """
    import itertools, os, pathlib, signal, sys

    def deadly(real, count, n, late):
        def call(*a, **k):
            last = next(count) == n
            if last and not late:
                os.kill(os.getpid(), signal.SIGKILL)
            out = real(*a, **k)
            if last:
                os.kill(os.getpid(), signal.SIGKILL)
            return out
        return call

    def run(world, n):
        count = itertools.count(1)
        os.replace = deadly(os.replace, count, n, n % 2)
        for name in ("replace", "unlink", "mkdir"):
            setattr(pathlib.Path, name, deadly(getattr(pathlib.Path, name), count, n, n % 2))
        fetch_gld(world, **given)

    for n in range(1, 1000, 3):
        if (pid := os.fork()) == 0:
            run(f"{home}/{n}", n)
            os._exit(0)
        code = os.waitpid(pid, 0)[1]
        assert code in (0, signal.SIGKILL), code
        if code == 0:
            break
    print(n)
"""


def test_killed_at_any_moment(shop, tmp_path):
    "Before or after every third change of a name; run again, the folder is that of an undisturbed run."
    get(shop, tmp_path / "calm")
    shop.heads = False  # the sizes of files are nothing that a kill could harm
    killed = child(shop, tmp_path / "0", DEADLY, home=str(tmp_path))
    said, error = killed.communicate(timeout=500)
    assert killed.returncode == 0, error
    moments = range(1, int(said.split()[0]), 3)
    assert len(moments) > 30
    for n in moments:
        assert get(shop, tmp_path / str(n), timeout=60)[0] == [] and complete(tmp_path / str(n)), n
        left = everything(tmp_path / str(n)).items() ^ everything(tmp_path / "calm").items()
        assert not left, (n, sorted(left))


def test_interrupted_by_hand(shop, tmp_path):
    "Ctrl-C ends the command with a sentence, soon."
    world = tmp_path / "gld"
    shop.trouble["train/images_000.tar"] = ("waits", 1)
    words = ["landmark_fetch", str(world), "--bucket", shop.base, "--only", "train", "--n-tars", "2"]
    command = f"import sys; sys.argv = {words!r}"
    code = f"{command}\nfrom landmark.parts.data.fetching import main\nmain()"
    p = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert shop.half.wait(60), p.stderr.read()
    p.send_signal(signal.SIGINT)
    time.sleep(0.2)
    shop.go_on.set()
    _, error = p.communicate(timeout=30)
    assert (
        p.returncode == 1 and "stopped; run again: what has come stays" in error and "Traceback" not in error
    )


def test_some_tars_then_all(shop, tmp_path):
    world = tmp_path / "gld"
    assert get(shop, world, n_tars=1)[0] == []
    assert [len(read_ids(world, s)) for s in ("v2_train", "index", "test")] == [4, 2, 2]
    clean = pd.read_csv(world / "v2/train_clean.csv")
    assert clean.images.tolist() == [TRAIN[0]]
    named = read_recognition_solution(world)
    assert named.landmarks.tolist() == [[7], []] and named.usage.tolist() == ["Public", "Ignored"]
    missing, asked = get(shop, world)
    assert (
        missing == [] and complete(world) and not [a for a in asked if "000.tar" in a or a.startswith("meta")]
    )
    for source, (name, _) in wish.TABLES.items():
        assert (world / "v2" / name).read_bytes() == shop.files[source]
    assert get(shop, world, n_tars=1) == ([], []) and len(read_ids(world, "v2_train")) == 4


def test_some_landmarks_then_others(shop, tmp_path):
    world = tmp_path / "gld"
    missing, asked = get(shop, world, landmarks=[9], revisited={})
    assert missing == [] and sum(a.endswith(".tar") for a in asked) == 6
    assert sorted(p.stem for p in world.glob("v2/train/?/?/?/*.jpg")) == TRAIN[6:]
    assert read_ids(world, "test").tolist() == [TEST[1]] and read_ids(world, "index").tolist() == [INDEX[3]]
    assert get(shop, world, landmarks=["9"], revisited={}) == ([], [])
    missing, asked = get(shop, world, landmarks=[8, 9], wanted=["train"], revisited={})
    assert missing == [] and [a for a in asked if a.endswith(".tar")] == [
        "train/images_000.tar",
        "train/images_001.tar",
    ]
    with pytest.raises(ParameterError, match="landmarks: 1 have no image in train.csv: 77"):
        get(shop, world, landmarks=[77], revisited={})
    assert get(shop, world)[0] == [] and complete(world)


def test_a_folder_of_before(shop, tmp_path):
    "Images laid out by hand, with all tables, are taken as they are; a table of one's own is not lost."
    world = tmp_path / "gld"
    get(shop, world)
    shutil.rmtree(world / ".fetch")
    assert get(shop, world) == ([], [])
    (world / "v2/index.csv").unlink()
    (world / "v2/index.csv").write_text("id\nmine\n")
    assert get(shop, world) == ([], [])
    assert (world / "v2/index.csv.own").read_text() == "id\nmine\n" and complete(world)


def test_a_table_of_ones_own_harms_no_published_one(shop, tmp_path):
    "Written into the file as it is there, twice: both are kept, and the published one comes back."
    world = tmp_path / "gld"
    get(shop, world)
    for mine in ("id\nmine\n", "id\nmine, too\n"):
        (world / "v2/index.csv").write_text(mine)
        assert get(shop, world) == ([], []) and complete(world)
    own = {p.name: p.read_text() for p in world.glob("v2/*.own*")}
    assert own == {"index.csv.own": "id\nmine\n", "index.csv.own1": "id\nmine, too\n"}


def test_archives_that_somebody_keeps_stay(shop, tmp_path):
    "Also in the calls that say nothing about it, as that of stage 00."
    world = tmp_path / "gld"
    get(shop, world, keep=True)
    kept = sorted(p for p in world.rglob("*") if p.suffix in (".tar", ".tgz"))
    assert len(kept) == 6 + 2 and get(shop, world) == ([], [])
    assert sorted(p for p in world.rglob("*") if p.suffix in (".tar", ".tgz")) == kept


def test_a_tar_that_came_for_more_landmarks_is_not_swept(shop, tmp_path):
    "Killed between the last byte and the new note, beside the note of the first landmark."
    world, name = tmp_path / "gld", "train/images_000.tar"
    given = dict(wanted=["train"], revisited={})
    get(shop, world, landmarks=[9], **given)
    (world / ".fetch/tars" / name).write_bytes(shop.files[name])
    missing, asked = get(shop, world, landmarks=[8, 9], **given)
    assert missing == [] and name not in asked and "train/images_001.tar" in asked
    (world / ".fetch/tars" / name).write_bytes(shop.files[name])  # killed behind the note
    assert get(shop, world, landmarks=[8, 9], **given) == ([], [])
    assert not list(world.rglob("*.tar"))


def test_tables_list_what_came(shop, tmp_path):
    "Not the images of a tar that failed, though an earlier choice noted what it holds."
    world, tar = tmp_path / "gld", shop.files.pop("train/images_001.tar")
    assert get(shop, world, revisited={})[0] == ["train/images_001.tar"]
    assert read_ids(world, "v2_train").tolist() == TRAIN[:4]
    shop.files["train/images_001.tar"] = tar
    world = tmp_path / "grown"
    get(shop, world, landmarks=[7], wanted=["train"], revisited={})
    del shop.files["train/images_001.tar"]
    for n_tars in (2, 0):
        assert get(shop, world, n_tars=n_tars, wanted=["train"], revisited={})[0] == ["train/images_001.tar"]
        assert read_ids(world, "v2_train").tolist() == TRAIN[:5]  # 4 is of landmark 7


def test_tars_of_which_nothing_is_wanted(shop, tmp_path):
    "Landmark 8 answers no test image; 9 is there, whatever the notes say."
    world = tmp_path / "gld"
    missing, asked = get(shop, world, landmarks=[8], revisited={})
    assert missing == [] and {a.partition("/")[0] for a in asked if a.endswith(".tar")} == {"train"}
    get(shop, world, landmarks=[9], revisited={})
    shutil.rmtree(world / ".fetch/notes")
    assert get(shop, world, landmarks=[9], revisited={}) == ([], [])


def test_a_trial_over_a_folder_of_before(shop, tmp_path):
    "Some tars first, then all: what somebody laid out is seen all the same."
    world = tmp_path / "gld"
    get(shop, world)
    shutil.rmtree(world / ".fetch")
    assert get(shop, world, n_tars=1)[0] == []
    assert get(shop, world) == ([], []) and complete(world)


def test_version_1_from_a_list(shop, tmp_path):
    world = tmp_path / "gld"
    shop.files |= {
        "s1600/a.jpg": photo(1, 1200, 900),
        "s1600/b.jpg": photo(2, 300, 200),
        "s1600/c.jpg": b"<html>gone</html>",
    }
    rows = [
        f"{i * 4},{shop.base}/s1600/{i[3]}.jpg,{n}" for n, i in enumerate(["000a", "000b", "000c", "000d"])
    ]
    (tmp_path / "v1.csv").write_text("\n".join(["id,url,landmark_id", *rows, "000f,None,None"]))
    given = dict(v1_urls=tmp_path / "v1.csv", wanted=["v1"])
    assert [get(shop, world, **given)[0] for _ in range(3)] == [["v1"], ["v1"], []]  # c may be a login
    df = read_images(world, "v1_train")
    assert df.landmark_id.tolist() == [0]
    with Image.open(df.path[0]) as im:
        assert im.size == (800, 600) and im.format == "JPEG"
    left = pd.read_csv(world / "v1/left_out.csv").why.tolist()
    assert "shorter side" in left[0] and "web page" in left[1] and "404" in left[2]
    assert get(shop, world, **given) == ([], [])


def list_of(path, urls):
    "A list of version 1 with these addresses."
    rows = [f"{n:016x},{url},{n}" for n, url in enumerate(urls)]
    path.write_text("\n".join(["id,url,landmark_id", *rows]))
    return dict(v1_urls=path, wanted=["v1"], revisited={})


def test_a_server_in_trouble_loses_no_photograph(shop, tmp_path):
    "403 to everybody is no verdict on a photograph; 404 is one, and so is a text that is no address."
    shop.files["a.jpg"], world = photo(1), tmp_path / "gld"
    shop.trouble["a.jpg"] = ("is_forbidden", 1)
    odd = ["http://a..b/x.jpg", "http://[abc/", "http://a b/x.jpg", "nonsense", f"{shop.base}/gone.jpg"]
    given = list_of(tmp_path / "v1.csv", [f"{shop.base}/a.jpg", *odd])
    missing = fetch_gld(world, **given, pause=0.01)
    assert missing.why.tolist() == ["1 photographs did not come yet (v1/left_out.csv)"]
    assert pd.read_csv(world / "v1/left_out.csv").asked.tolist() == [1] + 5 * [v1.ASKED]
    assert get(shop, world, **given) == ([], ["a.jpg"]) and len(read_ids(world, "v1_train")) == 1


def test_a_dead_host_is_given_up_after_three_runs(shop, tmp_path):
    given = list_of(tmp_path / "v1.csv", ["http://127.0.0.1:9/x.jpg"])
    assert [len(fetch_gld(tmp_path / "gld", **given, pause=0.001)) for _ in range(4)] == [1, 1, 0, 0]
    assert v1.photos_left(tmp_path / "gld", tmp_path / "v1.csv") == (1, 0)
    room = wish.Wish(tmp_path / "gld", **given)
    assert wish.room_for(room, wish.files_left(room))[0] == 0


def test_version_1_needs_room_too(shop, tmp_path):
    given = list_of(tmp_path / "v1.csv", [f"{shop.base}/a.jpg"])
    small = patch("shutil.disk_usage", return_value=shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    with small, pytest.raises(DiskError, match="nothing was begun"):
        get(shop, tmp_path / "gld", **given)
    assert shop.asked == []


def test_what_this_machine_refuses_is_no_fault_of_the_server(shop, tmp_path):
    (tmp_path / "a").mkdir()
    refused = PermissionError(errno.EACCES, "Permission denied")
    said = "x.part cannot be written .Permission denied"
    with (
        patch.object(download, "open", side_effect=refused, create=True),
        pytest.raises(DiskError, match=said),
    ):
        fetch(f"{shop.base}/metadata/test.csv", tmp_path / "x")
    assert len(shop.asked) == 1


def test_a_part_that_was_thrown_away_grows_again(shop, tmp_path):
    "Its old length is no mark that the new one has to pass, so that every try brings something."
    name = "train/images_000.tar"
    (tmp_path / "x.part").write_bytes(bytes(len(shop.files[name]) + 9))  # longer than the file: 416
    shop.trouble[name] = ("outgrown_then_breaks_off", 4)
    fetch(f"{shop.base}/{name}", tmp_path / "x", tries=2, pause=0.01)
    assert (tmp_path / "x").read_bytes() == shop.files[name]


def test_a_tar_as_recorded_that_is_none(shop, tmp_path):
    "Running again would not help, and the sentence says so."
    shop.tar("test", 0, TEST[:2], "readme-{0}.txt")
    assert get(shop, tmp_path / "gld", wanted=["test"], revisited={})[0] == ["test/images_000.tar"]
    assert "report it" in pd.read_csv(tmp_path / "gld/missing.csv").what_to_do[0]
    assert not list(tmp_path.rglob("*.tar"))


def test_a_list_that_is_none_is_a_sentence(tmp_path):
    (tmp_path / "v1.csv").write_text("id,url,landmark_id\n../x,http://a/b,1\n")
    words = ["landmark_fetch", str(tmp_path / "gld"), "--v1-urls", str(tmp_path / "v1.csv"), "--only", "v1"]
    with patch("sys.argv", words), pytest.raises(SystemExit, match="cannot be a file name"):
        fetching.main()


def test_the_line_is_down(shop, tmp_path):
    "No photograph of version 1 is given up because nobody could be reached."
    rows = [f"{n:016x},http://127.0.0.1:9/{n}.jpg,{n}" for n in range(120)]
    (tmp_path / "v1.csv").write_text("\n".join(["id,url,landmark_id", *rows]))
    missing = fetch_gld(
        tmp_path / "gld", v1_urls=tmp_path / "v1.csv", wanted=["v1"], revisited={}, pause=0.001
    )
    assert missing.why.tolist() == ["120 photographs: no server answers"]
    assert len(pd.read_csv(tmp_path / "gld/v1/left_out.csv")) == 0


def test_the_dry_run_says_what_it_costs(shop, tmp_path, capsys):
    world = tmp_path / "gld"

    def say(*words):
        with patch("sys.argv", ["landmark_fetch", str(world), "--dry-run", "--bucket", shop.base, *words]):
            fetching.main()
        return capsys.readouterr().out

    toy = ["--revisited", "rtoy=" + ",".join(shop.revisited["rtoy"])]
    said = say(*toy, "--mbit", "8")
    assert "the server" in said and "enough" in said and not world.exists()
    assert not [a for a, _ in shop.asked]  # HEAD only
    plan = fetching.plan_of(wish.Wish(world, shop.base, shop.revisited), mbit=8).set_index("group")
    size = sum(len(v) for k, v in shop.files.items() if k.startswith("train/"))
    assert plan.gb["train"] == pytest.approx(size / 1e9) and plan.hours["train"] == pytest.approx(
        size / 1e6 / 3600
    )
    shop.heads = False
    assert "published, about" in say(*toy)
    shop.heads = True
    del shop.files["index/images_001.tar"]
    assert "index/images_001.tar is not there" in say(*toy)
    get(shop, world, n_tars=1)
    plan = fetching.plan_of(wish.Wish(world, shop.base, shop.revisited)).set_index("group")
    assert plan.there.to_dict() == dict(tables=7, train=1, index=1, test=1, rtoy=3)
    assert "every tar is fetched once" in say(*toy, "--landmarks", "7")


def test_stage_00_fetches_then_checks(shop, tmp_path, monkeypatch):
    monkeypatch.setenv("LANDMARK_DATA", str(tmp_path))
    monkeypatch.setenv("LANDMARK_RUNS", str(tmp_path / "runs"))
    how = dict(world="gld", bucket=shop.base, revisited=shop.revisited, n_workers=1)
    tar = shop.files.pop("test/images_000.tar")
    with pytest.raises(
        ParameterError, match="1 files of .*gld are missing, test/images_000.tar first .*missing.csv"
    ):
        data.run(data.Config(**how))
    shop.files["test/images_000.tar"] = tar
    out = data.run(data.Config(**how, n_tars=1))
    sizes = pd.read_csv(out / "sizes.csv.gz", dtype=dict(image_id=str))
    assert sizes.split.value_counts().to_dict() == dict(
        v2_train=4, index=2, test=2, rtoy_index=2, rtoy_query=1
    )
    assert sizes[["width", "height"]].drop_duplicates().values.tolist() == [[320, 280]]
    out = data.run(data.Config(**how))
    assert pd.read_csv(out / "datasets.csv").values.tolist() == [["GLD-v2", 8, 3]]
    assert data.run(data.Config(**how)) == out


def test_both_names_are_one_folder(shop, tmp_path, monkeypatch):
    monkeypatch.setenv("LANDMARK_DATA", str(tmp_path))
    with pytest.raises(ParameterError, match="comes to be by stage 00 with world: gld"):
        data.find_world("gld")
    get(shop, tmp_path / "gld")
    assert data.find_world("gld") == data.find_world("data/gld") == tmp_path / "gld"


def test_addresses_that_are_none(tmp_path):
    for url in ("file:///etc/passwd", "ftp://a/b", "nonsense", "http://[::1/x", "http://a b/c"):
        with pytest.raises(DownloadError):
            fetch(url, tmp_path / "x", tries=1)
    assert download.size_of("http://127.0.0.1:9/x", 1) is None and not os.listdir(tmp_path)
