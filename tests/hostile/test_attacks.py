"""Is every hostile model file refused, with nothing run, where a careless loader falls for it?"""

from __future__ import annotations

import io
import pickle
import stat
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import med_gradcam as mg
from med_gradcam.errors import ModelError, UntrustedModelError
from tests.hostile import attacks
from tests.tiny import save_model

pytestmark = pytest.mark.filterwarnings("ignore")
TRUSTS = [(), "data", "archive"]


def careless_pickle(path: Path) -> None:
    torch.load(path, weights_only=False)  # noqa: TID251 - the fault is the point


def careless_script(path: Path) -> None:
    torch.jit.load(path)(torch.rand(1, 1, 6, 6, 6))  # noqa: TID251


def careless_export(path: Path) -> None:
    torch.export.load(path)


MAKES: dict[str, tuple[Callable[[Path], Path], Callable[[Path], None]]] = {
    "a pickle in .pt": (lambda f: attacks.pickled(f / "net.pt", f), careless_pickle),
    "a bare pickle in .pth": (lambda f: attacks.legacy(f / "net.pth", f), careless_pickle),
    "a pickle called .ts": (lambda f: attacks.pickled(f / "net.ts", f), careless_pickle),
    "sample inputs of .pt2": (
        lambda f: attacks.program_with_inputs(f / "net.pt2", f),
        careless_export,
    ),
    "an expression in .pt2": (
        lambda f: attacks.program_with_expression(f / "net.pt2", f),
        careless_export,
    ),
    "a forward that writes": (
        lambda f: attacks.script(attacks.Writes(str(f / attacks.MARKER)), f / "net.ts"),
        careless_script,
    ),
    "a __setstate__ that writes": (
        lambda f: attacks.script(attacks.WritesAtLoading(str(f / attacks.MARKER)), f / "net.ts"),
        careless_script,
    ),
}


@pytest.mark.parametrize("name", MAKES)
def test_the_attack_works_on_a_careless_loader(name: str, tmp_path: Path) -> None:
    make, careless = MAKES[name]
    path = make(tmp_path)
    (tmp_path / attacks.MARKER).unlink(missing_ok=True)  # making some of them runs them
    with suppress(Exception):  # most attacks leave no network behind
        careless(path)
    assert attacks.attacked(tmp_path)


@pytest.mark.parametrize("trust", TRUSTS)
@pytest.mark.parametrize("name", MAKES)
def test_it_is_refused_and_nothing_runs(name: str, trust: str, tmp_path: Path) -> None:
    path = MAKES[name][0](tmp_path)
    (tmp_path / attacks.MARKER).unlink(missing_ok=True)
    with pytest.raises(ModelError) as caught:
        mg.load_model(path, trust=trust)
    assert not attacks.attacked(tmp_path)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("name", ["a forward that writes", "a __setstate__ that writes"])
def test_no_trust_lets_a_writer_in(name: str, tmp_path: Path) -> None:
    path = MAKES[name][0](tmp_path)
    (tmp_path / attacks.MARKER).unlink(missing_ok=True)
    with pytest.raises(ModelError, match=r"'save', which touches files|__setstate__"):
        mg.load_model(path, trust="code")
    assert not attacks.attacked(tmp_path)


def test_a_pickle_is_refused_with_what_it_names(tmp_path: Path) -> None:
    path = attacks.pickled(tmp_path / "net.pt", tmp_path)
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    with pytest.raises(UntrustedModelError, match=r"it names posix\.system.*safetensors") as caught:
        mg.load_model(path)
    assert all(one in str(caught.value) for one in unsafe)


def test_a_network_that_writes_is_refused_in_memory_too(tmp_path: Path) -> None:
    net = torch.jit.script(attacks.Writes(str(tmp_path / attacks.MARKER)))
    with pytest.raises(ModelError, match="touches no files, it holds 'aten::save'"):
        mg.explain(torch.rand(6, 6, 6), net, target=0)
    assert not attacks.attacked(tmp_path)


