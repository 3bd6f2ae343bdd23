"""A run whose images are kept on the devices is the run whose batches are sent."""

import jax
import numpy as np
import pytest

from cassle_jax.checks import ConfigError
from cassle_jax.training.loop import pretrain
from tests.tiny import cropped_only, tiny_config


def values(state):
    return jax.device_get((state.params, state.batch_stats, state.opt_state))


def test_it_is_the_same_run_and_either_continues_the_other(tmp_path):
    config = tiny_config("method=simclr")
    cropped_only(config)
    config.probe.every_epochs = 0
    config.data.on_device = "never"
    expected = values(pretrain(config, tmp_path / "sent"))

    config.data.on_device = "always"
    kept = values(pretrain(config, tmp_path / "kept"))
    jax.tree.map(np.testing.assert_array_equal, kept, expected)

    newest = max((tmp_path / "sent/checkpoints").iterdir(), key=lambda path: int(path.name))
    newest.rename(tmp_path / "moved away")
    continued = values(pretrain(config, tmp_path / "sent"))
    jax.tree.map(np.testing.assert_array_equal, continued, expected)


def test_another_word_is_refused(tmp_path):
    config = tiny_config("method=simclr")
    config.data.on_device = "yes"
    with pytest.raises(ConfigError, match=r"data.on_device='yes'.*always"):
        pretrain(config, tmp_path)
