"""Is a program explained by the scores that it writes, and is nothing of it left behind?"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import med_gradcam as mg
from med_gradcam.errors import MedGradcamError, ModelError, UntrustedModelError
from med_gradcam.loading import load_model
from med_gradcam.models import _blackbox_command
from tests.engine import nets
from tests.engine.boxes import far, scores

SIZE = 8
NAME = "Doe^Jane"
HEAD = "import json, os, sys, time\nfrom pathlib import Path\nimport numpy as np\n"
NPY = """
volumes = np.load(sys.argv[1])
assert volumes.dtype == np.float32 and volumes.ndim == 5
with open('sizes', 'a') as f:
    f.write(f'{len(volumes)} ')
mean = volumes.mean(axis=(1, 2, 3, 4), dtype=np.float64)
np.save(sys.argv[2], mean[:, None] * np.array([1.0, -2.0]))
"""


@pytest.fixture(autouse=True)
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of its own for temporary files, which is empty again after each test."""
    own = tmp_path / "temporary"
    own.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(own))
    yield own
    assert list(own.iterdir()) == []


def _spec(folder: Path, body: str, *, command: Any = None, **more: Any) -> str:
    """A folder with a program in Python and a spec that names it."""
    folder.mkdir(exist_ok=True)
    (folder / "run.py").write_text(HEAD + body, encoding="utf-8")
    spec = {
        "format": "med-gradcam-model/1",
        "name": "a program",
        "command": command or [sys.executable, "run.py", "{input}", "{output}"],
        "input": {"modality": "CT", "axes": "RAS"},
        "labels": ["no", "yes"],
        "link": "softmax",
        **more,
    }
    (folder / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
    return str(folder)


def _ask(path: str, count: int = 1) -> Any:
    """The program's scores of some volumes, without an explanation around them."""
    run: Any = load_model(path, ["code"]).net
    return run.asked.__dict__["predict"](np.ones((count, 1, SIZE, SIZE, SIZE), dtype=np.float32))


def test_the_map_is_that_of_the_function_inside(tmp_path: Path) -> None:
    model = load_model(_spec(tmp_path / "m", NPY, batch=60), ["code"])
    volume = mg.Volume(nets.scan(SIZE), nets.volume(SIZE).grid, "CT", "HU")
    e = mg.explain(volume, model, target="no")
    known = mg.explain(volume, mg.BlackBox(scores(1.0, -2.0)), target=0)
    assert far(e, known) < 1e-6
    sizes = [int(n) for n in (tmp_path / "m" / "sizes").read_text().split()]
    assert max(sizes) == 60, "it runs once per batch, in the folder of its spec"
    assert len(sizes) < 10


@pytest.mark.parametrize("form", ["[[1, -2]]", "[[1.0, -2.0]]"])
def test_scores_as_json(tmp_path: Path, form: str) -> None:
    command = [sys.executable, "run.py", "--out={output.json}", "{input.npy}"]
    body = f"Path(sys.argv[1][6:]).write_text('{form}')"
    assert _ask(_spec(tmp_path / "m", body, command=command)).tolist() == [[1.0, -2.0]]


def test_a_volume_as_nifti_has_the_network_s_axes_and_no_name(tmp_path: Path) -> None:
    body = """
import nibabel as nib
image = nib.load(sys.argv[1])
zooms = [float(z) for z in image.header.get_zooms()]
json.dump([image.shape, nib.aff2axcodes(image.affine), zooms], open('saw', 'w'))
assert b'DOE' not in Path(sys.argv[1]).read_bytes().upper()
np.save(sys.argv[2], np.array([[float(np.asarray(image.dataobj).mean()), 0.0]]))
"""
    takes = {"modality": "CT", "axes": "SPL", "spacing_mm": [3, 2, 1]}
    command = [sys.executable, "run.py", "{input.nii.gz}", "{output.npy}"]
    path = _spec(tmp_path / "m", body, command=command, input=takes)
    assert _ask(path).tolist() == [[1.0, 0.0]]
    saw = json.loads((tmp_path / "m" / "saw").read_text())
    assert saw == [[8, 8, 8], ["S", "P", "L"], [3.0, 2.0, 1.0]]
    with pytest.raises(ModelError, match=r"batch of 1 for \{input.nii.gz\}, got 4"):
        load_model(_spec(tmp_path / "m", body, command=command, batch=4), ["code"])


def test_nothing_runs_without_the_user_s_word(tmp_path: Path) -> None:
    path = _spec(tmp_path / "m", "Path('ran').touch()")
    for trust in ([], ["network"], ["archive"], ["code:" + "0" * 64]):
        with pytest.raises(UntrustedModelError, match=r"'spec.json' names a program"):
            load_model(path, trust)
    assert not (tmp_path / "m" / "ran").exists()
    with pytest.raises(ModelError, match="without any"):
        _ask(path)
    assert (tmp_path / "m" / "ran").exists(), "the probe itself works"


def test_no_shell_reads_the_words(tmp_path: Path) -> None:
    words = ["{input}", "{output}", "; touch owned", "$(touch owned)", "`touch owned`", "*"]
    body = "json.dump(sys.argv[3:], open('saw', 'w')); np.save(sys.argv[2], np.zeros((1, 2)))"
    _ask(_spec(tmp_path / "m", body, command=[sys.executable, "run.py", *words]))
    assert json.loads((tmp_path / "m" / "saw").read_text()) == words[2:]
    assert not (tmp_path / "m" / "owned").exists()


def test_a_program_that_says_very_much_is_heard_to_its_end(tmp_path: Path) -> None:
    body = """
for n in range(20000):
    print('x' * 100, file=sys.stderr)
    print('x' * 100)
np.save(sys.argv[2], np.zeros((1, 2)))
"""
    assert _ask(_spec(tmp_path / "m", body)).shape == (1, 2)


BAD: dict[str, tuple[str, str]] = {
    "fails": (
        "sys.exit('no weights\\x1b[31m here')",
        r"to succeed, it ended with 1, saying 'no weights \[31m here'\.",
    ),
    "killed": ("os.kill(os.getpid(), 9)", r"it ended with -9\."),
    "nothing": ("print('done', file=sys.stderr)", r"it ended without any, saying 'done'\."),
    "a folder": ("os.mkdir(sys.argv[2])", r"without any"),
    "junk": ("Path(sys.argv[2]).write_bytes(b'junk')", r"scores as .npy .* a file that is none"),
    "empty": ("Path(sys.argv[2]).touch()", r"a file that is none"),
    "pickle": (
        "np.save(sys.argv[2], np.array([{'a': 1}], dtype=object), allow_pickle=True)",
        r"a file that is none: Object arrays cannot be loaded",
    ),
    "too much": (
        "np.save(sys.argv[2], np.zeros(100_000))",
        r"expected at most 100000 bytes of scores",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_program_that_fails_is_one_sentence(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_blackbox_command, "MOST_BYTES", 100_000)
    body, words = BAD[name]
    with pytest.raises(ModelError, match=words) as caught:
        _ask(_spec(tmp_path / "m", body))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("text", ["{", '{"a": 1}', '[["a"]]', "[[1], [1, 2]]", "[" * 100_000])
def test_json_that_is_no_scores(tmp_path: Path, text: str) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "text").write_text(text)
    command = [sys.executable, "run.py", "{input}", "{output.json}"]
    body = "Path(sys.argv[2]).write_text(Path('text').read_text())"
    with pytest.raises(ModelError, match="scores as lists of numbers"):
        _ask(_spec(tmp_path / "m", body, command=command))


@pytest.mark.parametrize("value", ["np.full((1, 2), np.nan)", "np.zeros((3, 2))"])
def test_scores_are_looked_at_as_any_others(tmp_path: Path, value: str) -> None:
    model = load_model(_spec(tmp_path / "m", f"np.save(sys.argv[2], {value})"), ["code"])
    volume = mg.Volume(nets.scan(SIZE), nets.volume(SIZE).grid, "CT", "HU")
    with pytest.raises(ModelError, match=r"'a program'.* got (NaN|shape \(3, 2\))"):
        mg.explain(volume, model)


@pytest.mark.parametrize("deaf", [False, True])
def test_a_program_that_hangs_is_ended_with_its_children(
    tmp_path: Path, deaf: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_blackbox_command, "GRACE_S", 0.3)
    body = f"""
import signal, subprocess
if {deaf}:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(['sh', '-c', 'trap "" TERM; sleep 60; sleep 60'])
Path('pids').write_text(f'{{os.getpid()}} {{child.pid}}')
print('waiting', file=sys.stderr, flush=True)
time.sleep(60)
"""
    start = time.monotonic()
    with pytest.raises(ModelError, match=r"to end within 1.5 s, it did not, saying 'waiting'"):
        _ask(_spec(tmp_path / "m", body, timeout_s=1.5))
    assert time.monotonic() - start < 10
    for pid in map(int, (tmp_path / "m" / "pids").read_text().split()):
        assert _gone(pid)


def test_a_program_is_ended_when_the_work_is_stopped(tmp_path: Path) -> None:
    body = "Path('pids').write_text(str(os.getpid())); time.sleep(60)"
    path = _spec(tmp_path / "m", body)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 1.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            _ask(path)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert _gone(int((tmp_path / "m" / "pids").read_text()))


def _gone(pid: int) -> bool:
    for _ in range(50):
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            return True
        if state == "Z":  # ended; whoever adopted it has not looked yet
            return True
        time.sleep(0.05)
    return False


SPECS: list[tuple[dict[str, Any], str]] = [
    ({"command": "run {input} {output}"}, "a command as a list of texts"),
    ({"command": [sys.executable, 3]}, "a command as a list of texts"),
    ({"command": [sys.executable, "{input}"]}, r"expected \{input\} and \{output\} in the command"),
    ({"command": [sys.executable, "{input.json}", "{output}"]}, r"expected \{input.npy\} or"),
    ({"command": ["no-such-program", "{input}", "{output}"]}, "the program 'no-such-program'"),
    ({"timeout_s": "long"}, "timeout_s in seconds"),
]


@pytest.mark.parametrize(("more", "words"), SPECS)
def test_a_spec_that_is_off(tmp_path: Path, more: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        load_model(_spec(tmp_path / "m", NPY, **more), ["code"])
    assert "m/spec.json" in str(caught.value)
    assert issubclass(ModelError, MedGradcamError)