# -------------------------------------------------------------------- what the text can hide


def honest(tmp_path: Path) -> Path:
    return attacks.script(attacks.Small().eval(), tmp_path / "honest.ts")


SOURCES = {
    "x.save('m')": "'save', which touches files",
    "torch.save(x, 'm')": "'save', which touches files",
    "torch.from_file('m')": "'from_file', which touches files",
    "getattr(x, 'save')('m')": "getattr",
    "getattr(torch, 'sa' 've')(x, 'm')": "getattr",
    "ops.image.read_file('m')": "operations of 'image', which are not torch's own",
    "ops.aten.save(x, 'm')": "'save', which touches files",
    "__torch__.torch.classes.evil.Box(x)": "classes of an extension",
}


@pytest.mark.parametrize("source", SOURCES)
def test_operations_are_found_in_the_text(source: str, tmp_path: Path) -> None:
    def add(parts: dict[str, bytes]) -> None:
        name = next(n for n in parts if n.endswith("attacks.py"))
        parts[name] = parts[name].replace(
            b"-> Tensor:\n", f"-> Tensor:\n    _9 = {source}\n".encode(), 1
        )
        assert source.encode() in parts[name]

    path = attacks.changed(tmp_path / "net.ts", honest(tmp_path), add)
    with pytest.raises(ModelError, match=f"{SOURCES[source]}.*it was not loaded"):
        mg.load_model(path, trust="archive")


@pytest.mark.parametrize(
    "line", ["a = ops\n    b = a.image.read_file('m')", "f = torch\n    f.q()"]
)
def test_other_names_are_found(line: str, tmp_path: Path) -> None:
    def add(parts: dict[str, bytes]) -> None:
        name = next(n for n in parts if n.endswith("attacks.py"))
        parts[name] = parts[name].replace(b"-> Tensor:\n", f"-> Tensor:\n    {line}\n".encode(), 1)

    path = attacks.changed(tmp_path / "net.ts", honest(tmp_path), add)
    with pytest.raises(ModelError, match="under another name"):
        mg.load_model(path, trust="archive")


@pytest.mark.parametrize("text", [b"\xff\xfe", b"def f(:", b"(" * 3000])
def test_programs_that_cannot_be_read(text: bytes, tmp_path: Path) -> None:
    def add(parts: dict[str, bytes]) -> None:
        parts[next(n for n in parts if n.endswith("attacks.py"))] = text

    path = attacks.changed(tmp_path / "net.ts", honest(tmp_path), add)
    with pytest.raises(ModelError, match="cannot be read"):
        mg.load_model(path, trust="archive")


def test_a_command_in_the_pickle_of_torchscript(tmp_path: Path) -> None:
    def add(parts: dict[str, bytes]) -> None:
        name = next(n for n in parts if n.endswith("/data.pkl"))
        parts[name] = pickle.dumps(attacks.Runs(attacks.touch(tmp_path)), 2)

    path = attacks.changed(tmp_path / "net.ts", honest(tmp_path), add)
    with pytest.raises(ModelError, match=r"posix\.system in its data\.pkl"):
        mg.load_model(path, trust="code")
    assert not attacks.attacked(tmp_path)


