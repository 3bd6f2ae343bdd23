"""Settings that change nothing, since what they belong to is off, are named; the others are not."""

import dataclasses
from unittest.mock import MagicMock

import pytest

from cassle_jax.checks import ConfigError
from cassle_jax.methods import AUXILIARIES
from cassle_jax.sweep import experiment
from cassle_jax.sweep import sweep as sweep_module
from cassle_jax.sweep.space import SweepRequest, parsed
from cassle_jax.sweep.table import Row, Table
from cassle_jax.training.idle import idle_settings
from tests.commands import run_command

CIFAR = "configs/cifar10.py"


def idle(arguments, *settings):
    """The lines for `name=value` settings, given with a config of these arguments."""
    config = parsed([f"--config={CIFAR}:{arguments}", *(f"--config.{each}" for each in settings)])
    return idle_settings(config, [each.partition("=")[0] for each in settings])


@pytest.mark.parametrize("name", AUXILIARIES)
def test_every_setting_of_an_auxiliary_objective_needs_its_weight(name):
    config = parsed([f"--config={CIFAR}:{name}=main"])
    given = [f"{name}.{each}" for each, value in config[name].items() if value]
    assert given and not idle_settings(config, given)
    config[name].update(AUXILIARIES[name].settings("none"))
    numbers = [
        f"{name}.{field.name}"
        for field in dataclasses.fields(AUXILIARIES[name])
        if field.name not in ("weight", "weights") and config[name].get(field.name)
    ]
    lines = idle_settings(config, numbers)
    assert [line.partition("=")[0] for line in lines] == numbers
    assert all(line.endswith(f"has no effect with {name}=none") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "settings", "line"),
    [
        ("", ["augself.stage=3"], "augself.stage=3 has no effect with augself=none"),
        ("conditioning=none", ["conditioning.depth=2"], "conditioning.depth=2 has no effect with"),
        ("", ["conditioning.hypernetwork_bn=True"], "with conditioning.treatment='mlp'"),
        ("", ["conditioning.treatment=raw", "conditioning.width=8"], "conditioning.width=8 has"),
        ("", ["augment.jitter=0.0", "augment.hue=(0.0,0.1)"], "with augment.jitter=0.0"),
        ("", ["augment.blur=0.0", "augment.sigma=(0.1,0.2)"], "with augment.blur=0.0"),
        ("", ["augment.solarize_after=blur"], "with augment.solarize=0.0"),
        ("", ["augment.crop=False", "augment.crop_area=(0.1,1.0)"], "with augment.crop=False"),
        ("essl=main", ["augment.crop=False", "essl.crop_area=(0.1,0.2)"], "augment.crop=False"),
        ("", ["augment.asymmetric=True", "augment.blur=0.0"], "blur=0.0 has no effect with"),
        ("essl=main", ["augment.asymmetric=True", "augment.solarize=0.5"], "asymmetric=True"),
        ("", ["data.source=scenes", "data.path=mine"], "data.path='mine' has no effect with"),
        ("", ["data.scenes=9"], "data.scenes=9 has no effect with data.source='tfds'"),
        ("", ["data.source=folder", "data.name=mine"], "with data.source='folder'"),
        ("", ["encoder.patch_size=4"], "with encoder.name='resnet18'"),
        ("method=swav", ["method.queue_size=0", "method.queue_start=2.0"], "queue_start=2.0 has"),
        ("method=swav", ["method.small_crops=0", "method.small_crop_size=8"], "crop_size=8 has"),
        (
            "method=swav",
            ["method.freeze_prototypes_steps=9", "method.freeze_prototypes_epochs=2.0"],
            "freeze_prototypes_epochs=2.0 has no effect with method.freeze_prototypes_steps=9",
        ),
        ("", ["optimizer.name=adamw", "optimizer.momentum=0.8"], "with optimizer.name='adamw'"),
        ("", ["probe.every_epochs=0", "probe.train_images=9"], "with probe.every_epochs=0"),
        ("", ["weights.networks=encoder"], "with weights.path=''"),
        ("", ["steps=9", "epochs=3"], "epochs=3 has no effect with steps=9"),
    ],
)
def test_a_setting_of_what_is_off_is_named(arguments, settings, line):
    found = idle(arguments, *settings)
    assert len(found) == 1 and line in found[0]


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        ("augself=main", ["augself.stage=3"]),
        ("", ["equimod.weight=1.0", "equimod.hidden=64", "augself.color=0.0"]),
        ("", ["conditioning.treatment=hypernetwork", "conditioning.hypernetwork_bn=True"]),
        ("", ["conditioning.treatment=none"]),
        ("conditioning=none", ["conditioning.dropout=0.5"]),  # which is refused
        ("", ["optimizer.name=sdg", "optimizer.momentum=0.8"]),  # and so is this
        ("", ["augment.asymmetric=True", "augment.sigma=(1,2)", "augment.solarize_after=blur"]),
        ("method=swav", ["method.queue_start=2.0", "method.small_crop_size=8"]),
        ("", ["encoder.name=vit_tiny", "encoder.patch_size=4", "optimizer.name=lars"]),
        ("", ["optimizer.momentum=0.8", "epochs=3", "probe.train_images=9", "data.name=mine"]),
        ("", ["data.source=folder", "data.path=mine", "data.classes=names.txt"]),
    ],
)
def test_a_setting_of_what_is_on_is_not(arguments, settings):
    assert idle(arguments, *settings) == []


@pytest.mark.parametrize(("auxiliary", "named"), [("none,none", True), ("none,main", False)])
def test_a_sweep_and_a_table_name_what_does_nothing_in_any_run(
    tmp_path, caplog, monkeypatch, auxiliary, named
):
    said = "augself.stage=3 has no effect with augself=none"
    stops = {"side_effect": ConfigError("nothing is run here")}
    for owner in (sweep_module, experiment):
        monkeypatch.setattr(owner, "folder_held", MagicMock(**stops))
    arguments = auxiliary.split(",")
    rows = tuple(Row(str(i), f"{CIFAR}:augself={each}") for i, each in enumerate(arguments))
    with pytest.raises(ConfigError, match="nothing is run here"):
        experiment.run_table(
            Table("A", "B", rows, overrides=("data.source=scenes",)),
            tmp_path,
            overrides=("augself.stage=3",),
        )
    assert (said in caplog.messages) == named
    caplog.clear()
    grid = f"augself={','.join(dict.fromkeys(arguments))}"
    with pytest.raises(ConfigError, match="nothing is run here"):
        sweep_module.sweep(SweepRequest(CIFAR, ("--config.augself.stage=3",), grid=grid), tmp_path)
    assert (said in caplog.messages) == named


def test_the_command_warns_of_what_was_given_and_of_nothing_else(caplog, tmp_path):
    given = ["--config.augself.stage=3", "--config.data.source=nowhere"]
    assert run_command("pretrain", f"--config={CIFAR}", f"--workdir={tmp_path}", *given) == 2
    assert "augself.stage=3 has no effect with augself=none" in caplog.messages
    assert sum("has no effect" in each for each in caplog.messages) == 1
