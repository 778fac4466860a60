"""What decoders show, and that a detached decoder touches nothing."""

import pytest
import torch
from agents import WIDTHS, tiny_agent, tiny_records
from launcher import TINY, lines, train_here
from tensordict import TensorDict
from test_family import ONCE

from r2dreamer.dreamer import ActionSpace, ObservationDecoder, ObservationSpace, build_agent, load_pretrained
from r2dreamer.examples.training.openloop import open_loop, predict
from r2dreamer.losses import DetachedDecoder, R2DreamerWorldModelLoss

PIXELS = ["env=probe", "env.task=remember_first_frame", *TINY, *ONCE, "total_frames=40", "log_every=40"]
CONTEXT = 2


@pytest.fixture
def agent():
    return tiny_agent(heads={"decoder": ObservationDecoder})


def records_without_resets(agent, **sizes):
    records = tiny_records(agent, **sizes)
    records["is_init"][:] = False
    return records


def test_what_is_seen_is_filtered_and_what_is_not_is_imagined(agent):
    records = records_without_resets(agent)
    states, beliefs = (each for each in predict(agent, records, CONTEXT))
    assert states.shape[:2] == beliefs.shape[:2] == records.shape
    torch.manual_seed(0)
    expected = agent.world_model(records.copy())["next", "belief"][:, 0]
    torch.testing.assert_close(beliefs[:, 0], expected.detach())
    for changed, differs_from in ((1, 2), (2, None)):  # the image at `changed` is another one
        other = records.clone()
        other["next", "pixels"][:, changed] = 255 - other["next", "pixels"][:, changed]
        results = []
        for data in (records, other):
            torch.manual_seed(5)
            results.append(predict(agent, data, CONTEXT)[1])
        same = [torch.equal(results[0][:, t], results[1][:, t]) for t in range(records.shape[1])]
        assert same == [differs_from is None or t < differs_from for t in range(records.shape[1])]
    other = records.clone()
    other["action"][:, 3] *= -1  # the action that leads to record 3
    results = []
    for data in (records, other):
        torch.manual_seed(5)
        results.append(predict(agent, data, CONTEXT)[1])
    assert torch.equal(results[0][:, :3], results[1][:, :3]) and not torch.equal(results[0][:, 3], results[1][:, 3])


def test_the_film_shows_real_predicted_and_error(agent):
    records = records_without_resets(agent, batch=8)
    film = open_loop(agent, agent.heads["decoder"], records, CONTEXT)
    assert film.shape == (records.shape[1], 3 * 16, 6 * 16, 3)
    real, drawn, error = (torch.from_numpy(film[:, row * 16 : (row + 1) * 16]).float() / 255 for row in range(3))
    seen = records["next", "pixels"][2].permute(0, 2, 3, 1).float() / 255
    torch.testing.assert_close(real[:, :, 32:48], seen)  # the third window
    torch.testing.assert_close(error, (drawn - real + 1) / 2, atol=0.01, rtol=0)


def test_of_four_grey_frames_the_newest_is_shown():
    heads = {"decoder": ObservationDecoder}
    agent = build_agent(ObservationSpace({"pixels": (4, 16, 16)}, {}), ActionSpace(2, False), heads=heads, **WIDTHS)
    records = records_without_resets(agent)
    film = torch.from_numpy(open_loop(agent, agent.heads["decoder"], records, CONTEXT))
    newest = records["next", "pixels"][0, :, 3]
    assert torch.equal(film[:, :16, :16], newest.unsqueeze(-1).expand(-1, -1, -1, 3))


def test_windows_in_which_an_episode_begins_are_left_out(agent):
    records = records_without_resets(agent)
    records["is_init"][1, CONTEXT] = True
    records["is_init"][2, CONTEXT - 1] = True  # within what is seen
    film = open_loop(agent, agent.heads["decoder"], records, CONTEXT)
    assert film.shape[2] == 2 * 16
    records["is_init"][:, CONTEXT] = True
    assert open_loop(agent, agent.heads["decoder"], records, CONTEXT) is None
    assert open_loop(agent, agent.heads["decoder"], records_without_resets(agent, time=2), CONTEXT) is None
    blind = tiny_agent(images=False, heads={"decoder": ObservationDecoder})
    assert open_loop(blind, blind.heads["decoder"], records_without_resets(blind), CONTEXT) is None


