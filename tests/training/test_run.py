"""A configuration becomes a run, or one line that names the setting, its value and what works."""

import dataclasses
import os
import runpy
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cassle_jax import pretrain as pretrain_module
from cassle_jax.augment import CHANCES, DESCRIPTORS
from cassle_jax.checks import ConfigError
from cassle_jax.evaluation.views import every_augmentation
from cassle_jax.methods import METHODS
from cassle_jax.parallel import device_mesh
from cassle_jax.training.loop import pretrain
from cassle_jax.training.run import augment_spec, build_run, compute_dtype
from cassle_jax.training.start_warnings import late_warnings, omega_warnings
from tests.commands import run_command
from tests.everyday import everyday
from tests.methods.one_device import compiled
from tests.tiny import tiny_config

IMAGES = 64
CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))
RECIPES = [path for path in CONFIGS if path.stem.startswith("imagenet_")]
DATASETS = [path for path in CONFIGS if path not in RECIPES]
# A ResNet, a Vision Transformer, and views of two sizes.
EVERYDAY_CONFIGS = [
    path
    for path in CONFIGS
    if path.stem in ("imagenet_simclr", "imagenet_moco_v3_vit", "imagenet_swav")
]
CONDITIONINGS = {
    "none": (),
    "cassle": ("blur", "color", "color_diff", "crop", "grayscale"),
    "flip+crop": ("crop", "flip"),
}


def build(settings=None, arguments="method=simclr", images=IMAGES):
    config = tiny_config(arguments)
    config.update_from_flattened_dict(settings or {})
    return build_run(config, device_mesh(), images)


