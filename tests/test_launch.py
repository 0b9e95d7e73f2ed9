"The same training, started in the three ways that people start one on several devices."

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
WAYS = dict(
    own=[],
    torchrun=["torch.distributed.run", "--nproc_per_node", "2"],
    accelerate=[
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ],
)
PARAMETERS = dict(
    world="tiny", device="cpu", backbone="test_resnet", dim=8, sizes=64, epochs=1, batch_size=8, n_workers=1
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    "Weights by the way of starting, each by the console script with the same parameters."
    runs, out = tmp_path_factory.mktemp("launch"), {}
    script = runs / "train.py"
    script.write_text('from landmark.train import main\nif __name__ == "__main__": main()\n')
    for way, launcher in WAYS.items():
        given = dict(PARAMETERS, name=way, **(dict(devices=2) if way == "own" else {}))
        cmd = [
            sys.executable,
            *(["-m", *launcher] if launcher else []),
            str(script),
            *(x for k, v in given.items() for x in ("-p", k, str(v))),
        ]
        p = subprocess.run(
            cmd,
            env={**os.environ, "PYTHONPATH": str(ROOT), "LANDMARK_RUNS": str(runs), "HOME": str(runs)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert p.returncode == 0, p.stderr[-3000:]
        out[way] = load_file(next(runs.glob(f"tiny/seed1/train/{way}-*/arcface_v1/weights.safetensors")))
    return out


@pytest.mark.parametrize("way", ["torchrun", "accelerate"])
def test_a_launcher_trains_what_devices_trains(weights, way):
    assert all((v == weights["own"][k]).all() for k, v in weights[way].items())
