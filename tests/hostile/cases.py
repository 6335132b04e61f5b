"""What a case of the corpus is made of: an image, its outcome, and what umoci makes of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tests.hostile.images import Image, Layer
from tests.hostile.trees import ROOT, Node, Tree

Doors = tuple[Literal["registry", "layout"], ...]
BOTH: Doors = ("registry", "layout")


@dataclass(frozen=True)
class Refused:
    text: str | re.Pattern[str]

    def __eq__(self, other: object) -> bool:
        """A text equals a pattern that it matches as a whole."""
        if not isinstance(other, Refused):
            return NotImplemented
        texts = (self.text, other.text)
        match texts:
            case (re.Pattern() as pattern, str() as text) | (
                str() as text,
                re.Pattern() as pattern,
            ):
                return pattern.fullmatch(text) is not None
        return texts[0] == texts[1]


@dataclass(frozen=True)
class Accepted:
    tree: Tree


@dataclass(frozen=True)
class Umoci:
    """What `skopeo copy` and `umoci unpack` make of the image where it is not the same, and why."""

    does: Literal["the same", "accepts", "refuses", "another tree", "not asked"]
    because: str = ""


SAME = Umoci("the same")


@dataclass(frozen=True, kw_only=True)
class Case:
    image: Image
    outcome: Refused | Accepted
    umoci: Umoci = SAME
    doors: Doors = BOTH
    is_about_the_kernel: bool = False


def accepts(because: str) -> Umoci:
    return Umoci("accepts", because)


def refuses(because: str) -> Umoci:
    return Umoci("refuses", because)


def unlike(because: str) -> Umoci:
    return Umoci("another tree", because)


def worded(text: str) -> re.Pattern[str]:
    """`...` stands for digests, numbers and the words of a library."""
    return re.compile(re.escape(text).replace(re.escape("..."), ".*"))


def not_asked(because: str) -> Umoci:
    return Umoci("not asked", because)


def refused(text: str, image: Image, umoci: Umoci = SAME, doors: Doors = BOTH) -> Case:
    return Case(image=image, outcome=Refused(worded(text)), umoci=umoci, doors=doors)


def bad_layer(text: str, *layers: Layer, umoci: Umoci = SAME) -> Case:
    """The topmost layer is refused."""
    return refused(f"layer sha256:...: {text}", Image(layers=layers), umoci)


def good(
    tree: Mapping[bytes, Node],
    *layers: Layer,
    umoci: Umoci = SAME,
    is_about_the_kernel: bool = False,
) -> Case:
    """The merged root is `tree`; if that does not say otherwise, its root is an ordinary one."""
    return Case(
        image=Image(layers=layers),
        outcome=Accepted({**ROOT, **tree}),
        umoci=umoci,
        is_about_the_kernel=is_about_the_kernel,
    )


def numbered(cases: Mapping[str, Mapping[str, Case]]) -> dict[str, Case]:
    """Of all subjects, by `subject: name`."""
    return {
        f"{subject}: {name}": case for subject, of in cases.items() for name, case in of.items()
    }