REFUSED = [
    ({"batch_size": 0}, r"^batch_size=0 must be at least 2$"),
    ({"epochs": 0}, r"^epochs=0 must be at least 1$"),
    ({"epochs": 2**31}, r"^epochs=2147483648 is out of range; use at most 2147483647$"),
    ({"log.every_steps": 2**70}, r"^log\.every_steps=\d+ is out of range; use at most 2147483647$"),
    ({"data.threads": 2**31 - 1}, r"^data\.threads=2147483647 .* use at most 1024$"),
    ({"data.canvas": 2**40}, r"^data\.canvas=\d+ is out of range; use at most 32768$"),
    ({"augment.size": 2**31}, r"^augment\.size=\d+ is out of range; use at most 32768$"),
    ({"conditioning.depth": 2**31 - 1}, r"^conditioning\.depth=\d+ .* use at most 1024$"),
    ({"conditioning.width": 2**31 - 1}, r"^conditioning\.width=\d+ .* use at most 1048576$"),
    ({"encoder.width": 2**31 - 1}, r"^encoder\.width=\d+ .* use at most 1048576$"),
    ({"method.projector_depth": 2**31 - 1}, r"projector_depth=\d+ .* use at most 1024$"),
    ({"method.projector_out": 2**40}, r"projector_out=\d+ .* use at most 1048576$"),
    ({"equimod.hidden": 2**40}, r"^equimod\.hidden=\d+ .* use at most 1048576$"),
    ({"steps": -1}, r"^steps=-1 must be at least 0$"),
    ({"batch_size": 30}, r"^batch_size=30 .* over 8 devices; 24 would work$"),
    ({"batch_size": 4}, r"^batch_size=4 .* over 8 devices; 8 would work$"),
    ({"batch_size": 72}, r"^batch_size=72 .* the 64 training images; use at most 64$"),
    ({"data.canvas": 8}, r"^data\.canvas=8 .* augment\.size=16; use data\.canvas=16 or more$"),
    ({"dtype": "float"}, r"^dtype='float' .* auto, bfloat16, float32; did you mean 'float32'\?$"),
    ({"encoder.name": "resnet5"}, r"^encoder\.name='resnet5' .* did you mean 'resnet50'\?$"),
    ({"method.name": "simclear"}, r"^method\.name='simclear' .* did you mean 'simclr'\?$"),
    ({"method.name": "moco_v2"}, r"^method\.name='moco_v2' .*'negatives'.*=…:method=moco_v2$"),
    ({"method.negatives": "some"}, r"^method\.negatives='some' .*use one of global, local$"),
    ({"method.temperature": 0.0}, r"^method\.temperature=0\.0 must be above 0$"),
    ({"method.temperature": 1e-40}, r"^method\.temperature=1e-40 is too small .* at least 1e-30$"),
    ({"optimizer.base_learning_rate": 1e-50}, r"^optimizer\.base_learning_rate=1e-50 is too small"),
    (
        {"method.negatives": "local", "batch_size": 8},
        r"^batch_size=8 .*method\.negatives='local'.* at least 2 images a device$",
    ),
    ({"augself.crop": -1.0}, r"^augself\.crop=-1\.0 must be above 0$"),
    ({"equimod.weight": -1.0}, r"^equimod\.weight=-1\.0 must be at least 0$"),
    ({"essl.weight": float("nan")}, r"^essl\.weight=nan must be at least 0$"),
    ({"essl.weight": 0.4, "essl.size": 32}, r"^essl\.size=32 .* augment\.size=16; use at most 16$"),
    (
        {"essl.weight": 0.4, "augment.kernel_size": 17},
        r"^the small views of E-SSL, essl\.size=8: augment\.kernel_size=17 ",
    ),
    (
        {"essl.weight": 0.4, "encoder.name": "vit_tiny", "encoder.width": 24},
        r"^essl\.size=8 is not a multiple of encoder\.patch_size=16; use 16$",
    ),
    (
        {"essl.weight": 0.4, "conditioning.injection": "image"},
        r"^conditioning\.injection='image' cannot go with essl, .*injection='concat'$",
    ),
    (
        {"equimod.weight": 1.0, "equimod.descriptors": ("crop", "solarize")},
        r"^augment\.solarize=0 never draws what equimod names; .* leave solarize out$",
    ),
    ({"stl.temperature": 0.0}, r"^stl\.temperature=0\.0 must be above 0$"),
    (
        {"stl.weight": 1.0, "batch_size": 24},
        r"^batch_size=24 leaves 3 images to a device, which stl cannot pair; 32 would work$",
    ),
    ({"sie.weight": -1.0}, r"^sie\.weight=-1\.0 must be at least 0$"),
    (
        {"sie.weight": 1.0, "sie.descriptors": ("crop", "solarize")},
        r"^augment\.solarize=0 never draws what sie names; .* leave solarize out$",
    ),
    (
        {"conditioning.descriptors": ("colour",)},
        r"^conditioning\.descriptors=\['colour'\] has the unknown name 'colour'; use any of blur,",
    ),
    (
        {"conditioning.descriptors": ("crop", "crop")},
        r"^conditioning\.descriptors=\['crop', 'crop'\] names 'crop' twice; name each once",
    ),
    (
        {"conditioning.treatment": "mpl"},
        r"treatment='mpl' is unknown; .*none, raw; did you mean 'mlp'",
    ),
    ({"conditioning.injection": "sum"}, r"injection='sum' is unknown; .*add, concat, "),
    (
        {"conditioning.treatment": "hypernetwork", "conditioning.injection": "add"},
        r"injection='add' .*treatment='hypernetwork'.* use .*injection='none'",
    ),
    (
        {"conditioning.treatment": "raw", "conditioning.injection": "add"},
        r"treatment='raw' .*\(24\), not 13; use .*treatment='mlp'",
    ),
    ({"augment.flip": 1.5}, r"^augment\.flip=1\.5 .* value in \[0, 1\]$"),
    ({"augment.color_strength": -1.0}, r"^augment\.color_strength=-1\.0 .* from 0 on"),
    ({"optimizer.name": "lamp"}, r"^optimizer\.name='lamp' .*lars, .*; did you mean 'lamb'\?$"),
    ({"optimizer.final_fraction": 2.0}, r"^optimizer\.final_fraction=2\.0 is not in \[0, 1\]"),
    (
        {"conditioning.into": "encoder"},
        r"^conditioning\.into='encoder' .*use one of both, predictor, ",
    ),
    (
        {"conditioning.into": "both"},
        r"^conditioning\.into='both' needs a predictor, .*SimCLR lacks",
    ),
    (
        {"optimizer.warmup_epochs": 6.0},
        r"^optimizer\.warmup_epochs=6\.0 .* the run's 6 epochs; use a smaller value$",
    ),
]


