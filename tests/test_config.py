"""The arguments of a configuration choose a method, its conditioning, AugSelf and the variant."""

import inspect
import runpy

import pytest

from cassle_jax.checks import ConfigError, check_area, check_one_of
from cassle_jax.config import base_config, flat_settings
from cassle_jax.methods import AUXILIARIES, METHODS
from cassle_jax.training.recorded import todays_settings
from cassle_jax.training.run import view_specs
from cassle_jax.training.saved_config import changes

AUGSELF_OFF = dict.fromkeys(("crop", "color", "blur", "solarize", "flip", "rotation"), 0.0)


def changed(arguments, base="method=moco_v2"):
    """What `arguments` change of the configuration that `base` gives."""
    before, after = flat_settings(base_config(base)), flat_settings(base_config(arguments))
    assert before.keys() == after.keys()
    return {name: value for name, value in after.items() if before[name] != value}


def weights(arguments):
    settings = base_config(arguments).augself.to_dict()
    assert (settings.pop("hidden"), settings.pop("stage")) == (512, 0)
    return settings


def test_the_defaults_are_mocos_with_cassle():
    config = base_config()
    spelt_out = base_config("method=moco_v2,conditioning=cassle,augself=none,follow=paper")
    assert config == spelt_out
    assert config.method.to_dict() == {
        "name": "moco_v2",
        "temperature": 0.2,
        "momentum": 0.999,
        "queue_size": 65_536,
        "enqueue": "keys",
        "projector_hidden": 0,
        "projector_out": 128,
        "projector_depth": 2,
    }
    conditioning = config.conditioning
    assert conditioning.descriptors == ("blur", "color", "color_diff", "crop", "grayscale")
    assert (conditioning.treatment, conditioning.injection) == ("mlp", "concat")
    assert (conditioning.depth, conditioning.width) == (6, 64)
    assert weights("") == AUGSELF_OFF


@pytest.mark.parametrize("method", METHODS)
def test_a_method_brings_its_own_settings(method):
    settings = base_config(f"method={method}").method.to_dict()
    assert settings.pop("name") == method
    assert METHODS[method](**settings) == METHODS[method]()


@pytest.mark.parametrize(
    ("value", "descriptors"),
    [
        ("none", ()),
        ("crop", ("crop",)),
        ("solarize+crop+blur", ("blur", "crop", "solarize")),
        ("color.hue+grayscale", ("color.hue", "grayscale")),
        ("leak_free", ("blur", "color", "crop", "grayscale", "palette")),
    ],
)
def test_conditioning_names_descriptors(value, descriptors):
    assert changed(f"conditioning={value}") == {"conditioning.descriptors": list(descriptors)}


def test_byol_conditional_shows_the_predictor_how_the_views_differ():
    conditioning = base_config("method=byol,conditioning=byol_conditional").conditioning
    assert conditioning.descriptors == ("blur", "color", "crop", "grayscale")
    assert (conditioning.relative, conditioning.into) == (True, "predictor")


def test_branched_is_leak_free_with_a_plain_branch():
    leak_free = changed("conditioning=leak_free")
    assert changed("conditioning=branched") == {**leak_free, "conditioning.plain_branch": 0.5}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("none", {}),
        ("main", {"crop": 0.5, "color": 0.5}),
        ("flip", {"flip": 0.5}),
        ("flip:0.25+rotation", {"flip": 0.25, "rotation": 0.5}),
        ("crop:1e-1", {"crop": 0.1}),
    ],
)
def test_augself_names_weights(value, expected):
    assert weights(f"augself={value}") == AUGSELF_OFF | expected


@pytest.mark.parametrize(
    ("argument", "settings"),
    [
        ("equimod=none", {}),
        ("equimod=main", {"equimod.weight": 1.0}),
        ("equimod=0.25", {"equimod.weight": 0.25}),
        ("essl=main", {"essl.weight": 0.4}),
        ("essl=cifar10", {"essl.weight": 0.4, "essl.crop_area": [0.2, 1.0]}),
        ("sie=main", {"sie.weight": 1.0}),
        ("stl=main", {"stl.weight": 1.0}),
    ],
)
def test_the_other_objectives_are_switched_on_by_their_weight(argument, settings):
    assert changed(argument, "") == settings


def test_sie_brings_its_papers_settings_of_vicreg():
    """Garrido et al., 2023: weights 10, 10 and 1 over both halves, projectors of 1024 on each."""
    expected = {
        "sie.weight": 1.0,
        "method.invariance_weight": 10.0,
        "method.variance_weight": 5.0,
        "method.covariance_weight": 0.5,
        "method.projector_hidden": 1024,
        "method.projector_out": 1024,
    }
    assert changed("method=vicreg,sie=main", "method=vicreg") == expected
    assert changed("method=vicreg,sie=none", "method=vicreg") == {}


def test_a_run_begun_before_there_was_equimod_continues():
    now = base_config("method=simclr,augself=main")
    before = base_config("method=simclr,augself=main").unlock()
    for name in AUXILIARIES.keys() - {"augself"}:
        del before[name]
    assert changes(before, now) == {}


