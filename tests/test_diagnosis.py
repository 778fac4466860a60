"""A run that will not learn says so once, in a sentence; a healthy one says nothing."""

import math

import pytest

from r2dreamer.dreamer import ActionSpace
from r2dreamer.examples.training.diagnosis import LINES, Diagnosis, largest_entropy


def said_about(lines):
    diagnosis = Diagnosis(entropy=2.0)
    return [text for line in lines for text in diagnosis.look({f"train/{name}": value for name, value in line.items()})]


def healthy(index):
    return {"actor_entropy": 1.5, "barlow_invariance": 300.0 - index, "embedding_std": 0.2 + index / 100}


def test_a_healthy_run_says_nothing():
    assert said_about([healthy(index) for index in range(50)]) == []


def test_a_policy_that_stays_random_is_named_once():
    said = said_about([healthy(index) | {"actor_entropy": 1.88} for index in range(50)])
    assert len(said) == 1 and "actor is still random" in said[0] and "entropy_bonus" in said[0]


def test_views_that_part_while_the_embedding_shrinks_are_named_with_the_remedy():
    falling = [healthy(0) | {"barlow_invariance": 200.0 + n, "embedding_std": 0.2 - n / 1000} for n in range(50)]
    said = said_about(falling)
    assert len(said) == 1 and "barlow_invariance rises" in said[0] and "algorithm.kl.representation" in said[0]


def test_rising_invariance_alone_is_no_sign():
    assert said_about([healthy(n) | {"barlow_invariance": 200.0 + n} for n in range(50)]) == []


def test_a_collapsed_embedding_is_named_and_a_member_without_barlow_is_watched_too():
    said = said_about([{"actor_entropy": 1.0, "embedding_std": 1e-4}] * 50)
    assert len(said) == 1 and "collapsed" in said[0]


def test_nothing_is_said_before_there_were_enough_lines_with_updates():
    diagnosis = Diagnosis(entropy=2.0)
    random = {"train/actor_entropy": 2.0}
    lines = [{"count/updates": 0}] * 50 + [random] * (2 * LINES - 1)
    assert [text for line in lines for text in diagnosis.look(line)] == []
    assert len(diagnosis.look(random)) == 1


@pytest.mark.parametrize(
    ("actions", "largest"), [(ActionSpace(3, True), math.log(3)), (ActionSpace(2, False), 2 * 1.4189385)]
)
def test_the_largest_entropy_is_that_of_the_widest_distribution(actions, largest):
    assert largest_entropy(actions) == pytest.approx(largest)
