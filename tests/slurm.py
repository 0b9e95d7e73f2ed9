"""A Slurm of one machine, in a folder: authentication, controller and a node with two GPUs that are none.

Slurm hands a GPU out as a device file and as its number in CUDA_VISIBLE_DEVICES, whatever the file is. So
/dev/zero and /dev/null show on any machine whether two jobs get the same one.
"""

import getpass
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

CONF = """
ClusterName=landmark
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={home}/munge.socket
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=2
MinJobAge=3600
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 CPUs=64 RealMemory=1000000 Gres=gpu:2
PartitionName=all Nodes=node1 Default=YES MaxTime=INFINITE State=UP
"""
GRES = "Name=gpu File=/dev/zero\nName=gpu File=/dev/null\n"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "sinfo")


class NoSlurm(Exception):
    "Slurm is not here, or does not start."


def free_ports(n):
    "Ports that nobody listens on."
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [s.getsockname()[1] for s in held]
    for s in held:
        s.close()
    return ports


class Cluster:
    "Starts the three daemons and ends them again."

    def __init__(self, home):
        self.home, self.daemons = Path(home), []
        self.env = {**os.environ, "SLURM_CONF": str(self.home / "slurm.conf")}

    def __enter__(self):
        path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
        if absent := [p for p in PROGRAMS if not shutil.which(p, path=path)]:
            raise NoSlurm(f"Slurm is not installed: there is no {', '.join(absent)}")
        self._lend_srun(path)
        for folder in ("state", "spool"):
            (self.home / folder).mkdir(parents=True)
        self.home.chmod(0o755)
        (self.home / "munge.key").write_bytes(os.urandom(128))
        (self.home / "munge.key").chmod(0o600)
        values = dict(host=socket.gethostname(), user=getpass.getuser(), home=self.home, ports=free_ports(2))
        (self.home / "slurm.conf").write_text(CONF.format(**values))
        (self.home / "gres.conf").write_text(GRES)
        files = ("key-file=munge.key", "socket=munge.socket", "pid-file=munge.pid", "seed-file=munge.seed")
        self._start(
            "munged", "--foreground", "--force", *(f"--{f.replace('=', f'={self.home}/')}" for f in files)
        )
        self._wait(lambda: (self.home / "munge.socket").exists())
        self._start("slurmctld", "-D", "-i")
        self._start("slurmd", "-D", "-N", "node1")
        self._wait(lambda: "idle" in self.run("sinfo", "-h", "-o", "%T"))
        return self

    def __exit__(self, *_):
        self.run("scancel", "--user", getpass.getuser())
        end = time.time() + 20
        while self.run("squeue", "-h") and time.time() < end:
            time.sleep(0.3)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def _lend_srun(self, path):
        "Snakemake starts a job's command by srun, without SLURM_CONF; this one knows where it is."
        srun = self.home / "bin" / "srun"
        srun.parent.mkdir(parents=True)
        conf, real = self.env["SLURM_CONF"], shutil.which("srun", path=path)
        srun.write_text(f'#!/bin/sh\nSLURM_CONF="{conf}" exec {real} "$@"\n')
        srun.chmod(0o755)
        self.env["PATH"] = f"{srun.parent}:{path}"

    def _start(self, name, *options):
        with open(self.home / f"{name}.log", "wb") as log:
            self.daemons.append(subprocess.Popen([name, *options], env=self.env, stdout=log, stderr=log))

    def _wait(self, is_ready, seconds=60):
        "Until it is ready, or a daemon has given up."
        end = time.time() + seconds
        while not is_ready():
            dead = [d.args[0] for d in self.daemons if d.poll() is not None]
            if dead or time.time() > end:
                name = dead[0] if dead else self.daemons[-1].args[0]
                said = (self.home / f"{name}.log").read_text(errors="replace").strip().splitlines()
                self.__exit__()
                raise NoSlurm(f"{name} does not start here: {said[-1] if said else 'it says nothing'}")
            time.sleep(0.3)

    def run(self, *command):
        "What a program of Slurm says; nothing while the controller does not answer."
        done = subprocess.run(command, env=self.env, capture_output=True, text=True)
        return done.stdout if done.returncode == 0 else ""
