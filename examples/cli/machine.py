"""What this machine has: packages and their conflicts, processor, memory, CUDA, OpenGL."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from r2dreamer.envs.base.gl import choose_gl

DISTRIBUTION = "torchrl-r2dreamer"
# Each of these is made for one series of MuJoCo. pip upgrades one of them alone, so the command that mends names all.
MUJOCO_PACKAGES = ("mujoco", "dm-control", "metaworld")
CLASHES = {
    ("mujoco>=4", "dm-control<=1.0.50"): "dm_control reads fields of a model that MuJoCo 4 does not have",
    ("mujoco>=3.9,<4", "dm-control<=1.0.41"): "dm_control reads fields of a model that MuJoCo 3.9 does not have",
    ("mujoco<3.8", "dm-control>=1.0.41"): "dm_control reads fields of a model that this MuJoCo does not have yet",
    ("mujoco>=3.17", "metaworld<3.1"): "Meta-World 3.0 writes its welds in a form that MuJoCo 3.17 refuses",
    ("metaworld>=3.1", "dm-control>=1.0.41"): "metaworld 3.1 wants MuJoCo 3.3.0, and dm_control a newer one",
}
# Prints what renders and how fast; in a process of its own, because a broken driver ends or hangs the one that asks it.
ASK_OPENGL = """
import statistics, time
import mujoco
model = mujoco.MjModel.from_xml_string(
    "<mujoco><worldbody><light pos='0 0 3'/><geom type='plane' size='2 2 .1'/>"
    "<geom type='capsule' size='.1 .4' pos='0 0 .5'/></worldbody></mujoco>"
)
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer = mujoco.Renderer(model, 64, 64)
times = []
for _ in range(25):
    start = time.perf_counter()
    renderer.update_scene(data)
    renderer.render()
    times.append(time.perf_counter() - start)
from OpenGL import GL
print(GL.glGetString(GL.GL_RENDERER).decode(), "/", GL.glGetString(GL.GL_VERSION).decode(), end=", ")
print(f"{1000 * statistics.median(times):.1f} ms for a 64x64 image of two shapes")
"""


def packages() -> tuple[list[str], list[str]]:
    """A line for each package this one uses, and the problems among them; an extra nobody installed is none."""
    users: dict[str, list[str]] = {}
    for text in importlib.metadata.requires(DISTRIBUTION) or []:
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", text)
        users.setdefault(text.split(";")[0].strip(), []).append(extra[1] if extra else "")
    lines, wrong, wanted, installed = [], {}, {}, {}
    for text, extras in users.items():
        requirement, named = Requirement(text), ", ".join(sorted({*extras} - {"all", "test"}))
        if "test" in extras and not named:
            continue  # of interest to who works on this package only
        name = canonicalize_name(requirement.name)  # a build may write dm_control or dm-control
        version = installed_version(name)
        lines.append(f"{name} {version or 'is not installed'}" + (f" (extra {named})" if named else ""))
        wanted[name] = text
        if version is not None:
            installed[name] = version
            if version not in requirement.specifier:
                wrong[name] = f"{name} {version} does not fit"
        elif "" in extras:
            wrong[name] = f"{name} is missing"

    def remedy(name: str) -> str:
        together = [each for each in MUJOCO_PACKAGES if each in installed] if name in MUJOCO_PACKAGES else [name]
        return "pip install " + " ".join(f"'{wanted[each]}'" for each in together)

    problems = []
    for pair, why in CLASHES.items():
        clashing = [Requirement(text) for text in pair]
        if all(each.name in installed and installed[each.name] in each.specifier for each in clashing):
            said = " and ".join(f"{each.name} {installed[each.name]}" for each in clashing)
            problems.append(f"{said} do not work together: {why}. Mend: {remedy(clashing[0].name)}")
            for each in clashing:
                wrong.pop(each.name, None)
    return lines, problems + [f"{what}: {remedy(name)}" for name, what in wrong.items()]


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> list[str]:
    capabilities = torch.cpu.get_capabilities()
    fast = [name for name in ("amx_bf16", "avx512_bf16") if capabilities.get(name, False)]
    lines = [
        f"Python {platform.python_version()}, PyTorch {torch.__version__}, {torch.get_num_threads()} threads on "
        f"{len(os.sched_getaffinity(0))} cores; bfloat16 " + (f"is fast ({fast[0]})" if fast else "is emulated")
    ]
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        lines.append(
            f"cuda:{index} {torch.cuda.get_device_name(index)}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free; "
            f"bfloat16 {'is native' if torch.cuda.is_bf16_supported(including_emulation=False) else 'is emulated'}"
        )
    if not torch.cuda.is_available():
        lines.append("no CUDA device that PyTorch can use: training runs on the CPU")
    return lines


def opengl(timeout: float) -> tuple[str, str | None]:
    """What renders MuJoCo's images, and what is wrong with it, or None."""
    choose_gl()  # as every environment that renders does
    chosen = f"MUJOCO_GL={os.environ.get('MUJOCO_GL', 'unset')}"
    try:
        asked = subprocess.run(
            [sys.executable, "-c", ASK_OPENGL], capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return f"{chosen}: hangs", (
            f"the OpenGL driver did not answer within {timeout:g} seconds ({chosen}). Try MUJOCO_GL=osmesa "
            "(apt-get install libosmesa6), fewer parallel environments (env.num_envs), or another driver."
        )
    if asked.returncode:
        last = (asked.stderr.strip().splitlines() or [f"exit status {asked.returncode}"])[-1]
        return f"{chosen}: {last}", (
            f"MuJoCo cannot render ({last}; {chosen}). Set MUJOCO_GL=egl, or osmesa without a GPU driver; on Debian "
            "and Ubuntu: apt-get install libegl1 libgl1 libgles2 (libosmesa6 for osmesa)."
        )
    renderer = asked.stdout.strip()
    software = any(name in renderer.lower() for name in ("llvmpipe", "softpipe", "swrast", "osmesa"))
    return f"{chosen}: {renderer}, " + ("in software, slow" if software else "on the GPU"), None


def private_bytes(pids: Sequence[int]) -> int:
    """The memory that these processes share with nobody: what would be free without them."""
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Private_"))