@pytest.mark.parametrize(
    ("settings", "message"), REFUSED, ids=[" ".join(settings) for settings, _ in REFUSED]
)
def test_a_setting_that_cannot_work_is_named_with_what_would(settings, message):
    with pytest.raises(ConfigError, match=message) as refused:
        build(settings)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "^epochs=0 must"),
        ({"batch_size": 30}, "^batch_size=30 .* over 8 devices; 24 would work"),
        ({"log.to": ("wandbb",)}, r"^log\.to='wandbb' is unknown"),
        ({"weights.networks": "head"}, r"^weights\.networks='head' is unknown"),
        ({"conditioning.descriptors": ("solarize",)}, r"^augment\.solarize=0 never draws"),
    ],
)
def test_settings_are_refused_before_the_images_are_opened(
    tmp_path, monkeypatch, settings, message
):
    monkeypatch.setattr(
        "cassle_jax.training.loop.open_source", lambda *_: pytest.fail("the images were opened")
    )
    config = tiny_config()
    config.update_from_flattened_dict(settings)
    with pytest.raises(ConfigError, match=message):
        pretrain(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_a_method_cannot_work_with_is_a_config_error():
    message = r"^method\.queue_size=60 .* batch_size=16; 48 would work$"
    with pytest.raises(ConfigError, match=message):
        build({"method.queue_size": 60}, "method=moco_v2")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("seed", -1),
        ("seed", 2**32),
        ("encoder.width", -1),
        ("encoder.patch_size", 0),
        ("method.projector_depth", 0),
        ("method.projector_out", 0),
        ("method.projector_hidden", -1),
        ("conditioning.depth", 0),
        ("conditioning.width", 0),
        ("augself.hidden", 0),
    ],
)
def test_a_size_that_leaves_nothing_is_refused_before_anything_is_compiled(setting, value):
    with pytest.raises(ConfigError, match=rf"{setting}={value}"):
        build({setting: value}, "method=simclr,augself=main")


def test_a_dataset_with_fewer_images_than_devices_is_not_answered_with_a_batch_of_none():
    with pytest.raises(ConfigError, match=r"batch_size=16 .* the 5 training images") as refused:
        build(images=5)
    assert "at most 0" not in str(refused.value)


def shipped(path, arguments):
    config = runpy.run_path(str(path))["get_config"](arguments)
    return config, build_run(config, device_mesh(), 100_000)


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("path", DATASETS, ids=lambda path: path.stem)
def test_every_dataset_goes_with_every_method(path, method):
    assert_goes(path, method, "cassle")


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("path", DATASETS, ids=lambda path: path.stem)
def test_every_dataset_goes_with_every_conditioning(path, conditioning):
    assert_goes(path, "byol", conditioning)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_with_every_conditioning(method, conditioning):
    assert_goes(DATASETS[0], method, conditioning)


def assert_goes(path, method, conditioning):
    config, run = shipped(path, f"method={method},conditioning={conditioning}")
    assert isinstance(run.method, METHODS[method])
    assert run.conditioning.descriptors == CONDITIONINGS[conditioning]
    assert run.clock.steps_per_epoch == 100_000 // config.batch_size


@pytest.mark.parametrize("path", everyday(CONFIGS, *EVERYDAY_CONFIGS), ids=lambda path: path.stem)
def test_every_shipped_configuration_has_a_state_with_all_its_networks(path):
    assert_state_has_all_networks(path, "")


@pytest.mark.parametrize("method", everyday(METHODS, "moco_v3"))
def test_every_method_has_a_state_with_all_its_networks(method):
    assert_state_has_all_networks(CONFIGS[0].with_name("cifar10.py"), f"method={method},")


def assert_state_has_all_networks(path, arguments):
    _, run = shipped(path, f"{arguments}conditioning=flip+crop,augself=main")
    state = jax.eval_shape(run.initial_state)
    heads = {"predictor"} if run.method.predictor(8) else set()
    assert state.params.keys() == {
        "encoder",
        "projector",
        "augself_crop",
        "augself_color",
        *heads,
    }
    assert state.params["projector"]["condition"]["linear_0"]["kernel"].shape[0] == 4 + 1
    targets = {"encoder", "projector"} if run.method.target_passes else set()
    assert state.target_params.keys() == targets


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_of_one_method(path):
    get_config = runpy.run_path(str(path))["get_config"]
    assert get_config().method.name in path.stem
    with pytest.raises(
        ConfigError, match=r"^method='moco_v2' .*configs/imagenet\.py:method=moco_v2"
    ):
        get_config("method=moco_v2")


def test_a_runs_length_is_its_steps_or_else_its_epochs():
    by_steps = build({"steps": 10, "epochs": 99}).clock
    assert (by_steps.total_steps, by_steps.steps_per_epoch) == (10, 4)
    by_epochs = build({"steps": 0, "epochs": 3}, images=70).clock
    assert (by_epochs.total_steps, by_epochs.steps_per_epoch) == (12, 4)