def test_the_check_of_graphs_is_a_second_wall(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the text check blind, the operations of the loaded graphs would still be seen."""
    monkeypatch.setattr("med_gradcam.models._script_code.faults", lambda *_: [])
    marker = tmp_path / attacks.MARKER
    path = attacks.script(attacks.Writes(str(marker)), tmp_path / "net.ts")
    with pytest.raises(ModelError, match="the operation 'aten::save'"):
        mg.load_model(path, trust="archive")
    assert not marker.exists()


# ---------------------------------------------------------------------------------- archives


def linked(parts: zipfile.ZipFile) -> None:
    info = zipfile.ZipInfo("archive/data/link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    parts.writestr(info, "/etc/passwd")


def slipped(name: str) -> Callable[[zipfile.ZipFile], None]:
    return lambda parts: parts.writestr(name, "x")


def bomb(parts: zipfile.ZipFile) -> None:
    parts.writestr("archive/data/99", b"\0" * (1 << 28), zipfile.ZIP_DEFLATED)


STRUCTURES: dict[str, tuple[Callable[[zipfile.ZipFile], None], str]] = {
    "zip-slip": (slipped("archive/../../evil.py"), "which leads out of it"),
    "an absolute name": (slipped("/etc/cron.d/evil"), "which leads out of it"),
    "a drive": (slipped("C:/evil"), "which leads out of it"),
    "a link": (linked, "'archive/data/link', a link"),
    "a name twice": (slipped("honest/data.pkl"), "twice"),
    "a bomb": (bomb, "256 MB packed into 1 MB"),
}


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("kind", ["ts", "pt", "pt2"])
def test_archives_that_no_torch_wrote(name: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"honest.{kind}"
    if kind == "ts":
        attacks.script(attacks.Small().eval(), path)
    elif kind == "pt2":
        attacks.program(path)
    else:
        torch.save(attacks.Small().state_dict(), path)
    add, says = STRUCTURES[name]
    with zipfile.ZipFile(path, "a") as parts:
        if name == "a name twice":
            parts.writestr(parts.namelist()[0], b"x")
        else:
            add(parts)
    with pytest.raises(ModelError, match=says):
        mg.load_model(path, trust="code")
    assert not (tmp_path.parent / "evil.py").exists()


@pytest.mark.parametrize("cut", [10, 200, 1000])
def test_archives_cut_short(cut: int, tmp_path: Path) -> None:
    path = honest(tmp_path)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(ModelError):
        mg.load_model(path, trust="archive")


# ------------------------------------------------------------------------- declared sizes


def declares(path: Path, source: bytes, old: bytes, new: bytes) -> Path:
    parts = attacks.members(source)
    name = next(n for n in parts if n.endswith("/data.pkl"))
    assert old in parts[name]
    parts[name] = parts[name].replace(old, new)
    return attacks.rezip(path, parts)


TEN_GB = 2_500_000_000  # numbers of four bytes
LONG = b"\x8a\x05" + TEN_GB.to_bytes(5, "little")


def test_a_tensor_of_ten_gigabytes_in_safetensors(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "net")
    attacks.huge_header(folder / "weights.safetensors")
    with pytest.raises(ModelError, match="expected safetensors"):
        mg.load_model(folder)


@pytest.mark.parametrize("what", ["its storage", "its shape"])
@pytest.mark.parametrize("kind", ["pt", "ts"])
def test_a_tensor_of_ten_gigabytes_in_an_archive(kind: str, what: str, tmp_path: Path) -> None:
    """54 weights are there; the pickle declares 2,500,000,000 of them."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "pt":
            torch.save(attacks.Small().state_dict(), buffer)
        else:
            torch.jit.save(torch.jit.script(attacks.Small().eval()), buffer)
    # BININT1 54 is the storage's length, BININT1 2 and 1 begin the shape (2, 1, 3, 3, 3).
    old, new = (b"K6t", LONG + b"t") if what == "its storage" else (b"(K\x02K\x01K\x03", b"")
    new = new or b"(" + LONG + b"K\x01K\x03"
    says = "declares 10,000,000,000" if what == "its storage" else "to lie within its bytes"
    if kind == "ts":
        path = declares(tmp_path / "net.ts", buffer.getvalue(), old, new)
    else:
        path = declares(save_model(tmp_path / "net") / "weights.pt", buffer.getvalue(), old, new)
        (path.parent / "weights.safetensors").unlink()
        path = path.parent
    with pytest.raises(ModelError, match=says):
        mg.load_model(path, trust="archive")