@pytest.mark.parametrize(
    ("method", "setting"),
    [
        ("moco_v2", {"method.enqueue": "queries"}),
        ("simclr", {"method.negatives": "local"}),
        ("byol", {"method.momentum_by": "epoch"}),
        ("simsiam", {"method.projector_last_affine": True}),
        ("barlow_twins", {}),
    ],
)
def test_following_the_published_code_changes_what_it_does_otherwise_and_nothing_else(
    method, setting
):
    assert changed(f"method={method},follow=published", f"method={method}") == {
        "augment.jitter_order": "batch",
        "optimizer.schedule_by": "epoch",
        **setting,
    }


def test_a_method_brings_its_own_recipe():
    assert base_config("method=moco_v3").optimizer.to_dict() == {
        **base_config("method=simclr").optimizer.to_dict(),
        "name": "adamw",
        "base_learning_rate": 1.5e-4,
        "weight_decay": 0.1,
        "warmup_epochs": 40.0,
    }
    assert base_config("method=barlow_twins").optimizer.warmup_epochs == 10
    assert base_config("method=simsiam").optimizer.base_learning_rate == 0.05


@pytest.mark.parametrize(
    "recipe", ["barlow_twins", "byol", "moco_v3_resnet50", "moco_v3_vit", "vicreg"]
)
def test_recipes_of_asymmetric_views_solarize_after_grayscale_and_blur(recipe):
    config = runpy.run_path(f"configs/imagenet_{recipe}.py")["get_config"]()
    second = view_specs(config, METHODS[config.method.name]())[1]
    assert second.solarize > 0 and second.solarize_after == "blur"


def test_arguments_go_together_in_any_order():
    config = base_config("augself=main,conditioning=none,method=simclr")
    assert config.method.name == "simclr"
    assert config.conditioning.descriptors == ()
    assert config.augself.crop == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "simclr",
            r"'simclr' is unknown; use method=…, conditioning=…, augself=…, equimod=…, essl=…, "
            r"sie=…, stl=…, follow=…",
        ),
        ("methd=simclr", r"'methd=simclr' is unknown; use method=…"),
        ("method=simcrl", r"method='simcrl' .* moco_v2, .*; did you mean 'simclr'\?"),
        ("method=xyz", r"method='xyz' is unknown; use one of barlow_twins, byol, .*\w$"),
        ("follow=publishd", r"follow='publishd' .* paper, published; did you mean 'published'"),
        ("augself=crops", r"augself='crops' .* crop, flip, .*did you mean 'crop'"),
        ("equimod=mian", r"equimod='mian' is unknown; use a weight, or none, main"),
        ("essl=mian", r"essl='mian' is unknown; use a weight, or none, main, cifar10"),
        (
            "augself=crop:0.5+crop:1.0",
            r"^augself=crop:0\.5\+crop:1\.0 names 'crop' twice; name each once",
        ),
        (
            "augself=crop:half",
            r"augself weight 'crop:half' is not a number; use a form such as crop:0\.5",
        ),
        ("conditioning=crops", r"conditioning.*'crops'.*blur, .*color, .*did you mean 'crop'\?"),
        ("conditioning=", r"conditioning.*''.*blur, .*color, "),
    ],
)
def test_what_is_unknown_is_a_config_error_with_what_is_known(arguments, message):
    with pytest.raises(ConfigError, match=message) as refused:
        base_config(arguments)
    assert "\n" not in str(refused.value)


def test_knows_lets_known_values_pass():
    check_one_of("method", "simclr", METHODS)
    with pytest.raises(ConfigError, match=r"^a\.b='z' is unknown; use one of x, y$"):
        check_one_of("a.b", "z", {"y", "x"})


@pytest.mark.parametrize("area", [0.5, "ab", ("a", 1), (0.1, 0.2, 0.3), (0.1, float("nan"))])
def test_what_is_no_range_of_areas_is_a_config_error(area):
    check = inspect.unwrap(check_area)  # without the tests' checks of types
    with pytest.raises(ConfigError, match=r"^a\.b=.* is not a range of areas; use \(low, high\)"):
        check("a.b", area)


def test_a_run_of_a_version_without_these_settings_is_unchanged():
    now = base_config("method=simclr")
    earlier = now.copy_and_resolve_references().unlock()
    del earlier.optimizer.clip_norm, earlier.optimizer.settings
    assert changes(earlier, now) == {}
    now.optimizer.settings.nesterov = True
    assert changes(earlier, now) == {
        "optimizer.settings.nesterov": "optimizer.settings.nesterov=True was None"
    }


def test_arguments_of_an_optimiser_are_among_todays_settings():
    config = base_config("method=simclr")
    config.optimizer.settings.b2 = 0.95
    settings, gone = todays_settings(config)
    assert not gone and settings.optimizer.settings.to_dict() == {"b2": 0.95}


def test_settings_have_full_names():
    settings = flat_settings(base_config("method=simclr"))
    assert settings["optimizer.weight_decay"] == 1e-4
    assert settings["method.negatives"] == "global"
    assert not {"optimizer", "method.enqueue", "weight_decay"} & settings.keys()


def test_an_auxiliary_that_is_off_brings_no_settings_of_the_method():
    plain = base_config("method=vicreg").method.to_dict()
    assert base_config("method=vicreg,sie=0").method.to_dict() == plain
    assert base_config("method=vicreg,sie=main").method.to_dict() != plain
