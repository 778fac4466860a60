"""Trains a grid of variants, tasks and seeds, then draws them together: mean and 95 % bootstrap interval over the seeds.

Two or three seeds have no better interval than their range, which misses the true mean one time in four or more.

    python examples/compare.py env=dmc_vision env.task=walker_walk experiment=ablation_baseline,ablation_half_batch seed=0,1,2
    python examples/compare.py "experiment=[quickstart,ablation_baseline],[quickstart,ablation_dreamer]" "seed=range(0,5)"
    python examples/compare.py --plan examples/plans/dmc_vectors.yaml             trains what the plan lacks
    python examples/compare.py --plan examples/plans/dmc_vectors.yaml --status    says what is done, runs, is missing
    python examples/compare.py experiment=ablation_baseline seed=0,1,2 hydra/launcher=submitit_slurm hydra.launcher.gpus_per_node=1

Commas and range(...) are hydra's multirun syntax. Each run is a process of its own, in the directory that train.py would
give it; runs with one `name` are the seeds of one variant, the first one is what the others are compared to. The same
command goes on where it was stopped, and only draws what has finished. It leaves a run alone that another process trains,
so several commands can share a plan. With hydra/launcher=... every run is a job of a cluster (extra `cluster`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from r2dreamer.examples.cli.children import Children
from r2dreamer.examples.cli.messages import cannot_compose
from r2dreamer.examples.cli.output import guarded_output
from r2dreamer.examples.cli.script import search_here
from r2dreamer.examples.figures.bootstrap import bootstrap_band, bootstrap_difference
from r2dreamer.examples.figures.curves import RETURNS, draw_runs, known_keys, picture, read_curve
from r2dreamer.examples.figures.plans import read_plan, report, summary
from r2dreamer.examples.training.cluster import make_executor, split, submit
from r2dreamer.examples.training.files import make_output
from r2dreamer.examples.training.grid import Run, plan

TRAIN = Path(__file__).parent / "train.py"


def train(run: Run, children: Children, quiet: bool) -> bool | None:
    """Whether the training succeeded, None where another process trains; what it prints is in the directory if several do."""
    if run.finished or run.running:  # since the plan was read
        return run.finished or None
    command = [sys.executable, str(TRAIN), *run.overrides]
    if not quiet:
        return children.run(command) == 0 and run.finished
    run.logdir.mkdir(parents=True, exist_ok=True)
    with open(run.logdir / "output.txt", "a") as output:
        return children.run([*command, "progress=false"], stdout=output, stderr=subprocess.STDOUT) == 0 and run.finished


def summarise(runs: Sequence[Run], key: str, planned: Sequence[Run] | None = None) -> dict[str, dict]:
    """By name: every seed's last value of `key`, their mean, its interval, and the difference to the task's first variant.

    One seed has no interval; the first variant, or any where that one has no values, no difference.

    Args:
        planned: All runs, of which the first is looked for, where `runs` lacks some.
    """
    first = {run.task: run.name for run in reversed(planned or runs)}
    finals: dict[str, list[float]] = {}
    for run in runs:
        _, values = read_curve(run.logdir, key)
        if len(values):
            finals.setdefault(run.name, []).append(float(values[-1]))
    summary = {}
    for run in runs:
        if run.name in summary or run.name not in finals:
            continue
        values = np.array(finals[run.name])
        numbers = {"final": finals[run.name], "mean": values.mean()}
        if len(values) > 1:
            numbers["interval"] = [float(end[0]) for end in bootstrap_band(values[:, None])]
        if run.name != first[run.task] and (reference := finals.get(first[run.task])):
            numbers["difference_from"] = first[run.task]
            numbers["difference"] = values.mean() - np.mean(reference)
            if len(values) > 1 and len(reference) > 1:
                numbers["difference_interval"] = bootstrap_difference(values, np.array(reference))
        summary[run.name] = numbers
    return summary


def table(runs: Sequence[Run], summary: dict[str, dict]) -> str:
    """Markdown: a row for each variant, a column for each task, in every cell the mean and each seed's last value."""
    tasks, names = list(dict.fromkeys(run.task for run in runs)), {(run.variant, run.task): run.name for run in runs}
    rows = [["", *tasks], ["---"] * (1 + len(tasks))]
    for variant in dict.fromkeys(run.variant for run in runs):
        cells = [summary.get(names.get((variant, task))) for task in tasks]
        rows.append([variant, *(_cell(cell) if cell else "" for cell in cells)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cell(numbers: dict) -> str:
    return f"**{numbers['mean']:.4g}** ({', '.join(f'{value:.4g}' for value in numbers['final'])})"


def check_output(out: Path) -> None:
    """Finds out before anything is trained whether the picture and its two companions can be written."""
    there = [path for path in (out.with_suffix(".json"), out.with_suffix(".md")) if path.exists()]
    if len(there) == 1:  # a comparison leaves both
        raise ValueError(
            f"--out {out} would overwrite {there[0]}, which no comparison has left alone: remove it, or give another name."
        )
    for path in (out, out.with_suffix(".json"), out.with_suffix(".md")):
        if path.is_dir():
            raise ValueError(f"--out {out} would write {path}, which is a directory: give another name.")
    make_output(out.parent, "--out FILE")


def main() -> None:
    with guarded_output(lambda: None):  # nobody has to read what is printed
        compare()


def compare() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="as for train.py; a=1,2 and a=range(0,3) vary")
    parser.add_argument(
        "--plan", type=Path, help="a YAML file of rows to train; the overrides are added to each of them"
    )
    parser.add_argument("--status", action="store_true", help="say how each run stands, and train nothing")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument(
        "--out",
        type=picture,
        default=Path("comparison.png"),
        help="the picture; beside it numbers as .json, a table as .md",
    )
    parser.add_argument("--key", default="eval/return", help="entry of metrics.jsonl to compare")
    arguments = parser.parse_intermixed_args()
    if arguments.jobs < 1:
        parser.error(f"--jobs {arguments.jobs} must be at least 1")
    if not (arguments.plan or arguments.overrides):
        parser.error("give overrides as for train.py, or --plan FILE")
    try:
        search_here()
        overrides, where = split(arguments.overrides)
        if where and arguments.jobs > 1:
            raise ValueError(
                f"--jobs {arguments.jobs} is of this machine; limit jobs with hydra.launcher.array_parallelism."
            )
        runs = read_plan(arguments.plan, overrides) if arguments.plan else plan(overrides)
        if not arguments.status:
            check_output(arguments.out)
        executor = make_executor(where) if where and not arguments.status else None
    except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:
        sys.exit(cannot_compose(error, "config"))

    if arguments.plan or arguments.status:
        print(report(runs, arguments.key) + summary(runs), flush=True)
    if arguments.status:
        begun = [run.logdir for run in runs if (run.logdir / "metrics.jsonl").exists()]
        missing = begun and not any(len(read_curve(each, arguments.key)[0]) for each in begun)
        if missing and arguments.key not in RETURNS:  # which come later
            sys.exit(f"No run has {arguments.key}. {known_keys(begun[0], arguments.key)}")
        sys.exit()
    waiting = [run for run in runs if not run.finished]
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} of them finished before.")

    def end(run: Run, finished: bool | None) -> bool | None:
        if arguments.plan and finished:
            print(summary(runs), flush=True)
        return finished

    if executor is None:
        with Children() as children, ThreadPoolExecutor(arguments.jobs) as pool:
            step = lambda run: end(run, train(run, children, quiet=arguments.jobs > 1))
            done = dict(zip(waiting, pool.map(step, waiting), strict=True))
        if children.stopped:
            sys.exit("Stopped; the same command goes on.")
    else:
        try:
            done = {run: end(run, finished) for run, finished in submit(waiting, TRAIN, executor)} if waiting else {}
        except KeyboardInterrupt:
            sys.exit("\nThe jobs go on. --status says how they stand; the same command draws what has finished.")
    failed = [run for run in waiting if not (run.finished if done[run] is None else done[run])]
    complete = [run for run in runs if run not in failed]

    means = summarise(complete, arguments.key, runs)
    for name, numbers in means.items():
        low, high = numbers.get("interval", (None, None))
        spread = "of one seed" if low is None else f"[{low:.4g}, {high:.4g}] over {len(numbers['final'])} seeds"
        print(f"{name}: {numbers['mean']:.4g} {spread}")
    if means:
        arguments.out.with_suffix(".json").write_text(json.dumps(means, indent=1))
        arguments.out.with_suffix(".md").write_text(table(complete, means) + "\n" + report(runs, arguments.key))
        columns = ("logdir", "variant", "task")
        directories, variants, tasks = ([getattr(run, column) for run in complete] for column in columns)
        published = {run.task: (run.suite, run.task.removeprefix(f"{run.suite}-")) for run in complete}
        how = {"key": arguments.key, "bootstrap": True, "panels": tasks, "published": published}
        if drawn := draw_runs(directories, variants, arguments.out, **how):
            print(drawn)
    for run in failed:
        state = "Another process trains" if run.running else "Not finished"
        print(f"{state}: {' '.join(run.overrides)} (in {run.logdir})", file=sys.stderr)
    if complete and not means:
        sys.exit(f"No finished run has {arguments.key}. {known_keys(complete[0].logdir, arguments.key)}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
