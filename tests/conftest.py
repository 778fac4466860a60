import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import support  # noqa: E402, F401 - sets how threads wait, before torch is imported
