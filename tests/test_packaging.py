"""The installed package: its files in every kind of install, what type checkers find of it, its versions and theirs."""

import importlib.machinery
import importlib.metadata
import pathlib
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import r2dreamer
from r2dreamer.examples.cli import machine

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "r2dreamer"  # what an editable install puts on the path
NOT_INSTALLED = ("examples/results", "examples/guides")  # pictures, tables and guides belong to the repository
INSTALLED_AFTER_ALL = "examples/results/agents"  # small trained agents, to be watched after `pip install`


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The names of the files below r2dreamer/ in the sdist, and in the wheel that is built from the sdist alone."""
    folder = tmp_path_factory.mktemp("built")
    ignored = shutil.ignore_patterns(".*", "build", "dist", "runs", "outputs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "copy", symlinks=True, ignore=ignored)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "out"), str(folder / "copy")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = (folder / "out").glob("*.tar.gz"), (folder / "out").glob("*.whl")
    with tarfile.open(sdist) as archive:
        files = [member.name for member in archive if member.isfile()]
    parts = [name.partition("/src/r2dreamer/") for name in files]
    return {
        "sdist": {inside for _, found, inside in parts if found},
        "wheel": {
            name.removeprefix("r2dreamer/") for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name
        },
    }


@pytest.mark.parametrize("kind", ["sdist", "wheel"])
def test_every_kind_of_install_holds_the_same_files(built, kind):
    """A folder without an __init__.py, or a file that setup.cfg does not name, works in an editable install alone."""
    wings = [folder for folder in PACKAGE.iterdir() if folder.is_symlink()]
    files = {
        f"{wing.name}/{file.relative_to(wing.resolve())}"
        for wing in wings
        for file in wing.resolve().rglob("*")
        if file.is_file()
    }
    files |= {file.name for file in PACKAGE.iterdir() if file.is_file()}
    wanted = {
        name
        for name in files
        if "__pycache__" not in name and (not name.startswith(NOT_INSTALLED) or name.startswith(INSTALLED_AFTER_ALL))
    }
    assert built[kind] == wanted


@pytest.mark.parametrize("wing", ["dreamer", "losses", "envs", "examples"])
def test_a_type_checker_finds_the_installed_package(wing):
    """pyright and mypy follow directories of the path, but no import hook, and need a py.typed."""
    spec = importlib.machinery.PathFinder.find_spec("r2dreamer", sys.path)
    assert spec is not None and spec.origin is not None, "an editable install put an import hook in place of a folder"
    folder = pathlib.Path(spec.origin).parent
    assert (folder / "py.typed").is_file() and (folder / wing / "py.typed").is_file()
    assert (folder / wing / "__init__.py").samefile(ROOT / wing / "__init__.py")


def test_the_version_is_that_of_the_distribution():
    assert f"\nversion = {r2dreamer.__version__}\n" in (ROOT / "setup.cfg").read_text()


MENDS = {"mujoco": ">=3.8.1,<3.9", "dm-control": "==1.0.41", "metaworld": "==3.0.0"}  # of setup.cfg


@pytest.mark.parametrize(
    ("versions", "says"),
    [
        ({"mujoco": "4.0.0", "dm-control": "1.0.50"}, "mujoco 4.0.0 and dm-control 1.0.50 do not work together"),
        ({"mujoco": "4.0.0"}, "mujoco 4.0.0 and dm-control 1.0.41 do not work together"),
        ({"mujoco": "3.17.0"}, "mujoco 3.17.0 and metaworld 3.0.0 do not work together"),
        ({"mujoco": "3.3.0", "metaworld": "3.1.1"}, "metaworld 3.1.1 and dm-control 1.0.41 do not work together"),
    ],
)
def test_the_doctor_knows_which_releases_around_mujoco_clash(monkeypatch, versions, says):
    """Alone, none of the three can be mended: one command names them all, and suits what this package asks for."""
    installed = {"mujoco": "3.8.1", "dm-control": "1.0.41", "metaworld": "3.0.0", **versions}
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: installed.get(name) or real(name))
    problems = [each for each in machine.packages()[1] if says in each]
    assert len(problems) == 1
    command = shlex.split(problems[0].partition("pip install ")[2])
    asked = {canonicalize_name(each.name): each.specifier for each in map(Requirement, command)}
    assert asked == {name: SpecifierSet(specifier) for name, specifier in MENDS.items()}


def test_the_doctor_finds_nothing_wrong_with_what_it_tells_to_install(monkeypatch):
    installed = {"mujoco": "3.8.1", "dm-control": "1.0.41", "metaworld": "3.0.0"}
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: installed.get(name) or real(name))
    assert not [each for each in machine.packages()[1] if any(name in each for name in installed)]
