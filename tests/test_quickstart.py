"""The quickstart from its first step to its page, on a tiny encoder."""

import pytest

from cassle_jax import quickstart
from cassle_jax.data.scenes import FACTORS
from cassle_jax.models import ENCODERS
from tests.tiny import TinyEncoder, tiny_config


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("quickstart")

    def get_config(arguments):
        config = tiny_config(arguments)
        config.steps = 6
        config.data.scenes = 320
        config.probe.every_epochs = 1
        config.probe.train_images = config.probe.test_images = 32
        return config

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENCODERS, "tiny", TinyEncoder)
        patch.setattr(quickstart, "get_config", get_config)
        yield quickstart.quickstart("simclr", workdir), workdir


def test_every_factor_has_a_score_for_either_run_and_for_an_untrained_encoder(result):
    table, _ = result
    assert table.columns == ("factor", "plain", "CASSLE", "untrained")
    assert [row[0] for row in table.rows] == list(FACTORS)
    assert all(score <= 1 for row in table.rows for score in row[1:])


def test_the_figure_and_the_page_are_there_and_need_no_other_file(result):
    table, workdir = result
    assert (workdir / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    page = (workdir / "quickstart.html").read_text()
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "data:image/png" in page
    for row in table.rows:
        assert f"{row[1]:.3f}" in page


def test_the_runs_are_kept_beside_them(result):
    _, workdir = result
    for name in ("plain", "CASSLE"):
        assert (workdir / name / "checkpoints" / "6").exists()
