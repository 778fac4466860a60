"""The installed package: what tools that read files find of it, and its version."""

import configparser
import importlib.machinery
import pathlib
import sys

import pytest
from setuptools import find_packages

import r2dreamer

ROOT = pathlib.Path(__file__).parent.parent
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")


@pytest.mark.parametrize("wing", ["dreamer", "losses", "envs", "examples"])
def test_a_type_checker_finds_the_installed_package(wing):
    """pyright and mypy follow directories of the path, but no import hook, and need a py.typed."""
    spec = importlib.machinery.PathFinder.find_spec("r2dreamer", sys.path)
    assert spec is not None and spec.origin is not None, "an editable install put an import hook in place of a folder"
    folder = pathlib.Path(spec.origin).parent
    assert (folder / "py.typed").is_file() and (folder / wing / "py.typed").is_file()
    assert (folder / wing / "__init__.py").samefile(ROOT / wing / "__init__.py")


def test_every_folder_of_modules_is_a_package_of_the_wheel():
    """A folder without an __init__.py works in an editable install and is missing from the wheel."""
    wings = [folder for folder in (ROOT / "src" / "r2dreamer").iterdir() if folder.is_dir() and folder.is_symlink()]
    modules = [(wing, file.parent.relative_to(wing)) for wing in wings for file in wing.rglob("*.py")]
    found = {"r2dreamer"} | {".".join(("r2dreamer", wing.name, *below.parts)) for wing, below in modules}
    assert found == set(find_packages(str(ROOT / "src")))


def test_the_version_is_that_of_the_distribution():
    assert r2dreamer.__version__ == SETUP["metadata"]["version"]
