"""Agents travel by the Hugging Face Hub: everything up to the requests, and those against a local server (fake_hub.py).

The real Hub is not reached: its accounts, its limits and its Xet transfer stay untested.
"""

import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
import yaml
from agents import tiny_agent
from fake_hub import TOKEN, FakeHub
from launcher import CARTPOLE, config, train_here

from r2dreamer.dreamer import load_pretrained, push_to_hub, save_pretrained
from r2dreamer.examples import evaluate
from r2dreamer.examples.export import export
from r2dreamer.examples.training.loading import load_trained

constants = pytest.importorskip("huggingface_hub.constants", reason="the extra hub is not installed")
RECIPE = dict(_target_="r2dreamer.dreamer.build_agent", belief=16, hidden=12, classes=4, categoricals=7, depth=2)
RECIPE |= dict(encoder_multipliers=[1, 2], heads={})


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """In place of the Hub, as HF_ENDPOINT and HF_HOME would set it before the client is imported."""
    server = FakeHub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path)
    yield server
    server.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two agents with different weights."""
    root, found = tmp_path_factory.mktemp("agents"), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        agent = tiny_agent(heads={})
        torch.nn.init.normal_(next(agent.encoder.parameters()))
        found.append(save_pretrained(agent, RECIPE, root / str(seed)))
    return found


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def weights(agent):
    return next(agent.encoder.parameters())


def test_an_agent_is_downloaded_by_its_name_and_revision(hub, folders):
    first = hub.commit("ann/agent", files(folders[0]) | {"state.pt": b"nothing that is read"})
    hub.commit("ann/agent", files(folders[1]))
    hub.branches["ann/agent"]["v1"] = first
    one, other = (weights(load_pretrained(folder)) for folder in folders)
    assert torch.equal(weights(load_pretrained("ann/agent")), other)
    for revision in ("v1", first):
        assert torch.equal(weights(load_pretrained("ann/agent", revision=revision)), one)
        assert torch.equal(weights(load_pretrained(f"ann/agent@{revision}")), one)
    with pytest.raises(ValueError, match="ann/agent@v1 names a revision, and revision=v2 another one"):
        load_pretrained("ann/agent@v1", revision="v2")
    asked = " ".join(hub.requests)
    assert "model.safetensors" in asked and "state.pt" not in asked


def test_an_agent_that_was_downloaded_once_opens_offline(hub, folders, monkeypatch):
    hub.commit("ann/agent", files(folders[0]))
    online = weights(load_pretrained("ann/agent"))
    hub.close()
    assert torch.equal(weights(load_pretrained("ann/agent")), online)


def test_an_agent_is_uploaded_and_comes_back_as_it_was(hub, folders):
    (folders[0] / "notes.txt").write_text("mine alone")
    assert f"{hub.url}/ann/new/commit/" in push_to_hub(folders[0], "ann/new", private=True)
    commit = hub.commits["ann/new"][hub.branches["ann/new"]["main"]]
    assert commit == {name: content for name, content in files(folders[0]).items() if name != "notes.txt"}
    assert list(hub.uploaded.values()) == [commit["model.safetensors"]]  # by Git LFS, the others inside the commit
    assert torch.equal(weights(load_pretrained("ann/new")), weights(load_pretrained(folders[0])))
    push_to_hub(folders[1], "ann/new", revision="later")
    assert torch.equal(weights(load_pretrained("ann/new@later")), weights(load_pretrained(folders[1])))
    assert torch.equal(weights(load_pretrained("ann/new")), weights(load_pretrained(folders[0])))


def paragraph(error):
    text = str(error.value)
    assert len(text) < 480 and "\n" not in text
    return text


def test_what_the_hub_does_not_have_is_said_in_a_paragraph(hub, folders):
    hub.commit("ann/agent", files(folders[0]))
    hub.commit("ann/other", {"pytorch_model.bin": b"", "config.json": b"{}"})
    refused = {
        "ann/nobody": "ann/nobody is no folder here, and the Hub has no such repository",
        "ann/agent@v9": "ann/agent has no revision 'v9'",
        "ann/other": "holds no agent of this library: it has no config.yaml and no model.safetensors",
    }
    for name, says in refused.items():
        with pytest.raises(ValueError) as error:
            load_pretrained(name)
        assert says in paragraph(error)


def test_without_a_connection_the_error_says_what_to_do(hub, folders, monkeypatch):
    hub.close()
    with pytest.raises(ValueError) as error:
        push_to_hub(folders[0], "ann/new")
    assert "could not be uploaded to ann/new: " in paragraph(error) and "needs a connection" in str(error.value)
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        with pytest.raises(ValueError) as error:
            load_pretrained("ann/agent")
        assert "cannot be reached, and no earlier download is in the cache" in paragraph(error)


def test_without_the_extra_the_error_names_it(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError) as error:
        load_pretrained("runs/quickstrat")
    assert "runs/quickstrat is no folder here" in paragraph(error) and "torchrl-r2dreamer[hub]" in str(error.value)
    with pytest.raises(ImportError, match=r"push_to_hub needs .*\[hub\]"):
        push_to_hub(folders[0], "ann/new")
    with pytest.raises(ValueError, match="holds no agent"):  # no name that a repository could have
        load_pretrained("runs/quickstrat/seed0")


def test_a_hostile_repository_executes_nothing(hub, folders, tmp_path):
    class Pickled:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    content = files(folders[0])
    hub.commit("eve/pickle", content | {"model.safetensors": pickle.dumps(Pickled())})
    calls = yaml.safe_load(content["config.yaml"])
    calls["recipe"] |= {"core": {"_target_": "os.mkdir", "path": str(tmp_path / "ran")}}
    hub.commit("eve/call", content | {"config.yaml": yaml.safe_dump(calls).encode()})
    for name, says in {"eve/pickle": "is no whole file of safetensors", "eve/call": "os.mkdir is not part of"}.items():
        with pytest.raises(ValueError, match=says):
            load_pretrained(name)
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Pickled()))
    assert (tmp_path / "ran").exists()  # so that the payload is one


def test_an_upload_is_refused_before_and_by_the_hub(hub, folders, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="holds no model.safetensors"):
        push_to_hub(tmp_path, "ann/new")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(ValueError) as error:
        push_to_hub(folders[0], "ann/new")
    assert "could not be uploaded to ann/new: " in paragraph(error) and "hf auth login" in str(error.value)


def test_evaluate_plays_an_agent_of_the_hub(hub, tmp_path, capsys):
    train_here(tmp_path / "run", *CARTPOLE, "total_frames=52", "eval.every=1000", "name=traveller")
    hub.commit("ann/cartpole", files(export(tmp_path / "run", tmp_path / "exported")))
    arguments = ["episodes=1", "video=false", "device=cpu"]
    capsys.readouterr()
    for checkpoint in ("ann/cartpole", "ann/cartpole@main", tmp_path / "exported"):
        evaluate.main(config(f"checkpoint={checkpoint}", *arguments, name="evaluate"))
    played = [line for line in capsys.readouterr().out.splitlines() if "return" in line or "traveller" in line]
    (tmp_path / "python").symlink_to(sys.executable)  # what is in the working directory is the user's own
    downloaded, here = (load_trained(each, torch.device("cpu"), images=False) for each in ("ann/cartpole", "exported"))
    assert downloaded.output(None, "eval.mp4") == Path("eval.mp4") and downloaded.output("x", "eval.mp4") == Path("x")
    assert here.output(None, "eval.mp4") == Path("exported/eval.mp4")
    (tmp_path / "exported" / "eval.mp4").symlink_to(sys.executable)
    with pytest.raises(ValueError, match="eval.mp4 is a link to"):
        here.output(None, "eval.mp4")
    assert len(played) == 6 and played[:2] == played[2:4] == played[4:] and "traveller at 52 frames" in played[1]
