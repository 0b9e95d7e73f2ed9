"An album, from a folder of labelled photos to its tables and its model."

import dataclasses
import importlib

import pandas as pd
import pytest
import yaml

from landmark import album, explore
from landmark.parts.core import ParameterError, read_json, write_text
from landmark.parts.data.layout import read_truth
from landmark.parts.data.worlds import make_world
from landmark.parts.nets.weights import weights_here

needs = {"xfeat", "tf_efficientnet_lite0"}
pytestmark = pytest.mark.skipif(
    not needs <= set(weights_here()), reason="the weights of XFeat and EfficientNet-Lite0 are not here"
)


@pytest.fixture(scope="module")
def town(tmp_path_factory):
    "A folder with a sub-folder for each landmark of the tiny world."
    world, home = make_world("tiny", 1), tmp_path_factory.mktemp("a town") / "my town"
    truth = read_truth(world)
    shown = truth[(truth.true_landmark >= 0) & truth.split.isin(["v2_train", "index", "test"])]
    for t in shown.itertuples():
        place = home / f"place {t.true_landmark}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{t.image_id}.jpg").symlink_to((world / t.path).resolve())
    return home


@pytest.fixture(scope="module")
def runs(town, tmp_path_factory):
    "The album's runs, every step in this process."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LANDMARK_RUNS", str(tmp_path_factory.mktemp("runs")))
        given = album.given_of(town, v1="0")
        given = album.check(given)
        home = album.runs_dir() / given["runs"]
        write_text(home / "given.yaml", yaml.safe_dump(given))
        for step in album.steps_of(given):
            small = dict(n_workers=1) if hasattr(step.cfg, "n_workers") else {}
            importlib.import_module(f"landmark.{step.stage}").run(dataclasses.replace(step.cfg, **small))
        yield home


def test_every_stage_leaves_its_tables(runs):
    tables = {p.stem for p in album.tables_of(runs).glob("*.csv")}
    assert {"datasets", "reranking", "recognition", "cleaners", "separation"} <= tables
    assert not {"losses", "kept", "no_noise"} & tables  # no clean set, and nobody knows what is right
    reranking = pd.read_csv(album.tables_of(runs) / "reranking.csv").set_index("method")
    assert float(reranking.Private["baseline"]) > 20


def test_what_is_kept_holds_numbers_only(runs, tmp_path):
    out = album.keep(runs, out=tmp_path / "kept")
    assert {p.suffix for p in out.rglob("*") if p.is_file()} == {".csv", ".md", ".json"}
    assert read_json(out / "report.json")["command"] == "make album DIR='my town' NOISE=0 SEEDS=\"1\""
    assert str(runs) not in (out / "report.json").read_text()
    counts = pd.read_csv(out / "tables" / "counts.csv")
    assert {"v2_train", "index", "test"} <= set(counts.split)


def test_its_model_describes_other_photos(runs):
    model = explore.album_model()
    assert model == explore.album_model("my-town") and (model / "card.json").exists()
    with pytest.raises(ParameterError, match="no finished album yours"):
        explore.album_model("yours")
