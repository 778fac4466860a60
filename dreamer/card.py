"""The model card of a saved agent: what it does, how well, how it was made, and what it is not for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

LIBRARY = "torchrl-r2dreamer"


@dataclass(frozen=True)
class ModelCard:
    """What the card says; of what is left out it says that nobody stated it.

    Args:
        name: the title.
        task: what the agent was trained on.
        returns: mean and standard deviation of the greedy return over `episodes` episodes.
        seed: of the training.
        frames: environment frames of the training.
        episodes: of the return.
        command: that trained it.
        commit: of this project, that trained it.
        limits: sentences, beside what holds for every agent.
    """

    name: str = "agent"
    task: str = ""
    returns: tuple[float, float] | None = None
    episodes: int | None = None
    seed: int | None = None
    frames: int | None = None
    command: str = ""
    commit: str = ""
    limits: Sequence[str] = ()

    def text(self, packed: Mapping[str, Any]) -> str:
        """The whole file; `packed` is the agent as `pack` gives it."""
        said = lambda value: "not stated" if value in (None, "") else value
        score = "not measured" if self.returns is None else "{:.4g} ± {:.3g}".format(*self.returns)
        observations, actions = packed["observations"], packed["actions"]
        seen = {**observations["images"], **observations["vectors"]}
        does = f"one of {actions['size']}" if actions["discrete"] else f"{actions['size']} numbers in [-1, 1]"
        added = [head["weights"] for head in packed["more_heads"].values()]
        count = sum(value.numel() for weights in [*packed["weights"].values(), *added] for value in weights.values())
        limits = [
            "Trained in this task alone, with one seed; another seed can give another return.",
            "It acts on the observations named above, in their order and units.",
            *self.limits,
        ]
        return f"""---
{yaml.safe_dump(self.front_matter(), sort_keys=False, allow_unicode=True)}---

# {self.name}

A world-model agent of {LIBRARY}.

| | |
|---|---|
| task | {said(self.task)} |
| greedy return | {score} |
| episodes of that return | {said(self.episodes)} |
| training seed | {said(self.seed)} |
| environment frames | {f"{self.frames:,}" if self.frames is not None else "not stated"} |
| observes | {", ".join(f"`{key}` {list(size) if isinstance(size, Sequence) else size}" for key, size in seen.items())} |
| acts | {does} |
| numbers in `model.safetensors` | {count:,} |
| command | {f"`{self.command}`" if self.command else "not stated"} |
| commit | {said(self.commit)} |

```python
from r2dreamer.dreamer import load_pretrained

agent = load_pretrained("FOLDER")  # or "owner/name" on the Hugging Face Hub
```

`config.yaml` holds every setting, `model.safetensors` the weights. Loading executes nothing that is in them.

## Limits

{chr(10).join(f"- {limit}" for limit in limits)}
"""

    def front_matter(self) -> dict[str, Any]:
        """What the Hub reads of a card."""
        tags = ["reinforcement-learning", "world-model", "dreamer", "torchrl"]
        found: dict[str, Any] = {"library_name": LIBRARY, "pipeline_tag": "reinforcement-learning", "tags": tags}
        if self.returns is not None:
            value = "{:.2f} +/- {:.2f}".format(*self.returns)
            task = self.task or self.name
            result = {
                "task": {"type": "reinforcement-learning", "name": "reinforcement-learning"},
                "dataset": {"name": task, "type": task},
                "metrics": [{"type": "mean_reward", "value": value, "name": "mean_reward", "verified": False}],
            }
            found["model-index"] = [{"name": self.name, "results": [result]}]
        return found
