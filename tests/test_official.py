"`clean: official`: a list that comes with the data trains and votes; one that does not fit is refused."

import pandas as pd
import pytest

from landmark import rerank, tables, train
from landmark.parts.core import ParameterError, read_json, write_csv, write_json
from landmark.parts.data.layout import OFFICIAL, clean_list, read_truth
from landmark.parts.data.worlds import make_world, world_of
from landmark.parts.descriptors.store import open_store
from landmark.parts.local.cleaning import clean_table

SMALL = dict(backbone="test_resnet", dim=8, sizes="64", epochs=1, batch_size=8, device="cpu", n_workers=1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "A drawn world with a published list of its own: the images that show their label."
    with pytest.MonkeyPatch.context() as m:
        m.setenv("LANDMARK_RUNS", str(tmp_path_factory.mktemp("runs")))
        truth = read_truth(make_world("tiny"))
        v2 = truth[truth.split == "v2_train"]
        right = (v2.landmark_id == v2.true_landmark).to_numpy()
        kept = clean_table(v2.image_id.to_numpy(), v2.landmark_id.to_numpy(), right)
        write_csv(kept, make_world("tiny") / "v2" / "train_clean.csv")
        yield kept


@pytest.fixture
def published(runs):
    "The list, put back after a test has spoilt it."
    path = make_world("tiny") / "v2" / "train_clean.csv"
    yield path
    write_csv(runs, path)


def config(**more):
    return train.Config(**dict(SMALL, world="tiny", train_set="v2-clean", clean=OFFICIAL) | more)


def test_the_published_list_is_trained_on(runs):
    out = train.run(config())
    (row,) = pd.read_csv(out / "models.csv").itertuples()
    assert (row.images, row.classes) == (sum(len(x.split()) for x in runs.images), len(runs))
    assert set(read_json(out / "arcface_v2-clean/card.json")["data"]) == {"world", "clean"}
    assert any(p.endswith("/v2") for p in read_json(out / "manifest.json")["inputs"])


def test_another_list_is_another_training(runs, published):
    first = train.run(config(name="twice"))
    made = read_json(first / "manifest.json")["fingerprint"]
    write_csv(runs.iloc[:-1], published)
    again = train.run(config(name="twice"))
    assert first == again and read_json(again / "manifest.json")["fingerprint"] != made
    assert pd.read_csv(again / "models.csv").classes.item() == len(runs) - 1


def bad(kept, what):
    "A list that does not fit, and what is said of it."
    first, second = kept.images.str.split().str[0].iloc[:2]
    spoilt = dict(
        unknown=(kept.assign(images=[*kept.images[:-1], "00ff"]), "images that v2/train.csv does not have"),
        twice=(
            kept.assign(images=[f"{x} {first}" for x in kept.images]),
            f"{first} is listed twice, under label",
        ),
        other=(kept.assign(landmark_id=kept.landmark_id.to_numpy()[::-1]), f"row 2: {first} has label"),
        label=(kept.assign(landmark_id=[987654, *kept.landmark_id[1:]]), "has label 987654, in v2/train.csv"),
        empty=(kept.assign(images=["", *kept.images[1:]]), "row 2: label .* has no image"),
        nothing=(kept.iloc[:0], "has no images"),
    )
    return spoilt[what]


@pytest.mark.parametrize("what", ["unknown", "twice", "other", "label", "empty", "nothing"])
def test_a_list_that_does_not_fit_is_refused(runs, published, what):
    spoilt, says = bad(runs, what)
    write_csv(spoilt, published)
    with pytest.raises(ParameterError, match=says):
        train.run(config(name=what))


def test_without_the_list(runs, published):
    published.unlink()
    for run in (train.run, rerank.run):
        Config = train.Config if run is train.run else rerank.Config
        more = SMALL | dict(train_set="v2-clean") if run is train.run else {}
        with pytest.raises(ParameterError, match="clean is official, but .*train_clean.csv is not there"):
            run(Config(world="tiny", clean=OFFICIAL, **more))


def test_only_the_published_images_vote(runs):
    cfg = rerank.Config(world="tiny", clean=OFFICIAL, methods=["baseline", "sort+insert"], device="cpu")
    world = world_of(cfg)
    assert clean_list(cfg, world) == world / "v2" / "train_clean.csv"
    out = rerank.run(cfg)
    assert {"baseline", "sort+insert"} == set(pd.read_csv(out / "metrics.csv").method)
    store = open_store(out / "made_up/arcface_v2/v2_train")
    kept = set(" ".join(runs.images).split())
    for clean, n in ((clean_list(cfg, world).parent, len(kept)), (None, len(store))):
        voting, labels = rerank.voters(cfg, world, store, clean)
        assert len(voting) == len(labels) == n
    assert len(kept) < len(store) and str(world / "v2") in read_json(out / "manifest.json")["inputs"]


def test_the_tables_say_what_training_began_with(tmp_path, monkeypatch):
    "Of real collections only: drawn worlds and albums have the table they had."
    monkeypatch.setenv("LANDMARK_RUNS", str(tmp_path))
    rows = [("arcface_v2-clean", "baseline", "gld_private", "mAP@100", 0.3, 9)]
    columns = ["model", "method", "benchmark", "metric", "value", "n_queries"]

    def artifact(name, said, config, **files):
        for file, t in files.items():
            write_csv(t, tmp_path / name / f"{file}.csv")
        write_json(
            tmp_path / name / "manifest.json", dict(config=config | dict(seed=1), metrics=said, outputs={})
        )
        return [str(tmp_path / name)]

    started = dict(train_set=["v2", "v2-clean"], pretrained=True, weights="", clean=OFFICIAL)
    given = dict(
        train=artifact("train", {}, started),
        models=artifact("models", {}, {}, metrics=pd.DataFrame(rows, columns=columns)),
    )
    said = {}
    for drawn in (True, False):
        data = artifact(f"data{drawn}", dict(drawn=drawn, album=False), {})
        out = tables.run(tables.Config(name=f"drawn{drawn}", data=data, n_boot=10, **given))
        said[drawn] = pd.read_csv(out / "training.csv")
    assert said[False]["training begins with"].tolist() == ["ImageNet, published clean set"]
    assert list(said[True]) == [c for c in said[False] if c != "training begins with"]
