"""What every benchmark does around its measurement: options, a line a result, the JSON file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def run(doc: str | None, measure: Callable[[int], dict[str, Any]], *, quick: int, full: int) -> None:
    """Parse the options, measure, print and write.

    Args:
        doc: the benchmark's own docstring, for ``--help``.
        measure: steps of each arm -> figures; ``figures["ratios"]`` is keyed by bar name.
        quick, full: steps with and without ``--quick``.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    figures = measure(quick if arguments.quick else full)
    for name, value in figures.items():
        print(f"{name}: {json.dumps(value)}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
