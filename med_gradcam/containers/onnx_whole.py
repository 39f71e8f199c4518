"""How does an ONNX network run as a whole, where it cannot be opened, or to compare with it?

By onnxruntime, or slowly by onnx's own reference. There are predictions and no gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from med_gradcam.containers.onnx_build import inputs_of
from med_gradcam.containers.onnx_file import package
from med_gradcam.containers.onnx_graph import Input
from med_gradcam.containers.onnx_names import clean
from med_gradcam.containers.onnx_node import Numbers
from med_gradcam.errors import ModelError, ResourceError

Runner = Callable[[dict[str, Numbers]], Sequence[Any]]
AT_ONCE = 4  # inputs in a run, where the file leaves their number open


class Source:
    """The file's network as it is: tensors in, tensors out.

    Raises:
        ModelError: it does not run.
    """

    def __init__(self, proto: Any) -> None:
        self.proto = proto
        self.inputs = inputs_of(proto.graph)
        self.outputs = [str(value.name) for value in proto.graph.output]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run once with a runner of its own, which is let go."""
        return self.run(self.runner(), args, kwargs)

    def runner(self) -> Runner:
        """What runs it; onnxruntime if that is installed and has every operator in its dtype."""
        made = _onnxruntime(self.proto) if has_runtime() else None
        return made or _reference(self.proto)

    def run(self, runner: Runner, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What it puts out: one tensor, or a dict of all."""
        feeds = self._feeds(args, kwargs)
        try:
            made = runner(feeds)
        except MemoryError as error:
            raise ResourceError("not enough memory to run the ONNX network.") from error
        except Exception as error:  # whatever a runner raises
            why = " ".join(str(error).split())[:160].rstrip(".")
            raise ModelError(
                f"expected an ONNX network that runs on {self._shapes(feeds)}, got: {why}."
            ) from error
        where = next((a.device for a in args if isinstance(a, torch.Tensor)), torch.device("cpu"))
        out = {
            name: torch.from_numpy(np.array(value)).to(where)
            for name, value in zip(self.outputs, made, strict=True)
        }
        return next(iter(out.values())) if len(out) == 1 else out

    def _feeds(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Numbers]:
        given = dict(zip((one.name for one in self.inputs), args, strict=False))
        given.update(
            (one.name, kwargs.get(one.name, kwargs.get(clean(one.name))))
            for one in self.inputs
            if one.name not in given
        )
        return {one.name: _as_numbers(given[one.name], one) for one in self.inputs}

    def _shapes(self, feeds: Mapping[str, Numbers]) -> str:
        return ", ".join(f"{name} {tuple(value.shape)}" for name, value in feeds.items())


class OnnxWhole(torch.nn.Module):
    """An ONNX network that only runs as a whole; `gradient_free` says why.

    `batch`: how many inputs it takes at once.
    """

    def __init__(self, proto: Any, why: str) -> None:
        super().__init__()
        self.gradient_free = why
        self.source = Source(proto)
        shape = self.source.inputs[0].shape if self.source.inputs else None
        self.batch = 1 if shape and shape[0] == 1 else AT_ONCE
        self._runner: Runner | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network gives; where it takes one input at a time, for each in turn."""
        if self._runner is None:
            self._runner = self.source.runner()
        x = args[0] if args else None
        if self.batch > 1 or not isinstance(x, torch.Tensor) or len(x) == 1:
            return self.source.run(self._runner, args, kwargs)
        made = [self.source.run(self._runner, (one[None], *args[1:]), kwargs) for one in x]
        if isinstance(made[0], dict):
            return {name: torch.cat([one[name] for one in made]) for name in made[0]}
        return torch.cat(made)


def has_runtime() -> bool:
    """Whether onnxruntime is installed."""
    try:
        import onnxruntime  # noqa: F401 - only to see that it is there
    except ImportError:
        return False
    return True


def _onnxruntime(proto: Any) -> Runner | None:
    """None where it has no kernel for an operator in its dtype, such as a Conv in float64."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # whatever it raises
        if "NOT_IMPLEMENTED" in str(error):
            return None
        why = " ".join(str(error).split())[:160].rstrip(".")
        raise ModelError(
            f"expected an ONNX network that onnxruntime can run, got: {why}."
        ) from error
    run: Runner = lambda feeds: session.run(None, feeds)  # noqa: E731
    return run


def _reference(proto: Any) -> Runner:
    package()
    from onnx.reference import ReferenceEvaluator

    try:
        evaluator = ReferenceEvaluator(proto)
    except Exception as error:  # whatever it raises
        why = " ".join(str(error).split())[:160].rstrip(".")
        raise ModelError(f"expected an ONNX network that can be run, got: {why}.") from error
    run: Runner = lambda feeds: list(evaluator.run(None, feeds))  # noqa: E731
    return run


def _as_numbers(value: Any, one: Input) -> Numbers:
    if not isinstance(value, torch.Tensor):
        raise ModelError(f"expected the input {one.name!r} of the ONNX network, it was not given.")
    value = value.detach().cpu()
    found: Numbers = (value if one.dtype is None else value.to(one.dtype)).numpy()
    return found