def test_where_every_window_is_cut_the_missing_film_is_explained(tmp_path):
    with pytest.warns(UserWarning, match="No open_loop.mp4: in every window of batch_length=16"):
        train_here(
            tmp_path, *PIXELS, "env.task=small_target", "eval.video=true", "batch_length=16", "algorithm=dreamer"
        )
    assert not (tmp_path / "open_loop.mp4").exists()


def test_a_detached_decoder_learns_and_gives_no_other_parameter_a_gradient():
    agent = tiny_agent()
    loss = R2DreamerWorldModelLoss(agent.world_model)
    detached = DetachedDecoder.of(agent, decoder=ObservationDecoder)
    losses, posterior = loss(tiny_records(agent))
    keys = set(posterior.keys(True, True))
    terms, _ = detached(posterior, loss.tensor_keys)
    assert set(posterior.keys(True, True)) == keys
    terms["detached_decoder"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in detached.parameters())
    assert all(p.grad is None for part in agent.parts().values() for p in part.parameters())
    plain = ObservationDecoder(agent.sizes)
    plain.load_state_dict(detached.decoder.state_dict())
    seen = plain(TensorDict({"next": posterior["next"].select("state", "belief").detach()}, posterior.shape))["next"]
    error = (seen["reconstruction", "pixels"] - posterior["next", "pixels"] / 255).square().sum((-1, -2, -3)).mean()
    speed = posterior["next", "speed"]
    error += (seen["reconstruction", "speed"] - speed.sign() * speed.abs().log1p()).square().sum(-1).mean()
    torch.testing.assert_close(terms["detached_decoder"], error)


@pytest.mark.parametrize("algorithm", ["r2dreamer", "dreamerv1"])  # whose optimiser clips all of the model together
def test_a_run_with_a_detached_decoder_is_the_run_without_and_films_what_it_sees(tmp_path, algorithm):
    video = ["eval.video=true", "batch_length=8", f"algorithm={algorithm}"]
    if algorithm == "dreamerv1":
        small = {"belief": 16, "hidden": 8, "units": 8, "depth": 2, "categoricals": 3, "classes": 1}
        video += [*(f"model.{name}={size}" for name, size in small.items()), "algorithm.optimizer.max_norm=1e-3"]
    for name, overrides in (("without", []), ("with", ["detached_decoder=observation"])):
        trainer = train_here(tmp_path / name, *PIXELS, *video, *overrides)
    weights = trainer.learner.state_dict()
    former = {name.replace("detached_decoder.", "probe."): weight for name, weight in weights.items()}
    assert former.keys() != weights.keys()
    trainer.learner.load_state_dict(former)  # as a checkpoint of an earlier version has them
    strip = lambda line: {key: value for key, value in line.items() if "detached_decoder" not in key}
    with_decoder, without = lines(tmp_path / "with"), lines(tmp_path / "without")
    assert [strip(line) for line in with_decoder] == without != with_decoder
    assert (tmp_path / "with" / "open_loop.mp4").exists()
    loaded, plain = (load_pretrained(tmp_path / name) for name in ("with", "without"))
    state, belief = torch.rand(2, loaded.sizes.state), torch.rand(2, loaded.sizes.belief)
    decoded = loaded.heads["detached_decoder"].decode(state, belief)["pixels"]
    assert (
        decoded.shape == (2, 3, 64, 64) and decoded.std() > 0.01
    )  # what it learnt: the first weights draw all but grey
    assert loaded.world_model.out_keys == plain.world_model.out_keys and "detached_decoder" not in plain.heads
    assert (tmp_path / "without" / "open_loop.mp4").exists() == (algorithm == "dreamerv1")  # V1 has its own decoder


def test_dreamer_films_with_its_own_decoder_and_filming_changes_nothing(tmp_path):
    dreamer = [*PIXELS, "algorithm=dreamer", "batch_length=8", "total_frames=80", "eval.every=40"]
    for video in (True, False):
        train_here(tmp_path / str(video), *dreamer, f"eval.video={video}")
    assert lines(tmp_path / "True") == lines(tmp_path / "False")
    assert (tmp_path / "True" / "open_loop.mp4").stat().st_size > 500
    assert not (tmp_path / "False" / "open_loop.mp4").exists()
