"""What a run says when its curve will stay flat: each sign once, in a sentence, while there is time to stop it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping

from r2dreamer.dreamer import ActionSpace

LINES = 5  # log lines with updates that a sign must last
# Share of the largest entropy above which a policy counts as random: too large a bonus kept walker's at 0.94.
RANDOM = 0.92


def largest_entropy(actions: ActionSpace) -> float:
    """Of a uniform choice, or of independent Normals with the actor's largest standard deviation, 1."""
    return math.log(actions.size) if actions.discrete else actions.size * 0.5 * math.log(2 * math.pi * math.e)


class Diagnosis:
    """Looks at a run's log lines, the newest ``LINES`` of them and as many before.

    Args:
        entropy: the largest that the actor can have.
    """

    def __init__(self, entropy: float):
        self.entropy = entropy
        self.lines: deque[Mapping[str, float]] = deque(maxlen=2 * LINES)
        self.said: set[str] = set()

    def look(self, line: Mapping[str, float]) -> list[str]:
        """Sentences about what this line is the last sign of."""
        if "train/actor_entropy" not in line:  # nothing was updated
            return []
        self.lines.append(line)
        if len(self.lines) < 2 * LINES:
            return []
        signs = {"entropy": self._random(), "invariance": self._parting(), "collapse": self._collapsed()}
        new = [text for name, text in signs.items() if text and name not in self.said]
        self.said |= {name for name, text in signs.items() if text}
        return new

    def _values(self, name: str) -> tuple[list[float], list[float]] | None:
        """Of the earlier half of the lines and of the later one."""
        values = [value for line in self.lines if (value := line.get(f"train/{name}")) is not None]
        return (values[:LINES], values[LINES:]) if len(values) == len(self.lines) else None

    def _random(self) -> str | None:
        values = self._values("actor_entropy")
        if values and min(values[0] + values[1]) > RANDOM * self.entropy:
            return (
                f"the actor is still random after {2 * LINES} log lines (train/actor_entropy stays near its largest value, "
                f"{self.entropy:.3g}): either the model sees no difference between actions, or "
                "algorithm.actor.entropy_bonus is too large."
            )
        return None

    def _parting(self) -> str | None:
        invariance, spread = self._values("barlow_invariance"), self._values("embedding_std")
        if invariance and spread and min(invariance[1]) > max(invariance[0]) and max(spread[1]) < min(spread[0]):
            return (
                "train/barlow_invariance rises while train/embedding_std falls: the latents lose what the image shows. "
                "Weaken algorithm.kl.representation (0.1 in the paper) or strengthen algorithm.representation.weight."
            )
        return None

    def _collapsed(self) -> str | None:
        spread = self._values("embedding_std")
        if spread and max(spread[1]) < 1e-3:
            return (
                "the embedding has collapsed (train/embedding_std is below 0.001): every image looks the same to the "
                "model. Lower algorithm.optimizer.lr, or change the representation objective."
            )
        return None
