"""A run writes into its own directory alone, whatever links somebody has laid there."""

import pytest
from launcher import CARTPOLE, config, train_here
from test_attack_script import SEEING
from test_foreign_runs import edited, refusal, save

from r2dreamer.dreamer import load_pretrained, save_pretrained
from r2dreamer.examples import attack, evaluate, saliency
from r2dreamer.examples.training.files import refuse_links
from r2dreamer.examples.training.setup import open_run

WRITTEN = [".lock", "metrics.jsonl", "metrics.superseded.jsonl", "config.yaml", "wandb_run.json", "curve.png"]
WRITTEN += ["tensorboard", "checkpoints", "checkpoints/journal", "checkpoints/journal/00000009-records.bin"]
WRITTEN += ["wandb", "eval.mp4"]


@pytest.mark.parametrize("name", WRITTEN)
def test_a_run_writes_through_no_link_that_leads_out_of_its_directory(tmp_path, name):
    outside, logdir = tmp_path / "outside", tmp_path / "log"
    link = logdir / name
    link.parent.mkdir(parents=True)
    if "." in name:
        outside.write_text("mine")
    else:
        outside.mkdir()
    cfg = config(*CARTPOLE, f"logdir={logdir}")
    for target in (outside, "../" * name.count("/") + "../outside"):
        link.symlink_to(target)
        with pytest.raises(ValueError, match=f"{link.name} is a link to .*outside, and a run writes"):
            open_run(cfg)
        link.unlink()
    link.symlink_to(tmp_path / "nothing")  # which opening would make
    with pytest.raises(ValueError, match="is a link to .*nothing"):
        open_run(cfg)
    assert not (tmp_path / "nothing").exists()
    assert outside.read_text() == "mine" if outside.is_file() else not list(outside.iterdir())
    assert not (logdir / ".lock").exists()


def test_links_that_stay_inside_and_those_of_wandb_are_none_of_its_business(tmp_path):
    logdir = tmp_path / "log"
    (logdir / "checkpoints" / "step_000000052").mkdir(parents=True)
    (logdir / "checkpoints" / "best").symlink_to("step_000000052")
    (logdir / "wandb").mkdir()
    (logdir / "wandb" / "debug.log").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "linked").symlink_to(logdir)
    assert refuse_links(tmp_path / "linked") == tmp_path / "linked"
    assert refuse_links(tmp_path / "nowhere") == tmp_path / "nowhere"


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeing")
    train_here(folder, *SEEING, "total_frames=60", "eval.every=1000")
    return folder


@pytest.mark.parametrize("script, name", [(evaluate, "eval.mp4"), (saliency, "saliency"), (attack, "attack")])
def test_the_tools_write_into_the_run_alone(seeing, tmp_path, script, name, capsys):
    folder, outside = tmp_path / "foreign", tmp_path / "outside"
    edited(seeing, folder, lambda config: None)
    (folder / name).symlink_to(outside)
    assert f"{name} is a link to {outside}" in refusal(script, folder, capsys, "device=cpu")
    assert not outside.exists()


def test_a_saved_agent_does_not_overwrite_what_a_link_leads_to(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    folder = tmp_path / "foreign"
    save(folder)
    agent = load_pretrained(folder)
    (folder / "config.yaml").symlink_to(precious)
    with pytest.raises(ValueError, match="config.yaml is a link"):
        save_pretrained(agent, None, folder)
    assert precious.read_text() == "mine"
