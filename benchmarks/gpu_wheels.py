"""Wheels for `gpu.py` on a machine without a network, where Python 3.12 and torch with CUDA are installed.

Downloads into ``.whl/`` what the machine lacks, in the versions of requirements.lock, and adds up all that travels, as the
way there is narrow. What the wheels need besides is on the machine; `gpu.md` lists it.
"""

from __future__ import annotations

import subprocess
import sys

from persodpo.runfolder import PROJECT

WHEELS = PROJECT / ".whl"
#: Megabytes of wheels and repository files.
MOST = 60
CARRIED = (
    "annotated-types", "datasets", "dill", "fsspec", "multiprocess", "peft", "pydantic", "pydantic-core", "transformers",
    "trl", "typing-extensions", "typing-inspection",
)  # fmt: skip
PLATFORMS = [f"manylinux{name}_x86_64" for name in ("_2_28", "_2_27", "_2_17", "2014", "1")]


def main() -> None:
    """Download and add up."""
    WHEELS.mkdir(exist_ok=True)
    for wheel in WHEELS.glob("*.whl"):
        wheel.unlink()
    lines = (PROJECT / "requirements.lock").read_text().splitlines()
    pins = [line for line in lines if line.partition("==")[0] in CARRIED]
    kind = ["--no-deps", "--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "download", "-q", *kind, *platforms, "-d", str(WHEELS), *pins]
    subprocess.run(command, check=True)
    command = ["git", "-C", str(PROJECT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    files = [path for path in (PROJECT / name for name in listed if name) if path.is_file()]
    sizes = [sum(path.stat().st_size for path in paths) / 1e6 for paths in (WHEELS.glob("*.whl"), files)]
    told = f"{sizes[0]:.1f} MB of wheels and {sizes[1]:.1f} MB of files, {sum(sizes):.1f} MB of {MOST}"
    print(told)
    if len(list(WHEELS.glob("*.whl"))) < len(CARRIED) or sum(sizes) > MOST:
        sys.exit("A wheel is missing, or this is too much to carry.")


if __name__ == "__main__":
    main()
