"""Draws runs together: the seeds of one experiment, those in one folder, become a mean and a band from worst to best.

python examples/curves.py runs/quickstart/seed* --out quickstart.png
python examples/curves.py runs/quickstart/seed* runs/mine/seed* --key train/return --title "CartPole"
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from r2dreamer.examples.figures.curves import draw_runs, folder_names, known_keys, picture, read_curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="directories with a metrics.jsonl")
    parser.add_argument("--out", type=picture, default=Path("curves.png"))
    parser.add_argument("--title", default="")
    parser.add_argument("--key", default="eval/return", help="entry of metrics.jsonl to draw")
    arguments = parser.parse_intermixed_args()
    runs = list({run.resolve(): run for run in arguments.runs}.values())  # a run that is named twice is one seed
    missing = [str(run) for run in runs if not (run / "metrics.jsonl").is_file()]
    if missing:
        sys.exit(
            f"No metrics.jsonl in {', '.join(missing)}: give the directories of runs, such as runs/quickstart/seed0."
        )
    if not any(len(read_curve(run, arguments.key)[0]) for run in runs):
        sys.exit(f"Nothing drawn: no run holds {arguments.key}. {known_keys(runs[0], arguments.key)}")
    drawn = draw_runs(runs, folder_names(runs), arguments.out, title=arguments.title, key=arguments.key)
    if drawn is None:
        sys.exit(1)  # the reason is said
    print(drawn)


if __name__ == "__main__":
    main()
