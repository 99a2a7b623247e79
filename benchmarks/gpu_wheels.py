"""Wheels for `gpu.py` on a machine without a network, where Python 3.12 and torch with CUDA are installed.

Downloads into ``.whl/`` what the machine lacks, in the versions of requirements.lock, and checks that nothing is missing:
every requirement of a wheel must be met by another wheel or by what is there. All that travels is added up, as the way there
is narrow. With ``--check`` nothing is downloaded.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).resolve().parents[1]
WHEELS = PROJECT / ".whl"
#: Megabytes of wheels and repository files.
MOST = 60
CARRIED = (
    "annotated-types", "datasets", "dill", "fsspec", "multiprocess", "peft", "pydantic", "pydantic-core", "transformers",
    "trl", "typing-extensions", "typing-inspection",
)  # fmt: skip
#: What the machine has; None where the version is not known.
THERE: dict[str, str | None] = {
    "accelerate": "1.15.0", "huggingface-hub": "1.33.0", "numpy": "2.5.2", "safetensors": "0.8.0", "tokenizers": "0.23.2",
    "torch": "2.11.0",
} | dict.fromkeys(
    ("aiohttp", "filelock", "hf-xet", "httpx", "jinja2", "packaging", "pandas", "psutil", "pyarrow", "pyyaml", "regex",
     "rich", "scikit-learn", "scipy", "tqdm", "typer", "xxhash")
)  # fmt: skip
TARGET = {
    "python_version": "3.12", "python_full_version": "3.12.3", "sys_platform": "linux", "platform_system": "Linux",
    "platform_machine": "x86_64", "implementation_name": "cpython", "platform_python_implementation": "CPython",
    "os_name": "posix", "extra": "",
}  # fmt: skip
PLATFORMS = [f"manylinux{name}_x86_64" for name in ("_2_28", "_2_27", "_2_17", "2014", "1")]


def download() -> None:
    """Download the wheels; earlier ones in the folder go away."""
    WHEELS.mkdir(exist_ok=True)
    for wheel in WHEELS.glob("*.whl"):
        wheel.unlink()
    lines = (PROJECT / "requirements.lock").read_text().splitlines()
    pins = [line for line in lines if line.partition("==")[0] in CARRIED]
    kind = ["--no-deps", "--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
    for platform in PLATFORMS:
        kind += ["--platform", platform]
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", *kind, "-d", str(WHEELS), *pins], check=True)


def needs(lines: list[str], environment: dict[str, str] | None = None) -> Iterator[Requirement]:
    """Yield the requirements that hold without extras, in another environment or in this one."""
    for requirement in map(Requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate(environment or {"extra": ""}):
            yield requirement


def check() -> tuple[list[str], list[str]]:
    """Return requirements of the wheels that are not met, and those that an unknown version may not meet."""
    wanted: dict[str, list[str]] = {}
    have = dict(THERE)
    for wheel in WHEELS.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            place = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            entry = Parser().parsestr(archive.read(place).decode())
        have[canonicalize_name(entry["Name"])] = entry["Version"]
        wanted[entry["Name"]] = entry.get_all("Requires-Dist", [])
    wrong = [f"{name} is not among the wheels" for name in CARRIED if name not in {*map(canonicalize_name, wanted)}]
    unknown = []
    for name, lines in wanted.items():
        for need in needs(lines, TARGET):
            version = have.get(canonicalize_name(need.name), "")
            if version is None and need.specifier:
                unknown.append(f"{need} for {name}")
            elif version is not None and not (version and need.specifier.contains(version, prereleases=True)):
                wrong.append(f"{name} needs {need}, there is {version or 'none'}")
    return wrong, unknown


def unmet(names: tuple[str, ...]) -> list[str]:
    """Return the requirements of installed packages that this environment does not meet."""
    wrong = []
    for name in names:
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{name} is missing")
            continue
        for need in needs(lines):
            versions = [found.version for found in importlib.metadata.distributions(name=need.name)][:1]
            if not versions or not need.specifier.contains(versions[0], prereleases=True):
                wrong.append(f"{name} needs {need}, there is {versions[0] if versions else 'none'}")
    return wrong


def main() -> None:
    """Download, check and add up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="download nothing")
    if not parser.parse_args().check:
        download()
    wrong, unknown = check()
    for line in unknown:
        print(f"version there not known: {line}")
    command = ["git", "-C", str(PROJECT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    files = [path for path in (PROJECT / name for name in listed if name) if path.is_file()]
    sizes = [sum(path.stat().st_size for path in paths) / 1e6 for paths in (WHEELS.glob("*.whl"), files)]
    print(f"{sizes[0]:.1f} MB of wheels and {sizes[1]:.1f} MB of files, {sum(sizes):.1f} MB of {MOST}")
    if sum(sizes) > MOST:
        wrong.append(f"{sum(sizes):.1f} MB are more than {MOST}")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
