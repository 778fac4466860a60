"""Several processes train one agent: they compute what one computes, save one checkpoint, and leave together.

The processes are forked with the variables that `torchrun` sets; one test starts `torchrun` itself.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from launcher import CARTPOLE, EXAMPLES, config, count_lines, lines, steps, wait_for

import r2dreamer.envs  # noqa: F401  # isort: skip  # before TorchRL
from r2dreamer.dreamer import ActionSpace, ObservationSpace
from r2dreamer.dreamer.networks import distributions
from r2dreamer.dreamer.rssm.latents import CategoricalLatent, GaussianLatent
from r2dreamer.examples.training import shards
from r2dreamer.examples.training.checkpoint import CheckpointError
from r2dreamer.examples.training.learner import Learner
from r2dreamer.examples.training.manifest import own_directories
from r2dreamer.examples.training.ranks import Ranks
from r2dreamer.examples.training.setup import make_agent

MEMBERS = """
r2dreamer dreamer infonce vicreg nedreamer dreamercdp sigreg dreamerpro none dreamerv2 dreamerv1
""".split()  # noqa: SIM905
UPDATES = 5
RUN = [*CARTPOLE, "batch_size=4", "env.eval_episodes=3", "checkpoint.exact=true", "env.parallel=false", "timeout=30"]


class Together:
    """Two forked ranks; the store that `torchrun` keeps for them is kept here."""

    def __init__(self, server, folder, *overrides, other=(), call=None, started=2):
        """other: overrides of the second rank alone. started: how many of the two there are."""
        self.store = dist.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
        )
        shared = {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": "2"}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port)}
        self.ranks = []
        command = [*overrides, *([] if call else [f"logdir={folder / 'log'}"])]
        for rank, more in enumerate(((), other)[:started]):
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            run = server.start(folder / f"rank{rank}", *command, *more, call=call, environment=environment)
            self.ranks.append(run)

    def wait(self, timeout=600):
        return [run.wait(timeout) for run in self.ranks]


def two(server, folder, *overrides, **more):
    together = Together(server, folder, *overrides, **more)
    return together, together.wait()


# Five updates


def without_chance():
    """Every draw of a latent or an action is the same number: halves of a batch then draw what the whole one does."""
    half = lambda self, shape, device: torch.full((*shape, self.num_categoricals), 0.5, device=device)
    CategoricalLatent.noise = half
    GaussianLatent.noise = lambda self, shape, device: torch.zeros(*shape, self.size, device=device)
    torch.Tensor.exponential_ = lambda self, *_, **__: self.fill_(1.0)
    assert "exponential_()" in Path(distributions.__file__).read_text()  # how actions are drawn


def joined_batch(agent, seed, windows=6, length=5):
    generator = torch.Generator().manual_seed(seed)
    batch = agent.example_record().expand(windows, length).clone()
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    choice = torch.randint(agent.actions.size, (windows, length), generator=generator)
    batch["action"] = torch.nn.functional.one_hot(choice, agent.actions.size).float()
    for key, size in agent.observations.vectors.items():
        batch["next", key] = draw(windows, length, size)
    batch["next", "reward"] = draw(windows, length, 1)
    batch["is_init"] = torch.rand(windows, length, 1, generator=generator) < 0.2
    for key, size in agent.latent_sizes.items():
        batch[key] = torch.zeros(windows, length, size)
    return batch


def trained(member, ranks):
    """Parameters before and after, the metrics, and how many bytes the gradients have."""
    cfg = config(*CARTPOLE, f"algorithm={member}", "model.units=8", "algorithm.optimizer.lr=1e-3")
    cfg.algorithm.optimizer.warmup_steps = 1
    cfg.algorithm.optimizer.eps = 1e-3  # at 1e-20 a gradient that is 0 but for rounding moves its weight as any other
    torch.manual_seed(0)
    agent = make_agent(cfg.algorithm, cfg.model, ObservationSpace({}, {"observation": 4}), ActionSpace(2, True))
    learner = Learner(agent, cfg.algorithm, ranks=ranks)
    before = {name: value.detach().clone() for name, value in learner.named_parameters()}
    torch.manual_seed(1)
    for update in range(UPDATES):
        batch = joined_batch(agent, update)
        losses, _ = learner.update(batch.chunk(ranks.count)[ranks.rank])
    names = [name for name, value in losses.items() if value.numel() == 1]
    metrics = ranks.mean({name: float(losses[name]) for name in names})
    after = {name: value.detach() for name, value in learner.named_parameters()}
    size = 4 * sum(each.numel() for group in learner.optimizer.param_groups for each in group["params"])
    return before, after, metrics, size


def one_rank(out):
    """What each of two forked processes does."""
    without_chance()
    rank = int(os.environ["RANK"])
    ranks, results = Ranks("cpu", 60, 2, rank), {}
    reduced, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda tensor, *more, **options: (
        reduced.append(tensor.nbytes),
        all_reduce(tensor, *more, **options),
    )
    for member in MEMBERS:
        reduced.clear()
        _, parameters, metrics, size = trained(member, ranks)
        results[member] = parameters, metrics, size, sorted(reduced)
    torch.save(results, f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def halves(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("halves")
    together, statuses = two(server, folder, str(folder), call="test_scale:one_rank")
    assert statuses == [0, 0], [run.stderr for run in together.ranks]
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("member", MEMBERS)
def test_five_updates_on_halves_of_a_batch_equal_those_of_one_process_on_all_of_it(halves, member, monkeypatch):
    for owner, name in ((CategoricalLatent, "noise"), (GaussianLatent, "noise"), (torch.Tensor, "exponential_")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back afterwards
    without_chance()
    before, expected, metrics, _ = trained(member, Ranks())
    (first, found, *_), (second, others, *_) = (results[member] for results in halves)
    moved = max((expected[name] - before[name]).abs().max() for name in before)
    assert moved > 1e-3
    for name, value in expected.items():
        assert torch.equal(first[name], second[name]), name
        assert (first[name] - value).abs().max() <= 1e-5, name
    assert found == others and found.keys() == metrics.keys()
    for name, value in metrics.items():
        assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("member", MEMBERS)
def test_an_update_sends_its_gradients_once_in_one_piece(halves, member):
    for results in halves:
        _, _, size, reduced = results[member]  # bytes of each all-reduce, sorted
        assert len(set(reduced[-UPDATES:])) == 1 and 0.9 * size < reduced[-1] <= size
        assert all(each < 0.9 * size for each in reduced[:-UPDATES])


# Runs


@pytest.fixture(scope="module")
def uninterrupted(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    together, statuses = two(server, folder, *RUN)
    assert statuses == [0, 0], [run.stderr for run in together.ranks]
    return folder, together


def test_two_ranks_count_frames_updates_and_episodes_as_one_process_does(uninterrupted):
    folder, together = uninterrupted
    log, first, second = folder / "log", *together.ranks
    assert steps(log, "count/updates") == [40, 80, 120, 160, 200] and steps(log, "eval/return") == [0, 80, 160, 200]
    last = lines(log, '"count/updates"')[-1]
    assert last["count/updates"] == pytest.approx((200 - 20) * 5 / (4 * 5), abs=2)
    assert last["count/train_ratio"] == pytest.approx(last["count/updates"] * 20 / 200)
    assert "finished at 200 frames" in first.stdout and (second.stdout, second.stderr) == ("", "")
    saved = [[path.name for path in own_directories(log / where)] for where in ("checkpoints", "ranks/1/checkpoints")]
    assert saved[0] and saved[0] == saved[1][-len(saved[0]) :]


def test_a_killed_rank_is_named_and_both_resume_exactly(server, uninterrupted, tmp_path):
    expected = lines(uninterrupted[0] / "log")
    together = Together(server, tmp_path, *RUN)
    first, second = together.ranks
    log = tmp_path / "log"
    wait_for(first, lambda: count_lines(log) and 80 in steps(log, "count/updates"))
    second.kill()
    assert first.wait(60) == 1
    assert "Rank 1 of 2 has ended or hangs" in first.stderr and "Traceback" not in first.stderr
    assert 0 < count_lines(log) < len(expected)
    together, statuses = two(server, tmp_path, *RUN)
    assert statuses == [0, 0], [run.stderr for run in together.ranks]
    assert lines(log) == expected


def test_sigterm_saves_one_checkpoint_of_both(server, tmp_path):
    command = [*RUN, "checkpoint.exact=false", "total_frames=100000", "checkpoint.every=100000"]
    together = Together(server, tmp_path, *command)
    log = tmp_path / "log"
    wait_for(together.ranks[0], lambda: count_lines(log) > 1)
    os.kill(together.ranks[1].pid, signal.SIGTERM)  # one is enough
    assert together.wait(60) == [0, 0]
    assert "interrupted" in together.ranks[0].stdout
    names = [[path.name for path in own_directories(log / where)] for where in ("checkpoints", "ranks/1/checkpoints")]
    assert len(names[0]) == 1 and names[0] == names[1]


def test_another_number_of_ranks_goes_on_with_what_was_learnt(server, tmp_path):
    command = [*RUN, "checkpoint.exact=false"]
    assert two(server, tmp_path, *command)[1] == [0, 0]
    alone = server.run(tmp_path / "alone", *command, "total_frames=280", f"logdir={tmp_path / 'log'}")
    assert alone.status == 0, alone.stderr
    assert "saved by 2 rank(s) and goes on with 1" in alone.stderr
    together, statuses = two(server, tmp_path, *command, "total_frames=360")
    assert statuses == [0, 0], [run.stderr for run in together.ranks]
    assert "saved by 1 rank(s) and goes on with 2" in together.ranks[0].stderr
    updates = [line["count/updates"] for line in lines(tmp_path / "log", '"count/updates"')]
    assert updates == sorted(updates) and updates[-1] > updates[-3] > updates[0]


@pytest.mark.parametrize(
    ("overrides", "other", "said"),
    [
        (
            ["env.num_envs=3"],
            [],
            "env.num_envs=3 is of all ranks and cannot be divided among 2: use env.num_envs=2 or 4.",
        ),
        (["batch_size=5"], [], "batch_size=5 is of all ranks"),
        ([], ["seed=1"], "seed is 0 on rank 0 and 1 on rank 1"),
    ],
)
def test_ranks_that_cannot_work_together_are_refused_in_one_paragraph(server, tmp_path, overrides, other, said):
    together, statuses = two(server, tmp_path, *RUN, *overrides, other=other)
    assert statuses == [1, 1]
    texts = [" ".join(run.stderr.split()) for run in together.ranks]
    assert said in texts[0] and texts[0].count("HYDRA_FULL_ERROR") == 1 and texts[1] == ""
    assert not (tmp_path / "log" / "metrics.jsonl").exists()


@pytest.mark.parametrize("key", ["device", "torch", "code", "program"])
def test_ranks_of_another_device_program_or_commit_are_refused(monkeypatch, key):
    ranks = Ranks()
    ranks.count = 2
    monkeypatch.setattr(ranks, "gather", lambda mine: [mine, ("node7", mine[1] | {key: "another"})])
    with pytest.raises(ValueError, match=rf"{key} is .* on rank 0 and another on rank 1 \(node7\)"):
        ranks.check_same(config(*CARTPOLE))


def saved(monkeypatch, failing):
    """The ranks that saved, in order, and what each was told, where one of two cannot save."""
    monkeypatch.setattr(shards, "snapshot", lambda trainer: {})
    barrier, sent, order, told = threading.Barrier(2), [None, None], [], [None, None]
    cfg = config(*CARTPOLE)

    def run(rank):
        def gather(value):
            sent[rank] = value
            barrier.wait()
            values = list(sent)
            barrier.wait()
            return values

        def save(*_, rotate):
            assert rotate is (rank == 0)
            if rank == failing:
                raise CheckpointError("full")
            order.append(rank)

        ranks = SimpleNamespace(rank=rank, first=rank == 0, meet=barrier.wait, gather=gather)
        parts = {
            "ranks": ranks,
            "replay": None,
            "frames": 7,
            "cfg": cfg,
            "checkpoints": SimpleNamespace(save=save, rotate=lambda: order.append("rotated")),
        }
        try:
            shards.save_together(SimpleNamespace(**parts))
        except CheckpointError as error:
            told[rank] = str(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return order, told


def test_the_first_rank_saves_last_and_where_one_fails_all_are_told(monkeypatch):
    assert saved(monkeypatch, failing=None) == ([1, 0, "rotated"], [None, None])
    assert saved(monkeypatch, failing=1) == ([], ["Rank 1: full"] * 2)
    assert saved(monkeypatch, failing=0) == ([1], ["full"] * 2)


def test_without_a_step_that_all_ranks_have_what_was_learnt_goes_on(server, tmp_path):
    _, statuses = two(server, tmp_path, *RUN, "total_frames=100")
    assert statuses == [0, 0]
    for directory in own_directories(tmp_path / "log" / "ranks" / "1" / "checkpoints"):
        (directory / "state.pt").unlink()
    together, statuses = two(server, tmp_path, *RUN)
    assert statuses == [1, 1] and "checkpoint.exact=false" in " ".join(together.ranks[0].stderr.split())
    together, statuses = two(server, tmp_path, *RUN, "checkpoint.exact=false")
    said = " ".join(together.ranks[0].stderr.split())
    assert statuses == [0, 0] and "no step is whole on every rank: what was learnt is kept" in said, said
    assert [step for step in steps(tmp_path / "log", "count/updates") if step > 100][-1] == 200


def test_a_rank_that_cannot_open_its_directory_says_so_and_all_leave(server, tmp_path):
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "ranks").write_text("a file in the place of a directory")
    together, statuses = two(server, tmp_path, *RUN)
    assert statuses == [1, 1]
    first, second = (" ".join(run.stderr.split()) for run in together.ranks)
    assert first == "" and second.startswith("Rank 1:") and "cannot be written" in second and "logdir=PATH" in second
    assert second.count("HYDRA_FULL_ERROR") == 1


def test_a_rank_that_never_starts_is_named_and_the_other_leaves(server, tmp_path):
    together = Together(server, tmp_path, *RUN, "timeout=2", started=1)
    assert together.wait(60) == [1]
    (first,) = together.ranks
    assert "Rank 1 of 2 has ended or hangs" in " ".join(first.stderr.split()) and "Traceback" not in first.stderr


@pytest.mark.slow
def test_torchrun_trains_and_leaves_no_process_when_a_rank_is_killed(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(EXAMPLES / "train.py"), *RUN, "checkpoint.exact=false", "total_frames=100000", "logdir=log"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    while count_lines(tmp_path / "log") < 2:
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.2)
    ranks = children(run.pid)
    victim = next(pid for pid in ranks if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    os.kill(victim, signal.SIGKILL)
    _, said = run.communicate(timeout=120)
    assert run.returncode and said.count("Rank 1 of 2 has ended or hangs") == 1
    assert not [pid for pid in ranks if Path(f"/proc/{pid}").exists()]


def children(pid):
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
