"""Compare the machine code of the forward kernels before and after a change; a rename must leave all of it as it is.

    python tests/triton/machine_code.py before.json             # in the old tree
    python tests/triton/machine_code.py after.json before.json  # in the new one: prints what differs, exit code 1 if anything does

Names, line numbers, addresses and the offsets of parameters are left out. No GPU is needed.
"""

import hashlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from ahead_of_time import TARGETS, cases, compiled, dtypes

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def instructions(binary, target):
    """Return the instructions of a binary, one an item."""
    if target.backend == "hip":
        lines = re.findall(r"^\t([svdgb][a-z]*_.*)", binary.asm["amdgcn"], re.MULTILINE)
        return [line.partition(";")[0].rstrip() for line in lines]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        code = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], check=True, capture_output=True, text=True).stdout
    lines = re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(.*)", code, re.MULTILINE)
    return [re.sub(r"c\[0x0\]\[0x[0-9a-f]+\]", "c[parameter]", line.partition("/*")[0].rstrip()) for line in lines]


def main(out, against=None):
    """Write a hash of each kernel's code; compare it with those of another run."""
    found = {}
    for case, problem, launch in cases(TARGETS, dtypes):
        name = " ".join(str(value) for value in case.values())
        code = "\n".join(instructions(compiled(problem, launch, TARGETS[case["target"]]), TARGETS[case["target"]]))
        found[name] = hashlib.sha256(code.encode()).hexdigest()[:16]
    Path(out).write_text(json.dumps({"triton": triton.__version__, "code": found}, indent=1) + "\n")
    if against is None:
        return 0
    before = json.loads(Path(against).read_text())["code"]
    differ = [name for name in sorted({*before, *found}) if before.get(name) != found.get(name)]
    print(f"{len(found)} kernels, {len(differ)} differ", *differ, sep="\n")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
