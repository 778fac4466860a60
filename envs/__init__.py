"""The benchmarks: TorchRL environments and transforms.

What `exports.py` lists is imported when the first of it is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .base.gl import check_chosen_gl

if TYPE_CHECKING:
    from .exports import *  # noqa: F403

check_chosen_gl()  # before TorchRL, which imports MuJoCo


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    exports = importlib.import_module(".exports", __name__)
    if name not in exports.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(exports, name)


def __dir__() -> list[str]:
    return [*globals(), *importlib.import_module(".exports", __name__).__all__]
