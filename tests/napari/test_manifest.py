"""Is the plugin what npe2 and napari expect, and does everything it names exist?"""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from npe2 import PluginManifest


@pytest.fixture(scope="module")
def manifest(manifest_path: Path) -> PluginManifest:
    found: PluginManifest = PluginManifest.from_file(manifest_path)
    return found


def test_manifest_is_valid_and_its_functions_can_be_imported(manifest: PluginManifest) -> None:
    manifest.validate_imports()
    assert manifest.name == "med-gradcam"


def test_manifest_is_the_one_the_package_announces(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["napari.manifest"] == {
        project["name"]: "napari_plugin:napari.yaml"
    }


def test_menus_name_known_commands_in_places_napari_lets_plugins_into(
    manifest: PluginManifest,
) -> None:
    from napari._app_model.constants._menus import is_menu_contributable

    commands = {command.id for command in manifest.contributions.commands or []}
    menus = manifest.contributions.menus or {}
    assert menus
    for place, items in menus.items():
        assert is_menu_contributable(place)
        assert {item.command for item in items} <= commands  # type: ignore[union-attr]