def test_only_weights_that_are_not_zero_make_heads():
    assert build().auxiliaries == ()
    (augself,) = build({"augself.flip": 0.5, "augself.blur": 0.1}).auxiliaries
    assert augself.descriptors == ("blur", "flip")


def test_bfloat16_is_for_accelerators_unless_requested():
    config = tiny_config()
    assert compute_dtype(config, "cpu") == jnp.float32
    assert compute_dtype(config, "gpu") == compute_dtype(config, "tpu") == jnp.bfloat16
    config.dtype = "bfloat16"
    assert compute_dtype(config, "cpu") == jnp.bfloat16
    config.dtype = "float32"
    assert compute_dtype(config, "gpu") == jnp.float32


def test_colour_strength_scales_what_the_other_settings_say():
    config = tiny_config()
    assert augment_spec(config).hue == (-0.1, 0.1)
    config.augment.color_strength = 0.5
    spec = augment_spec(config)
    assert (spec.hue, spec.brightness, spec.grayscale) == ((-0.05, 0.05), (0.8, 1.2), 0.1)


def test_asymmetric_views_replace_blur_and_solarize_in_training_and_in_evaluation():
    replaced = {"blur": 0.0, "solarize": 0.9, "solarize_threshold": (0.1, 0.2)}
    asymmetric = {"augment.asymmetric": True}
    run = build(asymmetric)
    other = build(asymmetric | {f"augment.{name}": value for name, value in replaced.items()})
    assert (other.views, other.augment) == (run.views, run.augment)
    (first, second), both = run.views, run.augment
    assert every_augmentation(both).solarize == 1  # analyses measure what training draws
    for chance in CHANCES:
        views = getattr(first, chance) + getattr(second, chance)
        assert getattr(both, chance) == pytest.approx(views / 2)
    assert both.solarize_threshold == second.solarize_threshold == (0.5, 0.5)


