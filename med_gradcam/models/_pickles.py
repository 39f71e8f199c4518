"""What would a pickle build, and do its tensors fit the bytes that come with them?

The pickle is walked through with inert stand-ins: nothing that it names is imported or called.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

from med_gradcam.errors import ModelError

# Of numbers and tensors alone; nothing here runs code of the file's.
TENSORS = frozenset(
    """
    collections.OrderedDict torch._utils._rebuild_tensor_v2 torch._utils._rebuild_parameter
    torch._utils._rebuild_tensor torch.Size torch.device torch.nn.parameter.Parameter
    torch.storage.UntypedStorage torch.storage.TypedStorage
    """.split()
)
NUMPY = frozenset(
    """
    numpy.core.multiarray.scalar numpy._core.multiarray.scalar numpy.dtype _codecs.encode
    """.split()
)
_BYTES = {
    "DoubleStorage": 8,
    "FloatStorage": 4,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "LongStorage": 8,
    "IntStorage": 4,
    "ShortStorage": 2,
    "CharStorage": 1,
    "ByteStorage": 1,
    "BoolStorage": 1,
    "ComplexDoubleStorage": 16,
    "ComplexFloatStorage": 8,
    "UntypedStorage": 1,
}


class _Stand:
    """Stands for whatever a pickle would build: takes everything, does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Stand:
        del args, kwargs
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Take an item."""

    def extend(self, values: Any) -> None:
        """Take items."""


class _Walk(pickle._Unpickler):  # noqa: SLF001 - its memo cannot be made to grow
    def __init__(self, raw: bytes, sizes: Mapping[str, int], name: str) -> None:
        super().__init__(io.BytesIO(raw), encoding="utf-8")
        self.sizes, self.file = sizes, name
        self.globals: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}"
        self.globals.add(path)
        if name.startswith("_rebuild_tensor"):
            return self.tensor
        if name == "_rebuild_parameter":
            return lambda *args: args[0] if args else None
        if name == "OrderedDict" and module == "collections":
            return _Stand
        return type(name, (_Stand,), {})

    def persistent_load(self, pid: Any) -> Any:
        known = isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage"
        kind = getattr(pid[1], "__name__", "") if known else ""
        if kind not in _BYTES or not isinstance(pid[4], int) or not isinstance(pid[2], str):
            raise ModelError(f"expected tensors as torch stores them in {self.file!r}.")
        have, want = self.sizes.get(pid[2], -1), pid[4] * _BYTES[kind]
        if have != want:
            raise ModelError(
                f"expected the bytes of each tensor in {self.file!r}, one declares "
                f"{max(want, 0):,} and {max(have, 0):,} are there."
            )
        return pid[4]

    def tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> _Stand:
        """Stands for a tensor, if it lies within its storage."""
        del more
        numbers = [offset, *size, *stride]
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers)
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if whole else -1
        if not whole or (all(size) and not last < storage):
            raise ModelError(
                f"expected each tensor in {self.file!r} to lie within its bytes, got one of shape "
                f"{tuple(size)} in {storage} numbers."
            )
        return _Stand()


def globals_of(
    raw: bytes, sizes: Mapping[str, int], name: str, allowed: Callable[[str], bool]
) -> list[str]:
    """What a pickle names that is not allowed, sorted; its tensors are checked on the way.

    `sizes`: the bytes that come with it, by storage key.

    Raises:
        ModelError: a tensor declares more, or fewer, bytes than there are, or it is no pickle.
    """
    walk = _Walk(raw, sizes, name)
    try:
        walk.load()
    except ModelError:
        raise
    except Exception as error:  # a spoilt pickle raises whatever it likes
        strange = sorted(path for path in walk.globals if not allowed(path))
        if strange:
            return strange
        raise ModelError(
            f"expected a readable pickle in {name!r}, got {type(error).__name__}."
        ) from error
    return sorted(path for path in walk.globals if not allowed(path))


def is_data(path: str) -> bool:
    """Whether a name that a pickle holds is that of numbers or tensors alone."""
    if path in TENSORS or path in NUMPY:
        return True
    module, _, name = path.rpartition(".")
    return (module == "torch" and name in _BYTES) or (
        module == "numpy.dtypes" and name.endswith("DType") and name != "ObjectDType"
    )
