"""Every public class and function of dreamer/ and losses/ says what each of its arguments is, in Google's form."""

import inspect
import re

import pytest

from r2dreamer import dreamer, losses

PASSED_ON = {"self", "options", "renamed"}  # of another class, or refused with a message
PUBLIC = {
    f"{wing.__name__}.{name}": getattr(wing, name)
    for wing in (dreamer, losses)
    for name in wing.__all__
    if getattr(wing, name).__module__.startswith("r2dreamer.")
}


def arguments(made):
    """Of a function, or of a class's own constructor."""
    if inspect.isclass(made):
        made = vars(made).get("__init__")
    names = inspect.signature(made).parameters if made else ()
    return [name for name in names if name not in PASSED_ON]


def described(docstring):
    """The names below "Args:"."""
    found = set()
    for section in re.findall(r"^Args:\n((?: {4}.*\n)+)", f"{docstring}\n", re.MULTILINE):
        found |= set(re.findall(r"^ {4}\*{0,2}(\w+):", section, re.MULTILINE))
    return found


@pytest.mark.parametrize("name", PUBLIC)
def test_every_argument_of_a_public_name_is_described(name):
    docstring = inspect.getdoc(PUBLIC[name])
    assert docstring, "has no docstring"
    missing = set(arguments(PUBLIC[name])) - described(docstring)
    assert not missing, f"{sorted(missing)} is not described"


def test_an_argument_that_is_not_described_is_found():
    def shift(images, pad=3):
        """Moves images.

        Args:
            images: [B, C, H, W].
        """

    assert set(arguments(shift)) - described(inspect.getdoc(shift)) == {"pad"}
