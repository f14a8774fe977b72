"""Writing a third party's distribution from the template; imports no torch."""

from __future__ import annotations

import re
from pathlib import Path
from string import Template

from moe_routing_registry.text import require_name

_TEMPLATE = Path(__file__).with_name("template")
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def files(name: str) -> dict[str, str]:
    """Return the files of a distribution for the backend ``name``: path inside it -> text.

    :raises ValueError: the name is not lower case words of letters and digits, joined by hyphens.

    >>> sorted(files("acme"))[:2]
    ['README.md', 'moe_routing_acme/__init__.py']
    """
    if not _NAME.fullmatch(require_name("name", name)):
        msg = f"name: expected lower case letters and digits, words joined by hyphens, got {name!r}"
        raise ValueError(msg)
    package = package_of(name)
    places = {
        "pyproject.toml": "pyproject.toml.txt",
        "README.md": "README.md.txt",
        f"{package}/__init__.py": "plugin.py.txt",
        f"{package}/kernel.py": "kernel.py.txt",
        "tests/test_conformance.py": "test_conformance.py.txt",
    }
    return {
        place: Template((_TEMPLATE / source).read_text(encoding="utf-8")).substitute(
            name=name, package=package
        )
        for place, source in places.items()
    }


def package_of(name: str) -> str:
    """Return the name of the package that a backend of that name is written as."""
    return f"moe_routing_{name.replace('-', '_')}"


def write(name: str, directory: str | Path) -> list[Path]:
    """Write the distribution into a directory that does not exist yet, or is empty.

    Return the files written.

    :raises ValueError: the name cannot be, or there is something in the directory.
    """
    directory = Path(directory)
    texts = files(name)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        msg = f"directory: expected a new or an empty one, got {str(directory)!r}"
        raise ValueError(msg)
    written = []
    for place, text in texts.items():
        path = directory / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written
