"""The quickstart from its first step to its page, on a tiny encoder."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from cassle_jax import quickstart
from cassle_jax.checks import ConfigError
from cassle_jax.data import COLOUR, CONTENT, FORM, Motifs
from cassle_jax.evaluation.findings import Score
from cassle_jax.lock import folder_held
from cassle_jax.models import ENCODERS
from cassle_jax.parallel import device_mesh
from cassle_jax.report.files import read_report
from cassle_jax.training import loop
from tests.commands import run_command
from tests.tiny import TinyEncoder, cropped_only, tiny_config

FACTORS = Motifs.FACTORS
SEED = 3


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("quickstart")

    def get_config(arguments):
        config = tiny_config(arguments)
        config.steps = 6
        config.data.source = "motifs"
        config.data.scenes = 320
        cropped_only(config)
        return config

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENCODERS, "tiny", TinyEncoder)
        patch.setattr(quickstart, "get_config", get_config)
        patch.setattr(quickstart, "_PROBED", 300)
        for module in (quickstart, loop):  # eight devices would compute for longer
            patch.setattr(module, "device_mesh", lambda: device_mesh(jax.devices()[:1]))
        yield quickstart.quickstart("simclr", workdir, SEED), workdir


def test_a_second_quickstart_in_a_folder_is_refused_before_it_pretrains(tmp_path):
    """The first one may be between its runs, when it holds none of them."""
    with (
        folder_held(tmp_path, holder="quickstart"),
        pytest.raises(ConfigError, match=r"workdir=.* is in use by another quickstart"),
    ):
        quickstart.quickstart("simclr", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_every_factor_has_a_score_for_either_run_and_for_an_untrained_encoder(result):
    scores, _ = result
    assert list(scores) == ["plain", "CASSLE", "untrained"]
    for each in scores.values():
        assert list(each) == list(FACTORS)
        assert all(score <= 1 for score in each.values())


def test_scores_are_of_the_images_whose_features_were_read(result):
    """Even random weights let through how bright an image is."""
    scores, _ = result
    assert scores["untrained"]["light"] > 0.5


def test_the_table_has_the_mean_of_each_group_above_its_factors(result):
    scores, _ = result
    table = quickstart.whole_table(scores)
    assert table.columns == ("factor", "changed by", "plain", "CASSLE", "untrained")
    names = [row[0].strip() for row in table.rows]
    places = [names.index(group) for group in (COLOUR, FORM, CONTENT)]
    for place, end in zip(places, [*places[1:], len(names)], strict=True):
        members = names[place + 1 : end]
        assert members == [n for n, factor in FACTORS.items() if factor.group == names[place]]
        for column, run in enumerate(scores, start=2):
            mean = np.mean([scores[run][name] for name in members])
            assert table.rows[place][column] == pytest.approx(mean)
        changes = [row[1] != "" for row in table.rows[place + 1 : end]]
        assert changes == [names[place] != CONTENT] * len(members)


def test_the_command_prints_the_table_and_where_the_page_is(result, monkeypatch, capsys):
    scores, workdir = result
    monkeypatch.setattr(quickstart, "quickstart", lambda *_: scores)
    quickstart.main("simclr", epath.Path(workdir), SEED)
    printed = capsys.readouterr().out
    for name in FACTORS:
        (line,) = [each for each in printed.splitlines() if each.strip().startswith(f"{name} ")]
        shown = [float(cell) for cell in line.split()[-3:]]
        assert shown == pytest.approx([each[name] for each in scores.values()], abs=6e-4)
    assert quickstart.headline(scores) in printed
    paths = [line for line in printed.splitlines() if line.startswith(str(workdir))]
    assert len(paths) == 3 and all(Path(path).exists() for path in paths)


def test_an_unknown_method_is_one_line(capsys):
    assert run_command("quickstart", "--method=simclrr") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "simclrr" in said and said.count("\n") == 1


def test_the_headline_says_which_run_keeps_more():
    plain = dict.fromkeys(FACTORS, 0.25)
    cassle = {name: 0.5 if factor.group == COLOUR else 0.125 for name, factor in FACTORS.items()}
    said = quickstart.headline({"plain": plain, "CASSLE": cassle, "untrained": plain})
    assert "Compared with plain, CASSLE keeps more colour (0.50; plain 0.25), less contrast" in said
    assert "less content (0.12; plain 0.25)" in said


def test_the_figure_and_the_page_are_there_and_need_no_other_file(result):
    scores, workdir = result
    assert (workdir / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    page = (workdir / "report.html").read_text()
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "data:image/png" in page
    for score in scores["CASSLE"].values():
        assert f"{score:.3f}" in page


def test_the_page_is_the_one_that_every_evaluation_ends_in(result):
    """Its JSON is read like an evaluation's, and holds the same findings as one of the motifs."""
    scores, workdir = result
    subjects, facts = read_report(workdir / "report.json")
    assert list(subjects) == list(scores) and list(facts) == ["plain", "CASSLE"]
    for name, (findings,) in subjects.items():
        read = {each.metric: each.value for each in findings if isinstance(each, Score)}
        assert scores[name].items() <= read.items()
        assert ("loss" in read) == (name != "untrained")
    place = [f"mean, {group}" for group in (COLOUR, FORM, CONTENT)].index
    group = ""
    for metric in (each.metric for each in findings if isinstance(each, Score)):
        if metric.startswith("mean, "):
            group = metric
        else:
            assert place(group) == (COLOUR, FORM, CONTENT).index(FACTORS[metric].group)


def test_a_program_reads_the_scores_the_seed_and_the_groups(result):
    scores, workdir = result
    report = json.loads((workdir / "quickstart.json").read_text())
    assert report["seed"] == SEED and report["method"] == "simclr"
    assert report["scores"] == scores
    colours = [n for n, factor in report["factors"].items() if factor["group"] == COLOUR]
    mean = np.mean([scores["CASSLE"][name] for name in colours])
    assert report["means"]["CASSLE"][COLOUR] == pytest.approx(mean)


def test_the_runs_are_kept_beside_them_and_have_the_seed(result):
    _, workdir = result
    for name in ("plain", "CASSLE"):
        assert (workdir / name / "checkpoints" / "6").exists()
        assert json.loads((workdir / name / "config.json").read_text())["seed"] == SEED
