"The parameter files of the profile gld against the original's recipe, as papers and public code state it."

import dataclasses

import pytest

from landmark import graph, train
from landmark.parts.core import project_root
from landmark.parts.images.batching import BINS3, BINS5, SIZES

FISHNET, RESNET, SERESNEXT = "fishnet150_wide", "resnet101.tv_in1k", "legacy_seresnext101_32x4d"
# model: backbone, pooling, loss, margin, cleaned with (verify, freq), epochs planned + scale-up, epochs run,
#        augmentation, sizes, scale-up, parent's margin
MODELS = dict(
    v19c=(FISHNET, "G,G,G,G", "cosface", 0.3, (30, 2), (4, 1), 5, "soft", "S2", "M2", 0.3),
    v20c=(SERESNEXT, "gem", "arcface", 0.3, (30, 3), (7, 0), 6, "middle", "SS2", "", 0.3),
    v21c=(RESNET, "gem", "arcface", 0.3, (30, 3), (6, 1), 7, "middle", "SS2", "SM2", 0.3),
    v22c=(FISHNET, "G,G,G,G", "arcface", 0.3, (30, 2), (4, 1), 5, "soft", "S2", "M2", 0.4),
    v23c=(FISHNET, "G,G,G,G", "arcface", 0.3, (30, 3), (6, 1), 7, "middle", "S2", "SM2", 0.3),
    v24c=(SERESNEXT, "gem", "cosface", 0.3, (30, 3), (7, 0), 6, "middle", "SS2", "", 0.3),
)
COMMON = dict(
    dim=512,
    s=30.0,
    optimizer="sgd",
    lr=1e-3,
    lr_end=3e-6,
    warmup=0.0,
    weight_decay=1e-5,
    clip=0.0,
    accumulate=1,
    batch_size=32,
    drop_uneven=True,
    label_smoothing=0.0,
    frozen_bn=False,
)
STEPS = {(s.stage, s.name): s for s in graph.plan("gld")}
FILES = graph.read_profile("gld")


def upstream(name, stage):
    return FILES["train", name][dict(train="parent", clean="clean")[stage]].removeprefix(f"@{stage}/")


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_the_ensemble(name):
    backbone, pooling, loss, margin, cleaned, (epochs, up), run, augment, sizes, scale_up, parent_margin = (
        MODELS[name]
    )
    cfg = STEPS["train", name].cfg
    assert (cfg.backbone, cfg.pooling, cfg.loss, cfg.margin, cfg.augment, cfg.sizes, cfg.scale_up) == (
        backbone,
        pooling,
        loss,
        margin,
        augment,
        sizes,
        scale_up,
    )
    assert (cfg.epochs, cfg.scale_up_epochs if cfg.scale_up else 0) == (epochs, up) and (
        cfg.stop_after or epochs + up
    ) == run
    assert cfg.train_set == "v1+v2-clean"
    clean = STEPS["clean", upstream(name, "clean")].cfg
    assert (clean.min_inliers, clean.min_verified) == cleaned
    parent = STEPS["train", upstream(name, "train")].cfg
    assert (
        parent.train_set == "v1"
        and parent.epochs == 5
        and not parent.scale_up
        and loss in train.listed(parent.loss)
    ), "it starts from its own loss on v1"
    assert (parent.backbone, parent.pooling, parent.dim, parent.margin or 0.3) == (
        backbone,
        pooling,
        512,
        parent_margin,
    )
    assert parent.pretrained or parent.weights, "v1 starts from ImageNet weights"
    assert f"@train/{name}" in FILES["extract", "ensemble"]["models"], (
        "every model of the ensemble is extracted"
    )


@pytest.mark.parametrize("name", sorted(n for s, n in FILES if s == "train"))
def test_what_all_trainings_share(name):
    cfg = STEPS["train", name].cfg
    assert {k: getattr(cfg, k) for k in COMMON} == COMMON
    recipe = train.recipe_of(cfg)
    assert (
        recipe.momentum == 0.9
        and recipe.epochs == cfg.epochs
        and recipe.scale_up == cfg.scale_up
        and not cfg.in_memory
    )
    assert {f.name for f in dataclasses.fields(recipe)} - {f.name for f in dataclasses.fields(cfg)} == {
        "momentum",
        "min_batch",
        "rising",
    }, "the config states everything else"


def test_the_ablations():
    "One step for each loss and for each training set, so that as many GPUs train side by side."
    losses = {n: STEPS["train", n].cfg for s, n in STEPS if n.startswith("resnet101_v1-")}
    sets = {n: STEPS["train", n].cfg for s, n in STEPS if n.startswith("resnet101_v2-")}
    assert sorted(c.loss for c in losses.values()) == ["arcface", "contrastive", "cosface", "softmax"]
    assert {c.train_set for c in losses.values()} == {"v1"}
    assert sorted(c.train_set for c in sets.values()) == ["v1+v2", "v1+v2-clean", "v2", "v2-clean"]
    assert {c.loss for c in sets.values()} == {"arcface"}
    assert {c.backbone for c in [*losses.values(), *sets.values()]} == {RESNET}


def test_the_sizes():
    "As published, width × height."
    as_written = {
        "S2": "512×352 512×384 448×448 384×512 352×512",
        "SS2": "480×320 480×352 384×384 352×480 320×480",
        "SM2": "736×512 704×544 608×608 544×704 512×736",
        "M2": "800×544 800×608 704×704 608×800 544×800",
        "L2": "800×544 800×608 800×800 608×800 544×800",
        "S": "512×384 448×448 384×512",
        "M": "800×608 704×704 608×800",
        "L": "800×608 800×800 608×800",
    }
    assert {k: " ".join(f"{w}×{h}" for w, h in SIZES[k]) for k in as_written} == as_written
    assert BINS5 == (0.67, 0.77, 1.33, 1.5) and BINS3 == (0.77, 1.33)


def test_every_method_ranks_once_and_the_hungry_ones_apart():
    from landmark import rerank

    small, large = (dict(FILES["rerank", n]) for n in ("ensemble", "ensemble_memory"))
    methods = small.pop("methods"), large.pop("methods")
    ranked = sorted(
        m.name for m in rerank.METHODS.values() if not m.needs_local
    )  # verification is for small sets
    assert sorted(sum(methods, [])) == ranked and {"dba", "diffusion", "k_reciprocal"} <= {*methods[1]}
    assert {k: small[k] for k in large} == large and not {*small} - {*large} - {
        "clean",
        "insert_thresh",
        "queries",
        "submit",
    }, "the same descriptors"
    assert {f"@rerank/{n}" for n in ("ensemble", "ensemble_memory")} == {*FILES["tables", "main"]["rerank"]}


@pytest.mark.parametrize("stage", ["rerank", "recognize"])
def test_the_weights_of_the_ensemble(stage):
    weights = dict(v19c=0.5, v20c=1, v21c=1, v22c=0.5, v23c=1, v24c=1)
    models = [m.removeprefix("@train/") for m in FILES["extract", "ensemble"]["models"]]
    assert dict(zip(models, FILES[stage, "ensemble"]["weights"], strict=True)) == weights
    for name, weight in weights.items():
        first = (
            (project_root() / "params" / "gld" / "train" / f"{name}.yaml")
            .read_text(encoding="utf-8")
            .splitlines()[0]
        )
        assert first.startswith(f"# {name} of the ensemble, weight {weight:g}")
