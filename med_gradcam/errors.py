"""Which errors can a user meet, and which exit code does each carry?

MedGradcamError                  exit 1
|-- UsageError (ValueError)      exit 2   the call is off
|   |-- UnknownNameError         exit 2   unknown layer, class, method, format: names the near ones
|   `-- OutputExistsError        exit 2
|-- InputError (ValueError)      exit 3   a file or an array is off
|   |-- GeometryError            exit 3
|   |-- ImageError               exit 3
|   `-- ModelError               exit 3
|       `-- UntrustedModelError  exit 3
|-- CannotExplainError (ValueError)  exit 4   no honest map exists; the reason is in `reason`
|-- ResourceError (OSError)      exit 5   no room, memory or permission
`-- Cancelled (Exception)        exit 130

A message is one sentence or two: what was expected, what came, which file, what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MedGradcamError(Exception):
    """Everything this package raises on purpose."""

    exit_code = 1


class UsageError(MedGradcamError, ValueError):
    """The call asks for something that does not exist or does not go together."""

    exit_code = 2


class UnknownNameError(UsageError):
    """A name is not among those known; the message lists the near ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        self.kind, self.name, self.known = kind, name, tuple(known)
        near = difflib.get_close_matches(name, self.known, n=6, cutoff=0.3) or list(self.known)[:8]
        more = f" of {len(self.known)}" if len(near) < len(self.known) else ""
        listed = ", ".join(near) if near else "none"
        super().__init__(
            f"expected a known {kind}, got {name!r}; near ones{more}: {listed}."
            + (f" {hint}" if hint else "")
        )


class OutputExistsError(UsageError):
    """The output folder is already there and --overwrite was not given."""


class InputError(MedGradcamError, ValueError):
    """A file or an array that was handed in cannot be used."""

    exit_code = 3


class GeometryError(InputError):
    """An affine or a shape that describes no grid in space."""


class ImageError(InputError):
    """An image that cannot be read or does not fit the network."""


class ModelError(InputError):
    """A model file that cannot be read or does not fit its own description."""


class UntrustedModelError(ModelError):
    """The model would run code of its own and the user has not agreed to that."""


class CannotExplainError(MedGradcamError, ValueError):
    """No honest map can be made here; `reason` is a short key, the message says why."""

    exit_code = 4

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(message)


class ResourceError(MedGradcamError, OSError):
    """No room, no memory or no permission."""

    exit_code = 5


class Cancelled(MedGradcamError):  # noqa: N818 - it is no error, it is what the user asked for
    """The user stopped the work; the model has been restored."""

    exit_code = 130
