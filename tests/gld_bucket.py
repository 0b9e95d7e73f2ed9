"""A drawn world, served as the hosts of the real data serve theirs: a bucket, two benchmarks, addresses.

Images lie in tars at `a/b/c/<id>.jpg`, each tar with its md5 beside it; tables have the bucket's names.
The drawn benchmarks are handed out under the names of the real ones, in `.tgz` with the folders of those.
Version 1 is a list of addresses, and what they lead to is larger than a data set keeps.
"""

import contextlib
import hashlib
import http.server
import io
import pickle
import tarfile
import threading
from pathlib import Path

import pandas as pd
from PIL import Image

from landmark.parts.data.layout import read_ids, read_images, read_truth
from landmark.parts.data.revisited import read_ground_truth

N_TARS = 2  # of each split
NAMES = dict(rnorth="roxford5k", rsouth="rparis6k")  # drawn → served as
SOLUTIONS = ("retrieval_solution", "recognition_solution")


def packed(files: dict, mode: str) -> bytes:
    "An archive of files (name → bytes), with entries for its folders as the real ones have."
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:
        folders = {str(p) for name in files for p in Path(name).parents} - {"."}
        for folder in sorted(folders):
            info = tarfile.TarInfo(folder)
            info.type, info.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(info)
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def bucket_of(world: Path) -> dict:  # path below the bucket → bytes
    "Tables, tars and sums of a drawn world."
    v2, files = world / "v2", {}
    for name in ("train", "index", "test", "train_label_to_category", "index_image_to_landmark"):
        files[f"metadata/{name}.csv"] = (v2 / f"{name}.csv").read_bytes()
    for name in SOLUTIONS:
        files[f"ground_truth/{name}_v2.1.csv"] = (v2 / f"{name}.csv").read_bytes()
    files["metadata/train_clean.csv"] = published_clean(world).to_csv(index=False).encode()
    for split in ("train", "index", "test"):
        ids = read_ids(world, "v2_train" if split == "train" else split).tolist()
        places = {f"{i[0]}/{i[1]}/{i[2]}/{i}.jpg": v2 / split for i in ids}
        assert all(len(i) == 16 and int(i, 16) >= 0 for i in ids)
        for n in range(N_TARS):
            name, own = f"images_{n:03d}", list(places.items())[n::N_TARS]
            tar = packed({place: (home / place).read_bytes() for place, home in own}, "w")
            files[f"{split}/{name}.tar"] = tar
            sum_file = f"{hashlib.md5(tar).hexdigest()}  {name}.tar\n"
            files[f"md5sum/{split}/md5.{name}.txt"] = sum_file.encode()
    return files


def published_clean(world: Path) -> pd.DataFrame:
    "A `train_clean.csv` as the publishers could have made it: photos whose label is right, two or more."
    labels = read_images(world, "v2_train")[["image_id", "landmark_id"]]
    truth = read_truth(world)[["image_id", "true_landmark"]]
    right = labels.merge(truth).query("landmark_id == true_landmark")
    images = right.groupby("landmark_id").image_id.agg(list)
    return images[images.map(len) > 1].map(" ".join).rename("images").reset_index()


def benchmarks_of(world: Path) -> tuple:  # path → bytes; benchmark → paths of its archives and ground truth
    "The drawn benchmarks as their authors would serve them."
    files, places = {}, {}
    for drawn, name in NAMES.items():
        home = world / "revisited" / drawn
        truth = read_ground_truth(home / f"gnd_{drawn}.pkl")
        files[f"{name}/gnd_{name}.pkl"] = pickle.dumps(truth, protocol=2)
        images = {p.name: p.read_bytes() for p in sorted((home / "jpg").glob("*.jpg"))}
        parts = [images] if drawn == "rnorth" else [dict(list(images.items())[k::2]) for k in (0, 1)]
        for n, part in enumerate(parts):
            nested = part if drawn == "rnorth" else {f"paris/place{n}/{k}": v for k, v in part.items()}
            files[f"{name}/images_{n}.tgz"] = packed(nested, "w:gz")
        places[name] = [f for f in files if f.startswith(f"{name}/")]
    return files, places


def first_version(world: Path) -> dict:  # path → bytes
    "The photos of version 1 as the web has them: three times as large."
    files = {}
    for row in read_images(world, "v1_train").itertuples():
        out = io.BytesIO()
        with Image.open(row.path) as im:
            im.resize((3 * im.width, 3 * im.height)).save(out, "JPEG", quality=95)
        files[f"v1/{row.image_id}.jpg"] = out.getvalue()
    return files


class Served:
    "Where the data of a world is served."

    def __init__(self, base: str, files: dict, asked: list, places: dict):
        self.base, self.files, self.asked = base, files, asked
        self.bucket = f"{base}/google-landmark"
        self.revisited = {name: [f"{base}/{p}" for p in paths] for name, paths in places.items()}

    def v1_urls(self, world: Path, path: Path) -> Path:
        "Write the list of addresses of version 1: id, url, landmark_id."
        df = read_images(world, "v1_train")
        urls = [f"{self.base}/v1/{i}.jpg" for i in df.image_id]
        pd.DataFrame(dict(id=df.image_id, url=urls, landmark_id=df.landmark_id)).to_csv(path, index=False)
        return path


class _Files(http.server.BaseHTTPRequestHandler):
    "Files in memory, whole or from a byte on, as a bucket sends them."

    files, asked = {}, []

    def do_GET(self):
        name = self.path.lstrip("/")
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.asked.append(name)
        data = self.files.get(name)
        if data is None or (start and start >= len(data)):
            self.send_error(404 if data is None else 416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(data[start:])

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def served(world: Path):  # yields a `Served`
    "Serve a drawn world on a free port of this machine."
    benches, places = benchmarks_of(world)
    files = {f"google-landmark/{k}": v for k, v in bucket_of(world).items()} | benches | first_version(world)
    asked = []
    handler = type("Files", (_Files,), dict(files=files, asked=asked))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield Served(f"http://127.0.0.1:{server.server_port}", files, asked, places)
    finally:
        server.shutdown()
        server.server_close()