@pytest.mark.parametrize(
    ("setting", "folder"),
    [("auto", "{home}/cassle_jax/compiled"), ("{home}/own", "{home}/own"), ("", None)],
)
def test_where_programs_are_kept_and_whether_they_are_deterministic(
    tmp_path, monkeypatch, setting, folder
):
    updates = {}
    monkeypatch.setattr(
        pretrain_module, "jax", SimpleNamespace(config=SimpleNamespace(update=updates.__setitem__))
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = tiny_config("method=simclr")
    config.compilation_cache = setting.format(home=tmp_path)
    for deterministic, flags in (
        (False, "--a=1"),
        (True, "--a=1 --xla_gpu_deterministic_ops=true"),
    ):
        monkeypatch.setenv("XLA_FLAGS", "--a=1")
        config.deterministic = deterministic
        pretrain_module.set_up_devices(config)
        assert os.environ["XLA_FLAGS"] == flags
    kept = {} if folder is None else {"jax_compilation_cache_dir": folder.format(home=tmp_path)}
    assert updates == kept


@pytest.mark.parametrize(
    "begin",
    [
        lambda: pretrain_module.set_up_devices(tiny_config()),
        lambda: run_command("evaluate"),
        lambda: run_command("tables", "--table=none"),
    ],
    ids=["run", "evaluate", "tables"],
)
def test_64_bits_are_off_in_runs_and_in_commands(begin):
    jax.config.update("jax_enable_x64", True)
    try:
        begin()
        assert not jax.config.jax_enable_x64
    finally:
        jax.config.update("jax_enable_x64", False)


def test_without_a_home_programs_are_not_kept(monkeypatch, caplog):
    def homeless():
        raise ConfigError("there is no home folder")

    updates = {}
    monkeypatch.setattr(
        pretrain_module, "jax", SimpleNamespace(config=SimpleNamespace(update=updates.__setitem__))
    )
    monkeypatch.setattr(pretrain_module, "cache_folder", homeless)
    config = tiny_config("method=simclr")
    config.compilation_cache = "auto"
    pretrain_module.set_up_devices(config)
    assert updates == {"jax_compilation_cache_dir": None}
    assert "compiled programs are not kept: there is no home folder" in caplog.text


def test_a_folder_for_programs_of_strange_bytes_is_refused(tmp_path):
    config = tiny_config("method=simclr")
    config.compilation_cache = f"{tmp_path}/\udcff"
    with pytest.raises(ConfigError, match=r"^compilation_cache=.* has bytes that are not UTF-8"):
        pretrain_module.set_up_devices(config)


def test_another_seed_is_another_beginning():
    def last_bias(seed):
        state = beginning(build({"seed": seed}).seed_words)
        return np.asarray(state.params["projector"]["projector"]["linear_1"]["bias"])

    # One program for all seeds: runs that differ in nothing else compile nothing anew.
    beginning = compiled(build({"seed": 0}).initial_state)
    assert not (last_bias(0) == last_bias(1)).any()


@pytest.mark.parametrize("name", ["solarize", "rotation"])
def test_what_is_never_drawn_cannot_be_conditioned_on_or_predicted(name):
    with pytest.raises(ConfigError, match=rf"augment\.{name}=0 never draws"):
        build({"conditioning.descriptors": ("crop", name)})
    build({"conditioning.descriptors": ("crop", name), f"augment.{name}": 0.5})


def test_a_descriptor_of_ones_own_is_refused_likewise(monkeypatch):
    monkeypatch.setitem(DESCRIPTORS, "inverted", DESCRIPTORS["solarize"])
    with pytest.raises(ConfigError, match=r"augment\.solarize=0 never draws .*leave inverted out"):
        build({"conditioning.descriptors": ("crop", "inverted")})


def warnings(conditioning, settings=None):
    """What a run warns of before its first step."""
    return list(omega_warnings(build(settings, f"method=simclr,conditioning={conditioning}")))


def test_a_descriptor_computed_from_the_image_is_warned_of():
    (line,) = warnings("cassle")
    assert "conditioning.descriptors has color_diff" in line
    assert "mean colour" in line and "palette" in line and "leak_free" in line
    assert not warnings("leak_free")


@pytest.mark.exhaustive
def test_a_warning_comes_before_the_first_step(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("cassle_jax.training.loop._Loop.train", lambda loop, stop: loop.state)
    with caplog.at_level("WARNING", logger="cassle_jax"):
        pretrain(tiny_config("method=simclr,conditioning=cassle"), tmp_path)
    expected = list(warnings("cassle"))
    assert [each for each in caplog.messages if each in expected] == expected != []


def test_components_of_one_descriptor_are_one_warning():
    names = sorted(f"color_diff.{each}" for each in DESCRIPTORS["color_diff"].components)
    first, second, _ = names
    (line,) = warnings(f"crop+{first}+{second}")
    assert f"has {first}, {second}, which is computed from the image" in line


def test_a_descriptor_of_ones_own_is_not_said_to_reveal_the_colour(monkeypatch):
    own = dataclasses.replace(DESCRIPTORS["blur"], from_image=True)
    monkeypatch.setitem(DESCRIPTORS, "sharpness", own)
    (line,) = warnings("crop+sharpness")
    assert "has sharpness, which is computed from the image: it may reveal which image" in line
    assert "--tasks=leak" in line and "colour" not in line and "palette" not in line


def test_relative_descriptors_of_a_projector_are_warned_of():
    (line,) = warnings("leak_free", {"conditioning.relative": True})
    assert "conditioning.relative=True" in line and "conditioning.into='predictor'" in line


@pytest.mark.parametrize(
    ("method", "late", "soon", "message"),
    [
        (
            "simclr",
            {"conditioning.start_epoch": 6.0},
            {"conditioning.start_epoch": 5.9},
            "conditioning.start_epoch=6 is not within the run's 6 epochs, so no image is projected",
        ),
        (
            "swav",
            {"method.queue_start": 15.0},
            {"method.queue_start": 5.0},
            "method.queue_start=15 is not within the run's 6 epochs, so the queue is never used",
        ),
        (
            "swav",
            {"method.queue_size": 0, "method.freeze_prototypes_epochs": 6.0},
            {"method.queue_size": 0, "method.queue_start": 15.0},
            "method.freeze_prototypes_steps=24 is not within the run's 24 steps, so the prototypes",
        ),
    ],
)
def test_what_begins_only_after_the_runs_end_is_warned_of(method, late, soon, message):
    def lines(settings):
        settings = {"steps": 24, **settings}
        return list(late_warnings(build(settings, f"method={method},conditioning=leak_free")))

    (line,) = lines(late)
    assert line.startswith(message)
    assert not lines(soon)


def test_an_encoder_that_sees_what_a_head_predicts_is_warned_of():
    shown = {"conditioning.injection": "image"}
    (line,) = warnings("leak_free,augself=main", shown)
    assert "shows ω to the encoder, so what augself predicts" in line
    assert not warnings("leak_free", shown)
    assert not warnings("grayscale,augself=main", shown)
