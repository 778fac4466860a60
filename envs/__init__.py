"""The benchmarks: TorchRL environments and transforms, and Gymnasium environments that need no torch.

What `exports.py` lists is imported when the first of it is asked for. To import this package registers the Gymnasium
environments `DMCSubtle/...` and `DMCDistracting/...`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .base.gl import check_chosen_gl
from .control.environments import register_environments

if TYPE_CHECKING:
    from .exports import *  # noqa: F403

check_chosen_gl()  # before TorchRL, which imports MuJoCo
register_environments()


def __getattr__(name: str) -> Any:
    if name == "__all__" or not name.startswith("__"):  # others are asked for by tools, which need no TorchRL
        exports = importlib.import_module(".exports", __name__)
        if name in ("__all__", *exports.__all__):
            return getattr(exports, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *importlib.import_module(".exports", __name__).__all__]
