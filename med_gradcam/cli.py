"""med-gradcam: the command line. Results go to stdout, progress and errors to stderr."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from med_gradcam import __version__, commands, found_commands, whole_command
from med_gradcam.errors import MedGradcamError, UsageError
from med_gradcam.models import _trust as levels

_EPILOG = "exit codes: 0 done, 2 usage, 3 bad file, 4 cannot be explained, 5 no room, 130 stopped"


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="med-gradcam",
        description="Evidence for and against a 3D network's finding, in the right place.",
        epilog=_EPILOG,
    )
    top.add_argument("--version", action="version", version=f"med-gradcam {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the result as JSON")
    common.add_argument("--debug", action="store_true", help="show a traceback with an error")
    common.add_argument("--quiet", action="store_true", help="no progress")
    commands_ = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _explain(commands_.add_parser("explain", parents=[common], help="explain one scan"))
    _whole(commands_.add_parser("whole", parents=[common], help="a whole volume by windows"))
    _concepts(
        commands_.add_parser("concepts", parents=[common], help="the channels that speak most")
    )
    _regions(commands_.add_parser("regions", parents=[common], help="what each region is worth"))
    _doctor(
        commands_.add_parser(
            "doctor", parents=[common], help="which traps of other tools bite on this network"
        )
    )
    for name, what in (
        ("components", "the predicted parts of a segmentation network, each a target"),
        ("boxes", "the boxes of a detector, each a target"),
    ):
        _found(commands_.add_parser(name, parents=[common], help=what))
    demo = commands_.add_parser("demo", parents=[common], help="the whole path on sample scans")
    demo.add_argument("--open", action="store_true", help="open the result in napari")
    _output(demo, required=False)
    _runtime(demo)
    _inspect(commands_.add_parser("inspect", parents=[common], help="what a model or a scan is"))
    for name, what in (
        ("methods", "the methods, one line each"),
        ("models", "the model formats, one line each"),
        ("formats", "the file formats, one line each"),
    ):
        commands_.add_parser(name, parents=[common], help=what)
    return top


def _inspect(sub: argparse.ArgumentParser) -> None:
    add = sub.add_argument
    add("model", metavar="MODEL", help="model folder or file, module:function, or a scan")
    add("image", metavar="IMAGE", nargs="*", help="a scan to try it on; one file per channel")
    add("--at", help="centre of the patch, as in explain")
    _reading(sub)
    add("--all", action="store_true", help="all layers, not only the candidates")
    _trust(sub)


def _explain(sub: argparse.ArgumentParser) -> None:
    _question(sub)
    add = sub.add_argument
    add("--formats", help="nifti,png,dicom (default: nifti,png; and dicom for a DICOM scan)")
    add("--identified", action="store_true", help="allow the patient's identity in the outputs")
    add("--mirrors", metavar="AXES", help="mean over mirror images along 0,1,2, as nnU-Net does")
    add("--each-time", action="store_true", help="each volume of a 4D file, or each IMAGE, alone")
    _output(sub, required=True)
    _runtime(sub)


def _whole(sub: argparse.ArgumentParser) -> None:
    _question(sub, patch=False)
    whole_command.add_options(sub)
    add = sub.add_argument
    add("--formats", help="as in explain")
    add("--identified", action="store_true", help="allow the patient's identity in the outputs")
    _output(sub, required=True)
    _runtime(sub)


def _concepts(sub: argparse.ArgumentParser) -> None:
    _question(sub)
    sub.add_argument("--most", type=int, default=8, help="channels to list (default: 8)")
    _runtime(sub)


def _regions(sub: argparse.ArgumentParser) -> None:
    _question(sub)
    sub.add_argument("--labels", help="a label map on the scan's grid (default: the map's parts)")
    sub.add_argument("--most", type=int, default=10, help="parts to take, 1 to 10 (default: 10)")
    _runtime(sub)


def _found(sub: argparse.ArgumentParser) -> None:
    add = sub.add_argument
    add("image", metavar="IMAGE", nargs="+", help="NIfTI file or DICOM folder; one per channel")
    add("--model", required=True, help="model folder or file, or module:function")
    add("--target", default="auto", metavar="CLASS", help="a class (default: all, no background)")
    add("--model-output", default="", metavar="PATH", help="as in explain")
    add("--at", help="centre of the patch, as in explain")
    add("--most", type=int, default=20, help="rows to list (default: 20)")
    _trust(sub)
    _reading(sub)
    _runtime(sub)


def _reading(sub: argparse.ArgumentParser) -> None:
    """How the files become a scan."""
    sub.add_argument("--time", type=int, metavar="N", help="the volume of a 4D file, from 1")
    sub.add_argument(
        "--resample-to-first",
        dest="resample",
        action="store_true",
        help="bring the channels to the grid of the first (linear)",
    )
    sub.add_argument(
        "--accept-drift",
        action="store_true",
        help="go on where the model's own preprocessing would give another input",
    )


def _doctor(sub: argparse.ArgumentParser) -> None:
    add = sub.add_argument
    add("model", metavar="MODEL", help="model folder or file, or module:function")
    add("image", metavar="IMAGE", nargs="+", help="the scan to try it on; one file per channel")
    add("--target", default="auto", metavar="CLASS", help="as in explain")
    add("--model-output", default="", metavar="PATH", help="as in explain")
    add("--layer", default="auto", help="the layer of your maps (default: the coarsest one)")
    add("--reference", default="auto", help="as in explain")
    add("--at", help="centre of the patch, as in explain")
    _trust(sub)
    _reading(sub)
    _runtime(sub)


def _question(sub: argparse.ArgumentParser, *, patch: bool = True) -> None:
    """What is asked of which model for which scan; `patch`: of one patch of it."""
    add = sub.add_argument
    add("image", metavar="IMAGE", nargs="+", help="NIfTI file or DICOM folder; one per channel")
    add("--model", required=True, help="model folder or file, or module:function")
    add(
        "--target",
        default="auto",
        metavar="CLASS",
        help="auto, a label, an index, #3, A-vs-B or A-vs-0.6*B; for a segmentation network also "
        "with a place: CLASS@component:N, CLASS@mask:FILE, CLASS@voxel:ras:X,Y,Z, "
        "CLASS@box:ras:X,Y,Z:SIZE_MM; for a detector box:N",
    )
    add(
        "--model-output",
        default="",
        metavar="PATH",
        help="where in the network's output the scores are: logits, [0], a[1].b (default: its "
        "first tensor)",
    )
    add(
        "--layer",
        default="auto",
        help="auto, fused, a module path, an alias, @input, a cut a+b+c; of explain also all: one "
        "map per depth",
    )
    add("--method", default="secant", help="see `med-gradcam methods`")
    add(
        "--reference", default="auto", help="auto, tissue, zero, value:X or a scan on the same grid"
    )
    if patch:
        add("--at", help="centre of the patch: ras:X,Y,Z, lps:X,Y,Z (mm) or ijk:I,J,K (voxels)")
        add("--fast", action="store_true", help="all before the layers fused: for many runs")
    add("--precise", action="store_true", help="sums within 1 %% instead of 5 %%")
    add("--quick", action="store_true", help="coarsest layer, untested, no second run: 2 forwards")
    add("--alignment", default="nominal", choices=["nominal", "measured"], help="of the cells")
    _reading(sub)
    _trust(sub)


def _trust(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--trust",
        action="append",
        default=[],
        type=_level,
        metavar="LEVEL",
        help="data (default: nothing of the model runs), archive (TorchScript), code, code:SHA256 "
        "(this very file) or network (send the scan to a server)",
    )


def _level(text: str) -> str:
    try:
        levels.agreed(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _output(sub: argparse.ArgumentParser, *, required: bool) -> None:
    sub.add_argument("-o", "--output", metavar="DIR", required=required, help="output folder")
    sub.add_argument("--overwrite", action="store_true", help="replace the output folder whole")


def _runtime(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    sub.add_argument("--threads", type=int, help="threads for torch")
    sub.add_argument("--seed", type=int, default=0, help="for all that is drawn at random")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Errors are one sentence on stderr."""
    args = parser().parse_args(argv)
    try:
        with terminated_is_stopped():
            if whole_command.takes(args):
                return whole_command.run(args)
            if found_commands.takes(args):
                return found_commands.run(args)
            return commands.run(args)
    except BrokenPipeError:
        return 0
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - a sentence, no traceback
        if args.debug:
            traceback.print_exception(error)
        code, message = _said(error)
    print(f"med-gradcam: {message}", file=sys.stderr)  # noqa: T201
    return code


@contextmanager
def terminated_is_stopped() -> Iterator[None]:
    """A SIGTERM stops the work as Ctrl-C does, so that no half folder stays behind."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _said(error: BaseException) -> tuple[int, str]:
    """The exit code and the sentence for an error."""
    if isinstance(error, MedGradcamError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "stopped; nothing was written."
    if isinstance(error, MemoryError):
        return 5, "expected more memory than this machine has free; try a deeper --layer."
    return 1, (
        f"an internal error ({type(error).__name__}: {error}); "
        f"run again with --debug and report what it shows."
    )


if __name__ == "__main__":
    raise SystemExit(main())
