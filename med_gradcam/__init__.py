"""med_gradcam: why does a 3D network say so? Signed evidence maps, in the right place, that add up.

The public names are loaded on first use; importing the package imports nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "Box": "target",
    "BlackBox": "blackbox",
    "Cancelled": "errors",
    "Checkup": "checkup.report",
    "CohortConcepts": "channels",
    "Component": "findings",
    "Concepts": "channels",
    "Detector": "detection",
    "EnsembleExplanation": "members",
    "Explanation": "explanation",
    "Geometry": "geometry",
    "Heatmap": "maps",
    "JointExplanation": "joint",
    "InputSpec": "model",
    "MedGradcamError": "errors",
    "Model": "model",
    "Projection": "projection",
    "Provenance": "provenance",
    "RegionValues": "regions",
    "SeriesExplanation": "series",
    "Step": "progress",
    "Target": "target",
    "Volume": "volume",
    "Whole": "whole",
    "boxes": "findings",
    "components": "findings",
    "concepts": "channels",
    "concepts_of": "channels",
    "detector": "detection",
    "doctor": "checkup.report",
    "draw": "maps",
    "explain": "engine",
    "explain_ensemble": "ensemble",
    "explain_inputs": "joint",
    "explain_many": "engine",
    "explain_series": "series",
    "explain_whole": "whole",
    "inspect": "inspection",
    "load_model": "loading",
    "mean_of": "ensemble",
    "project": "projection",
    "read": "loading",
    "read_explanation": "loading",
    "read_series": "loading",
    "shapley": "regions",
    "write": "delivery",
    "write_series": "series",
}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from med_gradcam.blackbox import BlackBox as BlackBox
    from med_gradcam.channels import CohortConcepts as CohortConcepts
    from med_gradcam.channels import Concepts as Concepts
    from med_gradcam.channels import concepts as concepts
    from med_gradcam.channels import concepts_of as concepts_of
    from med_gradcam.checkup.report import Checkup as Checkup
    from med_gradcam.checkup.report import doctor as doctor
    from med_gradcam.delivery import write as write
    from med_gradcam.detection import Detector as Detector
    from med_gradcam.detection import detector as detector
    from med_gradcam.engine import explain as explain
    from med_gradcam.engine import explain_many as explain_many
    from med_gradcam.ensemble import explain_ensemble as explain_ensemble
    from med_gradcam.ensemble import mean_of as mean_of
    from med_gradcam.errors import Cancelled as Cancelled
    from med_gradcam.errors import MedGradcamError as MedGradcamError
    from med_gradcam.explanation import Explanation as Explanation
    from med_gradcam.findings import Component as Component
    from med_gradcam.findings import boxes as boxes
    from med_gradcam.findings import components as components
    from med_gradcam.geometry import Geometry as Geometry
    from med_gradcam.inspection import inspect as inspect
    from med_gradcam.joint import JointExplanation as JointExplanation
    from med_gradcam.joint import explain_inputs as explain_inputs
    from med_gradcam.loading import load_model as load_model
    from med_gradcam.loading import read as read
    from med_gradcam.loading import read_explanation as read_explanation
    from med_gradcam.loading import read_series as read_series
    from med_gradcam.maps import Heatmap as Heatmap
    from med_gradcam.maps import draw as draw
    from med_gradcam.members import EnsembleExplanation as EnsembleExplanation
    from med_gradcam.model import InputSpec as InputSpec
    from med_gradcam.model import Model as Model
    from med_gradcam.progress import Step as Step
    from med_gradcam.projection import Projection as Projection
    from med_gradcam.projection import project as project
    from med_gradcam.provenance import Provenance as Provenance
    from med_gradcam.regions import RegionValues as RegionValues
    from med_gradcam.regions import shapley as shapley
    from med_gradcam.series import SeriesExplanation as SeriesExplanation
    from med_gradcam.series import explain_series as explain_series
    from med_gradcam.series import write_series as write_series
    from med_gradcam.target import Box as Box
    from med_gradcam.target import Target as Target
    from med_gradcam.volume import Volume as Volume
    from med_gradcam.whole import Whole as Whole
    from med_gradcam.whole import explain_whole as explain_whole


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'med_gradcam' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"med_gradcam.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
