"""Does a MONAI Bundle that wants to run code, or to fill the machine, get nowhere?

Every attack leaves a marker file if it succeeds; where there is a careless way to load the same
bundle, the test takes it as well and sees the marker.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from med_gradcam.errors import ModelError
from med_gradcam.loading import load_model
from med_gradcam.models._bundle_config import Config
from med_gradcam.models._bundle_files import Files
from med_gradcam.models._bundle_words import evaluated
from tests.models.bundles import CT, UNET, built, config, metadata, unet, write, zipped

pytest.importorskip("monai")


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """A file that must not come to be."""
    path = tmp_path / "marker"
    yield path
    assert not path.exists()


def bundle(tmp_path: Path, network: Any, transforms: Any = CT, **more: Any) -> Path:
    weights = built(UNET).state_dict()
    return write(tmp_path / "b", config(network, transforms, **more), metadata(["a", "b"]), weights)


def targets(marker: Path) -> dict[str, Any]:
    touch = f"touch {marker}"
    return {
        "expression": f"$__import__('os').system('{touch}')",
        "attribute": f"$().__class__.__base__.__subclasses__() and '{touch}'",
        "nested": {**UNET, "out_channels": f"$__import__('os').system('{touch}')"},
        "os": {"_target_": "os.system", "command": touch},
        "subprocess": {"_target_": "subprocess.check_output", "args": ["touch", str(marker)]},
        "through monai": {"_target_": "monai.networks.utils.torch.os.system", "command": touch},
        "through nets": {"_target_": "monai.networks.nets.resnet.torch.os.system",
                         "command": touch},
        "a module's import": {"_target_": "monai.networks.nets.densenet.load_state_dict_from_url",
                              "url": f"file://{marker}"},
        "a download": {"_target_": "monai.networks.nets.resnet.get_pretrained_resnet_medicalnet",
                       "resnet_depth": 10},
        "run": {"_target_": "monai.bundle.run"},
        "script": {"_target_": "scripts.net.Net"},
        "builtins": {"_target_": "builtins.exec", "source": f"open('{marker}', 'w')"},
        "an argument": {**UNET, "act": {"_target_": "os.system", "command": touch}},
        "torch.load": {"_target_": "torch.load", "f": str(marker)},
        "torch.hub": {"_target_": "torch.nn.modules.module.torch.hub.load", "repo_or_dir": "x"},
        "transchex": {"_target_": "Transchex", "path_or_repo_id": "x"},
        "call": f"$monai.networks.nets.resnet10(widen_factor=__import__('os').system('{touch}'))",
        "call of os": f"$monai.networks.utils.os.system('{touch}')",
        "callable": {**UNET, "_mode_": "callable"},
    }  # fmt: skip


@pytest.mark.parametrize("name", targets(Path("x")))
def test_a_network_that_is_code(tmp_path: Path, marker: Path, name: str) -> None:
    folder = bundle(tmp_path, targets(marker)[name])
    with pytest.raises(ModelError, match="expected"):
        load_model(folder)


def test_the_careless_way_would_run_it(tmp_path: Path) -> None:
    from monai.bundle.config_parser import ConfigParser

    marker = tmp_path / "careless"
    for name in ("expression", "os", "through monai"):
        parser = ConfigParser({"network_def": targets(marker)[name]})
        parser.get_parsed_content("network_def")
        assert marker.exists(), name
        marker.unlink()


@pytest.mark.parametrize(
    "transform",
    [
        "$__import__('os').system('touch MARKER')",
        {"_target_": "os.system", "command": "touch MARKER"},
        {
            "_target_": "Lambdad",
            "keys": "image",
            "func": "$__import__('os').system('touch MARKER')",
        },
        {"_target_": "LoadImaged", "keys": "image", "reader": "$open('MARKER', 'w')"},
        {"_target_": "monai.transforms.os.system", "command": "touch MARKER"},
    ],
)
def test_preprocessing_that_is_code(tmp_path: Path, marker: Path, transform: Any) -> None:
    text = json.dumps([*CT, transform]).replace("MARKER", str(marker))
    try:
        model = load_model(bundle(tmp_path, UNET, json.loads(text)))
    except ModelError:
        return
    assert model.drift or "reader" in text  # named, or a setting that is never looked at


def test_code_elsewhere_in_the_bundle_is_never_looked_at(tmp_path: Path, marker: Path) -> None:
    attack = f"$__import__('os').system('touch {marker}')"
    folder = bundle(
        tmp_path, UNET, imports=[attack], initialize=[attack], run=[attack], handlers=[attack],
        device=attack, evaluator={"_target_": "os.system", "command": f"touch {marker}"},
        postprocessing={"transforms": [attack]},
    )  # fmt: skip
    (folder / "scripts").mkdir()
    (folder / "scripts/__init__.py").write_text(f"open({str(marker)!r}, 'w')")
    (folder / "configs/logging.conf").write_text(
        "[loggers]\nkeys=root\n[handlers]\nkeys=h\n[formatters]\nkeys=\n[logger_root]\nhandlers=h\n"
        f"[handler_h]\nclass=__import__('os').system('touch {marker}')\nargs=()\n"
    )
    assert load_model(folder).labels == ("a", "b")


def test_yaml_that_builds_objects(tmp_path: Path, marker: Path) -> None:
    yaml = pytest.importorskip("yaml")
    folder = bundle(tmp_path, UNET)
    (folder / "configs/inference.json").unlink()
    text = f"network_def: !!python/object/apply:os.system ['touch {marker}']\n"
    (folder / "configs/inference.yaml").write_text(text)
    with pytest.raises(ModelError, match=r"expected plain YAML in b/configs/inference\.yaml"):
        load_model(folder)
    yaml.unsafe_load(text)
    assert marker.exists()  # the careless way
    marker.unlink()


class _Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("old", [False, True])
def test_a_pickle_in_the_weights(tmp_path: Path, marker: Path, *, old: bool) -> None:
    folder = bundle(tmp_path, UNET)
    path = folder / "models/model.pt"
    torch.save({"w": _Attack(marker)}, path, _use_new_zipfile_serialization=not old)
    with pytest.raises(ModelError, match=r"model\.pt"):
        load_model(folder)
    torch.load(path, weights_only=False)  # noqa: TID251 - the attack
    assert marker.exists()  # the careless way
    marker.unlink()


def test_a_bare_pickle_as_weights(tmp_path: Path, marker: Path) -> None:
    folder = bundle(tmp_path, UNET)
    (folder / "models/model.pt").write_bytes(pickle.dumps(_Attack(marker)))
    with pytest.raises(ModelError, match="another kind of file"):
        load_model(folder)


@pytest.mark.parametrize("name", ["../outside.txt", "/outside.txt", "b/../../outside.txt"])
def test_a_zip_that_leads_out_of_itself(tmp_path: Path, name: str) -> None:
    folder, _ = unet(tmp_path / "b")
    path = zipped(folder, tmp_path / "b.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, "x")
    with pytest.raises(ModelError, match=r"only files inside the bundle in b\.zip"):
        load_model(path)
    assert not (tmp_path / "outside.txt").exists()


def test_a_link_out_of_the_folder(tmp_path: Path) -> None:
    folder, _ = unet(tmp_path / "b")
    secret = tmp_path / "secret.json"
    secret.write_text(json.dumps(metadata(["a", "b"])))
    (folder / "configs/metadata.json").unlink()
    (folder / "configs/metadata.json").symlink_to(secret)
    with pytest.raises(ModelError, match="a link out of it"):
        load_model(folder)


def test_a_zip_bomb(tmp_path: Path) -> None:
    folder, _ = unet(tmp_path / "b")
    (folder / "models/model.pt").unlink()
    path = zipped(folder, tmp_path / "b.zip")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("b/models/model.pt", bytes(1 << 28))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError, match="to grow at most 100 times when unpacked"):
        load_model(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_a_configuration_of_many_megabytes(tmp_path: Path) -> None:
    folder = bundle(tmp_path, UNET)
    (folder / "configs/inference.json").write_text('{"a": "' + "x" * (5 << 20) + '"}')
    with pytest.raises(ModelError, match=r"at most 4194304 bytes in b/configs/inference\.json"):
        load_model(folder)


@pytest.mark.parametrize(
    "macro", ["%/etc/passwd", "%/etc/x.json::a", "%../x.json", "%configs/../../x.json",
              "%$bundle_root/x.json", "%..\\x.json", "%missing.json"],
)  # fmt: skip
def test_macros_that_read_other_files(tmp_path: Path, macro: str) -> None:
    (tmp_path / "x.json").write_text(json.dumps(UNET))
    with pytest.raises(ModelError, match="expected"):
        load_model(bundle(tmp_path, macro))


@pytest.mark.parametrize(
    ("more", "network"),
    [
        ({"x": "@y", "y": "@x"}, "@x"),
        ({"x": "$@x + 1"}, "$@x"),
        ({"x": ["@x"]}, {**UNET, "channels": "@x"}),
        ({"x": "%x"}, "%x"),
    ],
)
def test_references_that_go_round(tmp_path: Path, more: dict[str, Any], network: Any) -> None:
    with pytest.raises(ModelError, match=r"references that end|multiply"):
        load_model(bundle(tmp_path, network, **more))


def test_references_that_multiply(tmp_path: Path) -> None:
    more: dict[str, Any] = {"a0": [1] * 10}
    more |= {f"a{n}": [f"@a{n - 1}"] * 10 for n in range(1, 10)}
    with pytest.raises(ModelError, match="its references multiply"):
        load_model(bundle(tmp_path, {**UNET, "channels": "@a9"}, **more))


@pytest.mark.parametrize("channels", [[50_000, 50_000], [2_000_000_000, 8]], ids=["many", "few"])
def test_a_network_of_ten_gigabytes(tmp_path: Path, channels: list[int]) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError, match="that its weights file can fill"):
        load_model(bundle(tmp_path, {**UNET, "channels": channels}))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000  # kB


def test_weights_that_declare_ten_gigabytes(tmp_path: Path) -> None:
    folder = bundle(tmp_path, UNET)
    huge = torch.zeros(1).expand(50_000, 50_000)
    torch.save(dict.fromkeys(built(UNET).state_dict(), huge), folder / "models/model.pt")
    with pytest.raises(ModelError, match="other shape"):
        load_model(folder)


@pytest.mark.parametrize(
    "text",
    [
        "9 ** 9 ** 9", "[0] * 10 ** 9", "'a' * 10 ** 9", "list(range(10 ** 9))", "'%9999999d' % 1",
        "(1).__class__", "open('/etc/passwd').read()", "eval('1')", "[x for x in (1, 2)]",
        "lambda x: open(x)", "lambda: 0", "f'{1}'", "x := 1", "len", "__import__('os')",
        "@a.__class__", "min(key=print)", "sorted([1], key=print)", "**", "1 if", "torch.load('x')",
        "@#a", "@::a", "(" * 300 + ")" * 300, "1" + "+1" * 3000, "monai.bundle", "torch.os",
    ],
)  # fmt: skip
def test_expressions_that_are_more_than_data(text: str) -> None:
    with pytest.raises(ModelError, match="code in a bundle is not run"):
        evaluated(text, lambda name: {"a": 1}[name])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("len(@names) + @n", 4), ("[@n] * 2 + [1, -2.5]", [2, 2, 1, -2.5]), ("not @off", True),
        ("[1.5] if @set#fine else [3]", [1.5]), ("@set::sizes[-1] // 2", 4), ("None", None),
        ("torch.from_numpy([[1, 0], [0, 1]])", [[1, 0], [0, 1]]), ("torch.float32", "float32"),
        ("list(range(2)) + list(range(5, 7))", [0, 1, 5, 6]), ("@set['sizes'][:2]", [3, 5]),
        ("1 - float(@n) / 4", 0.5), ("@n == 2 and @n < 3", True), ("@names", {"a": 1, "b": 2}),
        ("'.' + '/models'", "./models"), ("tuple(@set#sizes)", (3, 5, 8)),
    ],
)  # fmt: skip
def test_expressions_that_are_data(tmp_path: Path, text: str, value: Any) -> None:
    data = {"names": {"a": 1, "b": 2}, "n": 2, "off": False,
            "set": {"fine": True, "sizes": [3, 5, 8]}, "x": f"${text}"}  # fmt: skip
    assert Config(Files(tmp_path), "configs/x.json", data).get("x") == value
