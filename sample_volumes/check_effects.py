"""What do the sample networks say about the sample scans, their twins and their references?

`python check_effects.py [--write]` prints the log-odds; --write adds them to truth.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from builder.files import read_ras, write_checksums, write_json
from builder.net_io import load_net, reference_scan, score

HERE = Path(__file__).resolve().parent
FOLDER = {"CT": "ct", "MR": "mr"}


def measure(net_folder: Path) -> bool:
    """Print the scores of one network; returns whether every effect has the designed sign."""
    net, spec = load_net(net_folder)
    modality = spec["input"]["modality"]
    folder = HERE / FOLDER[modality]
    truth = json.loads((folder / "truth.json").read_text())
    heads = f"{'z':>8}{'twin':>8}{'ref.':>8}{'effect':>8}{'designed':>10}"
    print(f"{net_folder.name}\n  {'scan':9}{heads}")
    right = True
    for case in truth["cases"]:
        right &= _measure_case(net, spec, folder, case, net_folder.name)
    if "--write" in sys.argv:
        write_json(folder / "truth.json", truth)
    return right


def _measure_case(
    net: Any, spec: dict[str, Any], folder: Path, case: dict[str, Any], name: str
) -> bool:
    """Print one line and note the figures in the case, in place."""
    scan = read_ras(folder / case["file"])
    value = score(net, scan, spec)
    plain = score(net, reference_scan(scan, spec["input"]["modality"]), spec)
    figures = {"score": round(value, 3), "reference_score": round(plain, 3)}
    line = f"  {case['file'].split('.')[0]:9}{value:8.2f}"
    right = True
    if case["twin"]:
        twin = score(net, read_ras(folder / case["twin"]), spec)
        designed = case["designed_effect"]
        figures |= {"twin_score": round(twin, 3), "effect": round(value - twin, 3)}
        line += f"{twin:8.2f}{plain:8.2f}{value - twin:8.2f}{designed:10.2f}"
        right = (value - twin) * designed > 0
    else:
        line += f"{'':8}{plain:8.2f}"
    case.setdefault("measured", {})[name] = figures
    print(line + ("" if right else "  WRONG SIGN"))
    return right


def main() -> int:
    """Check every network; exit code 1 when an effect has the wrong sign."""
    folders = sorted(path.parent for path in (HERE / "nets").glob("*/spec.json"))
    results = [measure(folder) for folder in folders]
    if "--write" in sys.argv:
        write_checksums(HERE)
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
