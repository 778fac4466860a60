"""Patches in environments: specs, workers, resets, and the onset in an episode."""

from functools import partial

import pytest

import r2dreamer.envs  # noqa: F401  # isort: skip  # before TorchRL
import torch
from torchrl.envs import ParallelEnv, SerialEnv, ToTensorImage, TransformedEnv
from torchrl.envs.utils import check_env_specs

from r2dreamer.envs import AdversarialPatch, make_probe


def probe(seed=0, task="ending"):
    return make_probe(task, seed=seed, image_size=16)


def patched_probe(seed=0):
    return TransformedEnv(probe(seed, "reward_from_action"), AdversarialPatch((3, 5), placement="random", seed=seed))


def test_the_transform_keeps_the_specs_of_an_environment():
    check_env_specs(patched_probe())
    check_env_specs(
        TransformedEnv(probe(), ToTensorImage(shape_tolerant=True)).append_transform(AdversarialPatch((3, 5)))
    )
    serial = SerialEnv(2, [lambda seed=seed: probe(seed) for seed in range(2)])
    check_env_specs(TransformedEnv(serial, AdversarialPatch((3, 5), placement="random", onset=2)))
    with pytest.raises(ValueError, match="larger than the images"):
        TransformedEnv(probe(), AdversarialPatch((17, 2))).reset()
    with pytest.raises(ValueError, match="no images under 'camera'"):
        TransformedEnv(probe(), AdversarialPatch((2, 2), pixels_key="camera")).reset()


def test_it_works_in_the_workers_of_a_parallel_environment():
    env = ParallelEnv(2, [partial(patched_probe, seed) for seed in range(2)], mp_start_method="fork")
    try:
        seen = env.rollout(3)["pixels"]
    finally:
        env.close()
    for seed in range(2):
        raw = probe(seed, "reward_from_action").reset()["pixels"]
        changed = (seen[seed, 0] != raw).any(0)
        assert 12 <= changed.sum() <= 15 and seen.shape == (2, 3, 3, 16, 16)
        assert torch.equal(seen[seed, 0][:, ~changed], raw[:, ~changed])


class Longer(torch.nn.Module):
    """Leaves the probe "ending" at once in the first environment, at the third step in the second, never in the third."""

    def __init__(self):
        super().__init__()
        self.steps = 0

    def __call__(self, root):
        self.steps += 1
        leave = torch.tensor([True, self.steps % 3 == 0, False])
        return root.set("action", torch.nn.functional.one_hot(leave.long(), 2))


@pytest.mark.parametrize("onset", [0, 2])
def test_every_observation_of_a_batch_is_patched_once_through_resets_and_from_its_onset(onset):
    def play(transform):
        env = TransformedEnv(SerialEnv(3, [lambda seed=seed: probe(seed) for seed in range(3)]), transform)
        policy, root, seen = Longer(), env.reset(), []
        for _ in range(7):
            stepped, following = env.step_and_maybe_reset(policy(root))
            seen.append((stepped["pixels"], stepped["next", "pixels"], stepped["next", "done"][:, 0]))
            root = following
        return seen

    patch = AdversarialPatch((3, 5), mode="perturb", eps=20 / 255, onset=onset)
    patch.delta.data[:] = 20 / 255
    time = torch.zeros(3, dtype=torch.int64)
    for (raw, raw_next, done), (seen, seen_next, _) in zip(
        play(AdversarialPatch((1, 1), mode="perturb", eps=1 / 255, onset=10**6)), play(patch), strict=True
    ):
        for index in range(3):
            for moment, before, after in ((time[index], raw, seen), (time[index] + 1, raw_next, seen_next)):
                change = after[index].int() - before[index].int()
                assert change.max() == (20 if moment >= onset and before[index].max() < 255 else change.max())
                assert (change != 0).any() == bool(moment >= onset and (before[index, :, 13:, 5:10] < 255).any())
                assert change.min() >= 0 and change[:, :13].abs().max() == 0
        time = torch.where(done, 0, time + 1)
    assert time.tolist() != [7, 7, 7]


def test_a_random_patch_stays_where_it_is_during_an_episode_and_moves_for_the_next():
    env = TransformedEnv(probe(task="reward_from_action"), AdversarialPatch((3, 5), placement="random", seed=1))
    places = []
    for _ in range(4):
        seen = env.rollout(8)["pixels"]
        assert (seen == seen[0]).all()
        places.append(tuple((seen[0] != 64).any(0).nonzero()[0].tolist()))
    assert len(set(places)) > 1
