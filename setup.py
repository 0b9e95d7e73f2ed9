"Everything stands in settings.ini; this file only hands it to setuptools."

import os
import sys
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

cfg = ConfigParser(delimiters=["="], interpolation=None)
cfg.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
cfg = cfg["DEFAULT"]


def lines(key):
    return [line.strip() for line in cfg.get(key, "").splitlines() if line.strip()]


def requirements():
    """What settings.ini asks for. Two packages bring the module faiss, and a machine gets one of them:
    with FAISS=cpu the one without CUDA, with FAISS=gpu or no word the one that settings.ini names for it."""
    faiss, wanted = os.environ.get("FAISS", "gpu"), lines("requirements")
    if faiss not in ("gpu", "cpu"):
        sys.exit(f"FAISS is {faiss!r}; allowed are gpu and cpu")
    if faiss == "gpu":
        return wanted
    wanted = [line for line in wanted if not line.startswith("faiss-gpu")]
    return [line.partition(";")[0] if line.startswith("faiss-cpu") else line for line in wanted]


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    author=cfg["author"],
    license="Apache-2.0",
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["landmark", "landmark.*"]),
    package_data={"landmark": ["py.typed", "templates/*", "templates/*/*"]},
    install_requires=requirements(),
    extras_require={"dev": lines("dev_requirements")},
    entry_points={"console_scripts": lines("console_scripts"), "nbdev": ["landmark=landmark._modidx:d"]},
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    if (Path(__file__).parent / "README.md").exists()
    else "",
    long_description_content_type="text/markdown",
    zip_safe=False,
)
