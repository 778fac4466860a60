"""What random play and a human tester score in the 26 games of Atari 100k, and returns measured by them.

Source: Wang et al. 2016, "Dueling Network Architectures for Deep Reinforcement Learning", the columns Random and Human
of the table with up to 30 no-op starts; Badia et al. 2020 ("Agent57") and the Atari 100k papers use the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

SCORES = {  # game: random, human
    "alien": (227.8, 7127.7),
    "amidar": (5.8, 1719.5),
    "assault": (222.4, 742.0),
    "asterix": (210.0, 8503.3),
    "bank_heist": (14.2, 753.1),
    "battle_zone": (2360.0, 37187.5),
    "boxing": (0.1, 12.1),
    "breakout": (1.7, 30.5),
    "chopper_command": (811.0, 7387.8),
    "crazy_climber": (10780.5, 35829.4),
    "demon_attack": (152.1, 1971.0),
    "freeway": (0.0, 29.6),
    "frostbite": (65.2, 4334.7),
    "gopher": (257.6, 2412.5),
    "hero": (1027.0, 30826.4),
    "jamesbond": (29.0, 302.8),
    "kangaroo": (52.0, 3035.0),
    "krull": (1598.0, 2665.5),
    "kung_fu_master": (258.5, 22736.3),
    "ms_pacman": (307.3, 6951.6),
    "pong": (-20.7, 14.6),
    "private_eye": (24.9, 69571.3),
    "qbert": (163.9, 13455.0),
    "road_runner": (11.5, 7845.0),
    "seaquest": (68.4, 42054.7),
    "up_n_down": (533.4, 11693.2),
}


class HumanNormalizedScore:
    """(score - random) / (human - random), averaged over the evaluation's episodes: 0 is random, 1 is human.

    Nothing is reported for a game without reference, nor where a lost life ends an episode (`lives` as in
    `make_atari`): a return is no score of the game then.

    Example:
        >>> HumanNormalizedScore("pong")([14.6, -20.7], {})
        {'human_normalized': 0.5}
    """

    def __init__(self, task: str, lives: str = "unused"):
        self.reference = SCORES.get(task) if lives == "unused" else None

    def __call__(self, returns: Sequence[float], metrics: Mapping[str, Sequence[float]]) -> Any:
        if self.reference is None or not returns:
            return {}
        random, human = self.reference
        return {"human_normalized": (fmean(returns) - random) / (human - random)}
