# The graph of stages. Which steps there are stands in params/<profile>/; see nbs/graph.ipynb.
#   snakemake --cores all --config profile=mini seeds=1,2,3
#   snakemake --cores all --config profile=gld begin=official     what params/gld leaves open
#   make album DIR=folder              params/album with what it leaves open, by `--config given=file`
#   landmark_search run mini recipe    the trials of params/mini/search/recipe.yaml, by `--config search=recipe`
#   snakemake --cores all --resources gpu=8 --config profile=gld       one machine with eight GPUs
#   snakemake --profile profiles/slurm --config profile=gld            a cluster
import os
import re
from landmark import graph, preflight, search
from landmark.parts.config import read_yaml

os.environ.pop("LANDMARK_WORLD", None)             # a profile names its worlds itself

seeds = [int(s) for s in str(config.get("seeds", 1)).replace(",", " ").split()]
only = str(config.get("only", "")).split() or None
try:
    profile, wanted = str(config.get("profile", "mini")), str(config.get("search", ""))
    given = read_yaml(config["given"]) if "given" in config else {}    # what an album leaves open
    given |= {k: str(config[k]) for k in config.keys() - {"profile", "seeds", "only", "search", "given"}}
    if wanted and given:
        raise graph.ParameterError(f"a search takes params/{profile} as it is; {', '.join(given)} cannot be given")
    steps = search.plan(profile, wanted, seeds) if wanted else graph.plan(profile, seeds, only, given=given)
    STEPS = graph.with_shards(graph.prepare(steps))
    ASKED = graph.resources(profile, STEPS)
except graph.ParameterError as e:
    raise WorkflowError(str(e))

os.environ.setdefault("TQDM_MININTERVAL", "5")     # progress in a log: a line now and then
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE") # two stages side by side do not spin for a core

onstart:                                           # before the first step: nothing starts that cannot end
    try:
        preflight.check(steps, here=workflow.local_exec)
    except graph.ParameterError as e:
        raise WorkflowError(str(e))

rule all:
    input: [s.stamp for s in STEPS]
    default_target: True

for step, asked in zip(STEPS, ASKED):
    rule:
        name: re.sub(r"\W", "_", f"{step.stage}_{step.name}_seed{step.seed}")
        input: [u.stamp for u in step.upstream]
        output: step.stamp
        params: command=search.command(step)
        resources: **asked
        shell: "{params.command}"
