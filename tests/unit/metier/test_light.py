"""The command line is there at once: `metier --help` loads nothing heavy."""

from __future__ import annotations

import json
import subprocess
import sys

HEAVY = ["torch", "ray", "transformers", "peft", "pymilvus", "fastapi", "numpy", "pyarrow", "sentence_transformers"]


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys, json\n"
        "sys.argv = ['metier', '--help']\n"
        "from metier.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "quickstart" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1]) == []
