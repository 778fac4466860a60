"""Draws runs together: the seeds of one experiment, those in one folder, become a mean and a band from worst to best.

python examples/curves.py runs/quickstart/seed* --out quickstart.png
python examples/curves.py runs/quickstart/seed* runs/mine/seed* --key train/return --title "CartPole"
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from r2dreamer.examples.figures.curves import draw_runs, known_keys, picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="directories with a metrics.jsonl")
    parser.add_argument("--out", type=picture, default=Path("curves.png"))
    parser.add_argument("--title", default="")
    parser.add_argument("--key", default="eval/return", help="entry of metrics.jsonl to draw")
    arguments = parser.parse_args()
    missing = [str(run) for run in arguments.runs if not (run / "metrics.jsonl").is_file()]
    if missing:
        sys.exit(
            f"No metrics.jsonl in {', '.join(missing)}: give the directories of runs, such as runs/quickstart/seed0."
        )
    labels = [run.resolve().parent.name for run in arguments.runs]
    drawn = draw_runs(arguments.runs, labels, arguments.out, title=arguments.title, key=arguments.key)
    if drawn is None:
        hint = known_keys(arguments.runs[0], arguments.key)
        sys.exit(f"Nothing drawn: no run holds {arguments.key}, or the extra 'plot' is missing. {hint}")
    print(drawn)


if __name__ == "__main__":
    main()
