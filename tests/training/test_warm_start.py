"""A run may start from a file's weights; what does not fit is one line before anything starts."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

from cassle_jax.augment import DESCRIPTORS, concatenate
from cassle_jax.checks import ConfigError
from cassle_jax.interop.naming import to_dinov2
from cassle_jax.interop.pytorch import encoder_to_pytorch
from cassle_jax.interop.weights import weights_of
from cassle_jax.methods.build import Conditioning
from cassle_jax.models import make_encoder
from cassle_jax.parallel import device_mesh
from cassle_jax.training import loop
from cassle_jax.training.checkpoints import Checkpoints
from cassle_jax.training.run import build_run, check_settings
from cassle_jax.training.warm_start import warm_started
from tests.interop.states import assert_same, encoder_state, filled
from tests.states import filled_state
from tests.tiny import tiny_config


def config_of(**settings):
    config = tiny_config("method=byol")
    config.encoder.name = "resnet18"
    config.encoder.width = 2
    config.encoder.small_images = True
    config.update_from_flattened_dict({f"weights.{k}": v for k, v in settings.items()})
    return config


@pytest.fixture(scope="module")
def first_states():
    """The states of two runs before their first steps, which differ in every array."""
    mesh = device_mesh()
    run = build_run(config_of(), mesh, 64)
    return filled_state(run, mesh, seed=0), filled_state(run, mesh, seed=1)


@pytest.fixture(scope="module")
def file(first_states, tmp_path_factory):
    """The weights of the second state."""
    other = first_states[1]
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    weights = weights_of({"params": other.params, "batch_stats": other.batch_stats})
    save_file(weights.flat(), path)
    return path


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_all_that_the_file_has_is_where_it_belongs(first_states, file):
    state, other = first_states
    started = warm_started(state, config_of(path=str(file)).weights)
    assert_equal(started.params, other.params)
    assert_equal(started.target_params, other.target_params)
    assert_equal(started.target_batch_stats, other.target_batch_stats)
    assert started.step == 0
    for new, old in zip(jax.tree.leaves(started), jax.tree.leaves(state), strict=True):
        assert new.sharding == old.sharding
        assert new.dtype == old.dtype


def test_the_encoder_alone_can_be_taken(first_states, file):
    state, other = first_states
    started = warm_started(state, config_of(path=str(file), networks="encoder").weights)
    assert_equal(started.params["encoder"], other.params["encoder"])
    assert_equal(started.target_params["encoder"], other.params["encoder"])
    assert_equal(started.params["projector"], state.params["projector"])


def test_an_optimiser_that_keeps_its_first_weights_keeps_the_files(file, monkeypatch, tmp_path):
    """Kept random ones, MADGRAD would return to, and DoG would take far steps away from."""
    config = config_of(path=str(file))
    config.optimizer.update(name="madgrad", weight_decay=0.0)
    mesh = device_mesh()
    run = build_run(config, mesh, 64)
    monkeypatch.setattr(loop, "on_every_device", lambda *_: filled_state(run, mesh))
    with contextlib.closing(Checkpoints(tmp_path, keep=1)) as checkpoints:
        started, _ = loop._newest_state(checkpoints, config, run, mesh)
    kept = optax.tree.get_all_with_path(started.opt_state, "x0")[0][1]
    assert_equal(kept, started.params)
    jax.jit(lambda state: state.step, donate_argnums=0)(started)  # takes no array twice


def test_without_a_file_nothing_changes(first_states):
    assert warm_started(first_states[0], config_of().weights) is first_states[0]


def test_what_does_not_fit_is_named(first_states, file, tmp_path):
    state = first_states[0]
    without = state.replace(
        params={name: state.params[name] for name in ("encoder", "projector")},
    )
    with pytest.raises(ConfigError, match=r"weights\.path=.*predictor.*networks='encoder' would"):
        warm_started(without, config_of(path=str(file)).weights)
    with pytest.raises(ConfigError, match=r"weights\.path=.*nowhere\.pth.* cannot") as raised:
        warm_started(state, config_of(path=str(tmp_path / "nowhere.pth")).weights)
    assert "networks=" not in str(raised.value)
    with pytest.raises(ConfigError, match=r"weights\.networks='heads' is unknown"):
        check_settings(config_of(networks="heads"))


@pytest.mark.parametrize("networks", ["all", "encoder"])
def test_the_encoder_alone_is_not_advised_where_it_does_not_fit(first_states, tmp_path, networks):
    save_file(encoder_state("resnet18"), tmp_path / "other.safetensors")
    settings = config_of(path=str(tmp_path / "other.safetensors"), networks=networks).weights
    with pytest.raises(ConfigError, match="weights of the encoder") as raised:
        warm_started(first_states[0], settings)
    assert "networks=" not in str(raised.value)


def test_advice_is_a_setting_not_a_call(first_states, file):
    state = first_states[0]
    without = state.replace(params={name: state.params[name] for name in ("encoder", "projector")})
    with pytest.raises(ConfigError) as raised:
        warm_started(without, config_of(path=str(file)).weights)
    assert "without(" not in str(raised.value)


def test_heads_of_another_stage_are_refused_though_their_arrays_fit(tmp_path):
    """Each block of a ViT has features of one width; the last block is stage 0, too."""
    config = config_of()
    config.encoder.update(name="vit_small", width=24, small_images=False, patch_size=8)
    mesh = device_mesh(jax.devices()[:1])
    state = filled_state(build_run(config, mesh, 64), mesh)
    encoder, paths = make_encoder(**config.encoder), {}
    weights = weights_of({"params": state.params, "batch_stats": state.batch_stats}).flat()
    for stage in (3, 12):
        card = {"architecture": {"heads": 12}, "conditioning": {"stage": stage}}
        paths[stage] = str(tmp_path / f"{stage}.safetensors")
        save_file(weights, paths[stage], {"card": json.dumps(card)})
    settings = config_of(path=paths[3]).weights
    line = (
        r"heads are of conditioning\.stage=3, not of the run's 0; use weights\.networks='encoder'"
    )
    with pytest.raises(ConfigError, match=line):
        warm_started(state, settings, encoder)
    with pytest.raises(ConfigError, match=r"conditioning\.stage=12, not of the run's 3"):
        warm_started(state, config_of(path=paths[12]).weights, encoder, 3)
    settings.networks = "encoder"
    for started in (
        warm_started(state, settings, encoder),
        warm_started(state, config_of(path=paths[3]).weights, encoder, 3),
        warm_started(state, config_of(path=paths[12]).weights, encoder),
    ):
        assert_equal(started.params["encoder"], state.params["encoder"])


def test_heads_of_another_omega_are_refused_though_their_arrays_fit(first_states, file, tmp_path):
    """Both `crop` and `color` are four numbers; their γ would read the one as the other."""
    path = tmp_path / "of_crop.safetensors"
    card = {"conditioning": {"descriptors": ["crop"], "relative": False, "injection": "add"}}
    save_file(load_file(file), path, {"card": json.dumps(card)})
    settings, first = config_of(path=str(path)).weights, first_states[0]

    def started(*descriptors, injection="add", **other):
        chosen = Conditioning(descriptors, injection=injection, **other)
        return warm_started(first, settings, conditioning=chosen)

    assert_equal(started("crop").params, first_states[1].params)
    assert_equal(started().params, first_states[1].params)  # its arrays alone decide
    line = r"trained with conditioning\.descriptors=\['crop'\], not the run's \['color'\]; use weig"
    with pytest.raises(ConfigError, match=line):
        started("color")
    for name, other in (("relative", True), ("injection", "multiply")):
        with pytest.raises(ConfigError, match=rf"conditioning\.{name}=.*, not the run's {other}"):
            started("crop", **{name: other})
    settings.networks = "encoder"
    assert_equal(started("color").params["encoder"], first_states[1].params["encoder"])


def test_heads_of_the_same_omega_by_other_names_start_a_run(first_states, file, tmp_path):
    """`color` and its components, named one by one, are other orders of the same numbers."""

    def started(recorded, *descriptors):
        path = tmp_path / "heads.safetensors"
        save_file(load_file(file), path, {"card": json.dumps({"conditioning": recorded})})
        settings = config_of(path=str(path)).weights
        chosen = Conditioning(descriptors)
        return warm_started(first_states[0], settings, conditioning=chosen).params

    params = started({"descriptors": ["blur", "flip"]}, "flip", "blur.sigma")
    assert_equal(params, first_states[1].params)
    colours = [f"color.{name}" for name in DESCRIPTORS["color"].components]
    ones = {name: jnp.arange(each.size, dtype=jnp.float32) for name, each in DESCRIPTORS.items()}
    assert concatenate(ones, colours).tolist() == [0, 1, 3, 2]  # hue is the last of `color`
    with pytest.raises(ConfigError, match=r"descriptors=\['color'\], not the run's \['color\.bri"):
        started({"descriptors": ["color"]}, *colours)


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ({"architecture": {"heads": 6}}, "its ViT has 6 heads, not 12; use encoder.heads=6"),
        ({}, "do not show its number of heads"),
    ],
)
def test_a_vit_of_other_heads_is_refused_though_its_arrays_fit(tmp_path, card, message):
    config = config_of()
    config.encoder.update(name="vit_small", width=24, small_images=False, patch_size=8)
    mesh = device_mesh(jax.devices()[:1])
    state = jax.eval_shape(build_run(config, mesh, 64).initial_state)
    encoder = filled({"params": state.params["encoder"]})
    path = tmp_path / "vit.safetensors"
    save_file(encoder_to_pytorch(encoder), path, {"card": json.dumps(card)})
    with pytest.raises(ConfigError, match=message):
        warm_started(state, config_of(path=str(path)).weights, make_encoder(**config.encoder))


def test_a_vit_starts_no_resnet(first_states, tmp_path):
    state, _ = first_states
    save_file(encoder_state("vit"), tmp_path / "vit.safetensors")
    settings = config_of(path=str(tmp_path / "vit.safetensors"), networks="encoder").weights
    with pytest.raises(ConfigError, match=r"vit\.safetensors"):
        warm_started(state, settings, make_encoder(**config_of().encoder))


def test_a_vit_of_other_options_is_refused_with_the_settings_that_fit(tmp_path):
    """A DINOv2 ViT for a run with the defaults; with what the line says, it starts the run."""
    config = config_of()
    config.encoder.update(name="vit_small", width=24, small_images=False, heads=2)
    usual = {"patch_size": 8, "registers": 0, "layer_scale": 0.0, "swiglu": False}
    options = {"patch_size": 4, "registers": 4, "layer_scale": 1e-5, "swiglu": True}
    mesh = device_mesh(jax.devices()[:1])

    def first_state(**encoder):
        config.encoder.update(usual | encoder)
        return jax.eval_shape(build_run(config, mesh, 64).initial_state)

    encoder = filled({"params": first_state(**options).params["encoder"]})
    weights = to_dinov2(encoder_to_pytorch(encoder))
    card = {"card": json.dumps({"architecture": {"heads": 2}})}
    save_file(weights, tmp_path / "vit.safetensors", card)
    settings = config_of(path=str(tmp_path / "vit.safetensors")).weights
    use = r"kind than the run's; use encoder\.patch_size=4, encoder\.registers=4, "
    use += r"encoder\.swiglu=True, encoder\.layer_scale=1e-05$"
    with pytest.raises(ConfigError, match=use):
        warm_started(first_state(), settings, make_encoder(**config.encoder))
    first_state(**options)
    state = filled_state(build_run(config, mesh, 64), mesh)
    started = warm_started(state, settings, make_encoder(**config.encoder))
    assert_same(
        encoder_to_pytorch({"params": started.params["encoder"]}), encoder_to_pytorch(encoder)
    )
