"""The tutorial's commands, one after the other, on the drawn scenes and in little time."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cassle_jax.data.families import open_drawn
from tests.tiny import on_one_device

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "tutorial.md").read_text()
COMMANDS = re.findall(r"```sh\npython (.*?)\n```", PAGE, re.DOTALL)
# What makes a command quick, by its module.
QUICKLY = {
    "cassle_jax.pretrain": (
        "--config.steps=2",
        "--config.batch_size=8",
        "--config.encoder.width=4",
        "--config.conditioning.depth=1",
        "--config.augment.size=32",
        "--config.data.canvas=32",
        "--config.optimizer.warmup_epochs=0",
    ),
    "cassle_jax.evaluate": ("--limit=32", "--analysed=16", "--batch=16", "--cache="),
    "cassle_jax.export": (),
}


def put(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


@pytest.mark.exhaustive
def test_every_command_of_the_page_runs_on_what_the_one_before_it_left(tmp_path):
    scenes = open_drawn("scenes", 400, 64, "train")
    for index in range(40):
        put(scenes[index].image, tmp_path / "photos" / f"{index % 3}" / f"{index}.jpg")
    for label, name in enumerate(scenes.class_names[:2]):
        for number, index in enumerate(np.flatnonzero(scenes.labels == label)[:20].tolist()):
            split = "train" if number < 15 else "test"
            put(scenes[index].image, tmp_path / "labelled" / split / name / f"{index}.png")
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    for command in COMMANDS:
        _, module, *arguments = command.split()
        subprocess.run(
            [sys.executable, "-m", module, *arguments, *QUICKLY[module]],
            cwd=tmp_path,
            env=on_one_device({**os.environ, "PYTHONPATH": os.pathsep.join(path)}),
            check=True,
        )
    assert (tmp_path / "runs" / "photos" / "views.png").exists()
    tasks = {"looked": {"neighbours", "spectrum", "invariance", "augmentation_probes"}}
    tasks["classified"] = {"linear", "knn"}
    for folder, wanted in tasks.items():
        report = json.loads((tmp_path / "runs" / folder / "report.json").read_text())
        findings = report["subjects"]["photos"]["runs"][0]
        assert {each["task"] for each in findings if each["kind"] != "failure"} == wanted
    assert "torchvision.safetensors" in (tmp_path / "exported" / "model_card.md").read_text()


def test_the_page_shows_every_step_once():
    assert [command.split()[1] for command in COMMANDS] == [
        "cassle_jax.pretrain",
        "cassle_jax.evaluate",
        "cassle_jax.evaluate",
        "cassle_jax.export",
    ]
