"""How far does the user trust a model file: as data, as an archive of operations, or as code?

Each level holds those before it. `code:SHA256` and `archive:SHA256` trust one very file only.
`network` is another matter: that scans may be sent to a server; code does not hold it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection

from med_gradcam.errors import UntrustedModelError, UsageError

LEVELS = ("data", "archive", "code")
NETWORK = "network"
_WORD = re.compile(r"(data|archive|code)(?::([0-9a-fA-F]{64}))?")


def agreed(trust: str | Collection[str]) -> frozenset[str]:
    """The levels that some words of trust hold, with the pins among them.

    Raises:
        UsageError: a word is no level.
    """
    found = {"data"}
    for word in [trust] if isinstance(trust, str) else trust:
        if word == NETWORK:
            found.add(NETWORK)
            continue
        match = _WORD.fullmatch(str(word))
        if match is None or (match[1] == "data" and match[2]):
            raise UsageError(
                f"expected a trust of data, archive, code, code:SHA256 (the 64 digits of a file's "
                f"SHA-256) or network, got {word!r}."
            )
        found.update(LEVELS[: LEVELS.index(match[1]) + 1])
        found.update({f"{match[1]}:{match[2].lower()}"} if match[2] else ())
    return frozenset(found)


def digest(raw: bytes) -> str:
    """SHA-256 of a file's bytes."""
    return hashlib.sha256(raw).hexdigest()


def need(level: str, trust: str | Collection[str], sha256: str, what: str) -> None:
    """Make sure that the user agreed to a level for the file with this digest.

    `what`: the file and what it could do, the beginning of the sentence.

    Raises:
        UntrustedModelError: the user did not, or pinned another file.
    """
    words = agreed(trust)
    pins = {word.partition(":")[2] for word in words if ":" in word}
    if level not in words:
        pin = f", or --trust {level}:{sha256} for this file (its SHA-256) and no other"
        raise UntrustedModelError(
            f"{what}; if you trust it, say --trust {level}{pin if sha256 else ''}."
        )
    if pins and sha256 not in pins:
        raise UntrustedModelError(
            f"{what}, and it is not the file that --trust pins: expected the SHA-256 "
            f"{' or '.join(sorted(pins))}, got {sha256 or 'none'}."
        )
