"""The command `r2dreamer`: `r2dreamer train env=...` is `python examples/train.py env=...` of an installed copy."""

from __future__ import annotations

import ast
import difflib
import runpy
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent


def commands() -> dict[str, str]:
    """Every script by its name, with the first line of its documentation."""
    files = sorted(file for file in EXAMPLES.glob("*.py") if file.stem != "__init__")
    return {file.stem: (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0] for file in files}


def usage(known: dict[str, str]) -> str:
    width = max(map(len, known))
    lines = [f"  {name:{width}}  {says}" for name, says in known.items()]
    return "\n".join(
        ["usage: r2dreamer COMMAND [key=value ...]", "", *lines, "", "r2dreamer COMMAND --help says more."]
    )


def main() -> None:
    known = commands()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(usage(known))
        return
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"Did you mean 'r2dreamer {near[0]}'?" if near else f"The commands are {', '.join(known)}."
        sys.exit(f"r2dreamer has no command {name!r}. {hint}")
    sys.argv = [f"r2dreamer {name}", *sys.argv[2:]]
    try:
        runpy.run_module(f"r2dreamer.examples.{name}", run_name="__main__")
    except KeyboardInterrupt:  # most of a short command is imports, which handle nothing
        print("Left at once.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
