"""Write requirements.lock from pip's resolution report (used by `make lock`)."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

CUDA = re.compile(r"^(nvidia-|cuda-|triton$)")


def lock_lines(report: dict) -> list[str]:
    """Return one ``name==version`` line a package, sorted, without this project and torch's own CUDA packages."""
    pins = {}
    for item in report["install"]:
        name = re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower()
        if name != "persodpo" and not CUDA.match(name):
            pins[name] = item["metadata"]["version"].split("+")[0]
    return [f"{name}=={version}" for name, version in sorted(pins.items())]


if __name__ == "__main__":
    print("# Exact versions of everything persodpo runs with; made by `make lock` from pyproject.toml.")
    print("\n".join(lock_lines(json.loads(Path(sys.argv[1]).read_text()))))
