"""Which maps belonged to another scan, another class, or to nobody?"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import torch

import med_gradcam as mg
from benchmarks.peers.adapters import peer
from benchmarks.traps import ours
from benchmarks.traps.cases import Case, array, correlation, noise, reference, resnet, unet
from benchmarks.traps.rows import Row, trap, tried


def _batch(case: Case, count: int = 3) -> torch.Tensor:
    return noise(*case.x.shape[2:], batch=count, channels=case.x.shape[1], seed=4)


def _takes(case: Case, x: torch.Tensor) -> Any:
    def call() -> str:
        mg.explain(x, case.net, target=1, layer=case.layer)
        return "takes it"

    return ours.said(call)


@trap("S5", "In a batch every scan gets the sum of all classes that were asked for", "MONAI",
      own_network=True)  # fmt: skip
def classes_mixed(case: Case | None = None) -> list[Row]:
    """Three scans, one class each: every map beside that of its own scan and class."""
    case = case or resnet()
    x, asked = _batch(case), [0, 1, 2]
    right = [reference(Case(case.net, case.layer, x[i : i + 1], c)) for i, c in enumerate(asked)]
    own = case.own()
    cam = peer("monai.visualize").GradCAM(nn_module=own.net, target_layers=own.layer)
    theirs = tried(lambda: cam.compute_map(x, class_idx=asked)[:, 0])
    rows = []
    for i, c in enumerate(asked):
        one = Case(case.net, case.layer, x[i : i + 1], c)
        found = theirs if isinstance(theirs, str) else correlation(
            theirs[i], np.maximum(right[i], 0)
        )  # fmt: skip
        rows.append(
            Row("S5", "MONAI", f"scan {i + 1}, class {c}: correlation with its own map", 1.0,
                found, ours.agreement(one))
        )  # fmt: skip
    return rows


@trap("S18", "A class that does not exist raises nothing", "grad-cam", own_network=True)
def swallowed(case: Case | None = None) -> list[Row]:
    """What happens when a class beyond the last one is asked for."""
    case = case or resnet(32, classes=2)

    def theirs() -> str:
        own = case.own()
        target = peer("pytorch_grad_cam.utils.model_targets").ClassifierOutputTarget(999)
        found: Any = None
        module = own.net.get_submodule(own.layer)
        with (
            contextlib.redirect_stdout(io.StringIO()),
            peer("pytorch_grad_cam").GradCAM(model=own.net, target_layers=[module]) as cam,
        ):
            found = cam(input_tensor=own.x, targets=[target])
        return "nothing raised, no map" if found is None else "a map"

    absent = Case(case.net, case.layer, case.x, 999)
    mine = ours.said(lambda: str(ours.explained(absent).layer))
    right = "refuses: UnknownNameError"
    return [
        Row(
            "S18", "grad-cam", "asked for class 999 in its `with` block", right, tried(theirs), mine
        )
    ]


@trap("S19", "Fewer targets than scans: the rest of the batch gets empty maps", "grad-cam",
      own_network=True)  # fmt: skip
def truncated(case: Case | None = None) -> list[Row]:
    """A batch of three with one target: the maximum of each map."""
    case = case or resnet(32)
    x = _batch(case)

    def theirs() -> str:
        own = case.own()
        target = peer("pytorch_grad_cam.utils.model_targets").ClassifierOutputTarget(1)
        module = own.net.get_submodule(own.layer)
        cam = peer("pytorch_grad_cam").GradCAM(model=own.net, target_layers=[module])
        found = cam(input_tensor=x, targets=[target])
        return ", ".join(f"{float(one.max()):.0f}" for one in found)

    return [
        Row("S19", "grad-cam", "three scans, one target: the maximum of each map", "refuses",
            tried(theirs), _takes(case, x))
    ]  # fmt: skip


def segmentation_target() -> Any:
    """nnunetv2-cam's own target class, cut out of its file: the package itself needs nnunetv2."""
    import ast
    from importlib.metadata import files

    found = next(f for f in files("nnunetv2-cam") or () if f.name == "cam_core.py")
    tree = ast.parse(found.read_text(encoding="utf-8"))
    wanted: list[ast.stmt] = [
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == "SemanticSegmentationTarget"
    ]
    space: dict[str, Any] = {"np": np, "torch": torch}
    exec(compile(ast.Module(wanted, []), "cam_core.py", "exec"), space)  # noqa: S102 - its own code
    return space["SemanticSegmentationTarget"]


@trap("S26", "The class that was asked for is never used", "nnunetv2-cam")
def class_ignored() -> list[Row]:
    """Its target class in grad-cam: two classes with one mask, and each beside the right map."""
    case = unet()
    with torch.no_grad():
        mask = (case.net(case.x).argmax(1)[0] == 1).numpy().astype(np.float32)
    box = torch.from_numpy(mask)

    def theirs(category: int) -> Any:
        own = case.own()
        module = own.net.get_submodule(own.layer)
        cam = peer("pytorch_grad_cam").GradCAM(model=own.net, target_layers=[module])
        target = segmentation_target()(category, mask)
        cam(input_tensor=own.x, targets=[target])
        weights = cam.activations_and_grads
        a, g = weights.activations[0], weights.gradients[0]
        return array((g.mean(dim=(2, 3, 4), keepdim=True) * a).sum(1)[0])

    def score(category: int) -> Any:
        return lambda out: (out[:, category] * box).flatten(1).sum(1)

    def agreement(category: int, right: Any) -> float:
        return correlation(theirs(category), right)

    rows = [
        Row("S26", "nnunetv2-cam", "correlation of the maps of classes 0 and 2, same mask",
            correlation(reference(case, score(0)), reference(case, score(2))),
            tried(lambda: correlation(theirs(0), theirs(2))),
            correlation(ours.native(case, score(0)), ours.native(case, score(2))))
    ]  # fmt: skip
    for category in (0, 2):
        right = reference(case, score(category))
        rows.append(
            Row("S26", "nnunetv2-cam", f"class {category}: correlation with the right map", 1.0,
                tried(agreement, category, right),
                correlation(ours.native(case, score(category)), right))
        )  # fmt: skip
    return rows
