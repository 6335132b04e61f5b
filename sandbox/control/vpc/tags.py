"""Tags of the network's objects.

Amazon EC2 User Guide, "Tag restrictions": 50 a resource, keys of 1 to 128 characters and values of
up to 256, no key twice, and `aws:` is AWS's.
"""

from __future__ import annotations

from collections.abc import Iterable

from sandbox.control.vpc.refusals import Refusal
from sandbox.model.vpc import Tag

MOST = 50
KEY_MOST = 128
VALUE_MOST = 256


def checked_tags(tags: Iterable[Tag]) -> tuple[Tag, ...]:
    """By key; raises InvalidParameterValue and TagLimitExceeded."""
    found: dict[str, Tag] = {}
    for tag in tags:
        if not 1 <= len(tag.key) <= KEY_MOST or tag.key.lower().startswith("aws:"):
            why = f"Tag keys have 1 to {KEY_MOST} characters and do not begin with aws:."
            raise Refusal.VALUE.error(value=tag.key, parameter="Tag.Key", why=why)
        if len(tag.value) > VALUE_MOST or not _is_storable(tag.key + tag.value):
            why = f"Tag values have at most {VALUE_MOST} characters, of Unicode."
            raise Refusal.VALUE.error(value=tag.value, parameter="Tag.Value", why=why)
        if tag.key in found:
            why = "Duplicate tag keys."
            raise Refusal.VALUE.error(value=tag.key, parameter="Tag.Key", why=why)
        found[tag.key] = tag
        if len(found) > MOST:
            raise Refusal.TAG_LIMIT.error(limit=MOST)
    return tuple(found[key] for key in sorted(found))


def _is_storable(text: str) -> bool:
    """Half a surrogate pair is no text in UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
