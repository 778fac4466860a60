"""What patches cost an agent: real returns, paired by episode, beside imagined ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..figures.bootstrap import bootstrap_means, percentiles
from ..training.evaluation import EvaluationResult

BELIEFS = ("clean", "patched")
CONTROLS = ("grey", "black", "white", "noise", "shuffled", "other agent")


def paired_difference(returns: Sequence[float], baseline: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Mean of `returns - baseline`, episode by episode, and its bootstrap 95 % interval (percentiles)."""
    if len(returns) != len(baseline):
        raise ValueError(f"{len(returns)} and {len(baseline)} episodes are not paired: play the same seeds.")
    difference = np.asarray(returns, dtype=float) - np.asarray(baseline, dtype=float)
    low, high = percentiles(bootstrap_means(difference, seed, draws=10_000))
    return {"mean": float(difference.mean()), "low": float(low), "high": float(high)}


def percent_drop(value: float, baseline: float) -> float | None:
    """By how many percent of |baseline| the value lies below it; None where that is 0."""
    return 100 * (baseline - value) / abs(baseline) if baseline else None


def compare(results: Mapping[str, EvaluationResult], imagined: Mapping[str, dict]) -> dict[str, dict]:
    """Every condition beside "clean" and "optimized"; imagined: what `Attack.imagined` found of each patch."""
    conditions = {}
    for name, result in results.items():
        line = {"returns": result.returns, "mean": result.mean, "std": result.std}
        if name != "clean":
            line["change"] = paired_difference(result.returns, results["clean"].returns)
            line["percent_drop"] = percent_drop(result.mean, results["clean"].mean)
            line["imagined"] = imagined[name]
        if name != "optimized":
            line["optimized_minus_this"] = paired_difference(results["optimized"].returns, result.returns)
        conditions[name] = line
    return conditions


def verdict(conditions: Mapping[str, dict]) -> str:
    """Against which controls the whole interval lies below 0, and against which it does not."""
    controls = [name for name in conditions if name in CONTROLS]
    shown = [name for name in controls if conditions[name]["optimized_minus_this"]["high"] < 0]
    others = [name for name in controls if name not in shown]
    said = [f"lower real return than {', '.join(shown)}"] if shown else []
    said += [f"not shown to be lower than {', '.join(others)}"] if others else []
    said += ["no patch of another agent was given (other=DIR)"] if "other agent" not in controls else []
    return "The optimised patch: " + "; ".join(said) + "."


def markdown(conditions: Mapping[str, dict]) -> str:
    """The conditions as a table."""
    percent = lambda value: "" if value is None else f"{value:.1f} %"
    interval = lambda value: f"{value['mean']:.3g} [{value['low']:.3g}, {value['high']:.3g}]" if value else ""
    rows = [
        "| patch | real return | real drop | optimised minus this [95 %] | imagined drop, clean belief | patched belief |",
        "|---|---|---|---|---|---|",
    ]
    for name, line in conditions.items():
        imagined = line.get("imagined")
        cells = [
            name,
            f"{line['mean']:.4g} ± {line['std']:.3g}",
            percent(line.get("percent_drop")),
            interval(line.get("optimized_minus_this")),
            *(percent(imagined[belief]["percent_drop"]) if imagined else "" for belief in BELIEFS),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)
