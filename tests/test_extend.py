"A new loss and a new backbone are a handful of lines in one place: those that CONTRIBUTING.md shows."

import json

import pytest
import torch
from conftest import contributing

from landmark import search, train
from landmark.parts.artifacts import identity
from landmark.parts.config import make_config, parameter_help
from landmark.parts.core import ParameterError
from landmark.parts.data.worlds import make_world
from landmark.parts.nets import backbones, losses
from landmark.parts.nets.backbones import BACKBONES, make_backbone
from landmark.parts.nets.checkpoints import load_model
from landmark.parts.nets.losses import LOSSES, make_head

SMALL = dict(world="tiny", sizes="64", dim=16, epochs=1, n_workers=1, device="cpu", name="new")


@pytest.fixture(autouse=True)
def registries(tmp_path, monkeypatch):
    "What is registered here is forgotten afterwards; runs lie beside a world that is drawn already."
    world = make_world("tiny", 1)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "worlds").symlink_to(world.parent)
    monkeypatch.setenv("LANDMARK_RUNS", str(tmp_path / "runs"))
    before = [(registry, dict(registry)) for registry in (LOSSES, BACKBONES)]
    yield
    for registry, old in before:
        registry.clear()
        registry.update(old)


def register_normface():
    "As a cell of nets/losses would."
    exec(contributing("normface"), dict(vars(losses)))


def register_two_convs():
    "As a cell of nets/backbones would."
    exec(contributing("two_convs"), dict(vars(backbones)))


def test_a_new_loss_trains_with_its_own_parameter(monkeypatch):
    register_normface()
    heads, usual = [], make_head
    monkeypatch.setattr(train, "make_head", lambda *a, **k: heads.append(usual(*a, **k)) or heads[-1])
    plain = make_config(train.Config, dict(SMALL, loss="normface"))
    cfg = make_config(train.Config, dict(SMALL, loss="normface", temperature="0.1"))
    out = train.run(cfg)
    assert [h.temperature for h in heads] == [0.1], "the parameter reaches the loss"
    card = json.loads((out / "normface_v1" / "card.json").read_text())
    assert card["loss"] == "normface" and card["result"]["loss"] > 0
    assert card["params"]["options"] == card["recipe"]["options"] == dict(temperature=0.1)
    assert identity(cfg)["options"] == dict(temperature=0.1) and "options" not in identity(plain)
    assert train.run(cfg) == out and len(heads) == 1, "found finished"
    assert train.stage_dir("train", plain) != out, "another temperature is another result"


def test_a_misspelt_parameter_is_refused_with_the_near_name():
    with pytest.raises(ParameterError, match="no parameter `temperature`"):
        make_config(train.Config, dict(SMALL, temperature=0.1))
    register_normface()
    with pytest.raises(ParameterError, match="no parameter `temprature`, did you mean `temperature`"):
        make_config(train.Config, dict(SMALL, loss="normface", temprature=0.1))
    with pytest.raises(ParameterError, match="`temperature` is 'warm'"):
        make_config(train.Config, dict(SMALL, loss="normface", temperature="warm"))
    assert "  temperature = 0.05" in parameter_help(train.Config)


def test_a_parameter_needs_a_loss_that_has_it():
    "Of several losses one is enough; the others do not see it."
    register_normface()
    alone = make_config(train.Config, dict(SMALL, loss=["arcface", "softmax"], temperature=0.1))
    with pytest.raises(ParameterError, match="none of arcface, softmax has it; normface has"):
        train.run(alone)
    with pytest.raises(ValueError, match="`temperature` is set, but arcface has none; normface has"):
        make_head("arcface", 8, torch.ones(3), temperature=0.1)
    both = make_config(train.Config, dict(SMALL, loss=["arcface", "normface"], temperature=0.1))
    assert train.model_names(both) == ["arcface_v1", "normface_v1"]
    nets = [train.start_training(both, name, torch.arange(3)) for name in train.model_names(both)]
    assert not hasattr(nets[0].head, "temperature") and nets[1].head.temperature == 0.1


def test_a_checkpoint_belongs_to_its_parameter(tmp_path):
    register_normface()
    cfg = make_config(train.Config, dict(SMALL, loss="normface", temperature=0.1))
    train.train_model((cfg, "normface_v1", tmp_path / "a", False))
    (tmp_path / "a" / "normface_v1" / "card.json").unlink()
    other = make_config(train.Config, dict(SMALL, loss="normface", temperature=0.2))
    with pytest.raises(ValueError, match="made with another recipe: options differ"):
        train.train_model((other, "normface_v1", tmp_path / "a", False))


def test_a_search_over_a_parameter_of_a_loss(monkeypatch):
    register_normface()
    grid = dict(base="v1", change=dict(loss="normface"), grid=dict(temperature=[0.05, 0.1, 0.2]))
    monkeypatch.setattr(search, "read_search", lambda profile, name: grid)
    found = search.trials("tiny", "heat")
    assert [t["temperature"] for t in found.values()] == [0.05, 0.1, 0.2]
    steps = [s for s in search.plan("tiny", "heat") if isinstance(s, search.Trial)]
    assert [s.cfg.options for s in steps] == [{}, dict(temperature=0.1), dict(temperature=0.2)]
    assert len({s.dir for s in steps}) == 3
    grid["grid"] = dict(temprature=[0.1])
    with pytest.raises(ParameterError, match="did you mean `temperature`"):
        search.trials("tiny", "heat")


@pytest.mark.parametrize("pooling", ["gem", "MG,G"])
def test_a_new_backbone_trains(pooling):
    register_two_convs()
    out = train.run(make_config(train.Config, dict(SMALL, backbone="two_convs", pooling=pooling)))
    model = load_model(out / "arcface_v1")
    assert model(torch.zeros(1, 3, 64, 96, dtype=torch.uint8)).shape == (1, 16)
    assert model.backbone.channels == (32 if pooling == "gem" else [16, 32])


def test_a_name_is_given_once():
    register_two_convs()
    with pytest.raises(ValueError, match="There is a backbone 'two_convs' already"):
        backbones.backbone("two_convs")(torch.nn.Identity)
    with pytest.raises(ValueError, match="There is a loss 'arcface' already"):
        losses.loss("arcface")(losses.SoftmaxHead)
    with pytest.raises(
        ValueError, match="neither fishnet150 nor fishnet150_wide nor two_convs nor a model of timm"
    ):
        make_backbone("three_convs")
