"""Functions that run on every rank of a Gloo group, each rank a process of its own.

A start takes seconds, so a function runs as many cases as it can.
"""

from __future__ import annotations

import datetime as dt
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

TIMEOUT = dt.timedelta(seconds=300)
"""After it a collective fails that another rank does not join: no test hangs. Groups made by
``new_group`` do not inherit it."""


def run(file, function, number, tmp_path, *arguments, dead=()):
    """Call ``function(rank, number, *arguments)`` on every rank, and return what each returned.

    :param function: the name of one in the file, which each rank imports.
    :param arguments: what JSON can say, as the results are.
    :param dead: ranks that end otherwise; their result is ``None``.
    """
    folder = tmp_path / f"{function}_on_{number}"
    folder.mkdir()
    running = []
    for rank in range(number):
        command = [
            *(sys.executable, __file__, str(file), function),
            *(str(folder), str(rank), str(number), json.dumps(arguments)),
        ]
        with (folder / f"{rank}.err").open("w") as err:
            running.append(subprocess.Popen(command, stdout=err, stderr=err))
    for process in running:
        process.wait()
    said = []
    for rank, process in enumerate(running):
        result = folder / f"{rank}.json"
        if rank in dead:
            assert not result.exists(), f"rank {rank} lives"
            said.append(None)
        else:
            texts = [(folder / f"{other}.err").read_text() for other in range(number)]
            all_said = "\n".join(f"rank {other}:\n{text}" for other, text in enumerate(texts))
            assert process.returncode == 0, (
                f"rank {rank} ended with {process.returncode}\n{all_said}"
            )
            said.append(json.loads(result.read_text()))
    return said


def load(file):
    """Import a file by its path."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(file, rank, number):
    """Make the group of all ranks, which meet in a file that is theirs alone."""
    from torch import distributed

    distributed.init_process_group(
        "gloo",
        store=distributed.FileStore(str(file), number),
        rank=rank,
        world_size=number,
        timeout=TIMEOUT,
    )


def main(file, name, folder, *rest):
    """Be one rank."""
    import torch
    from torch import distributed

    rank, number, arguments = map(json.loads, rest)
    torch.set_num_threads(1)
    module = load(file)
    start(Path(folder) / "store", rank, number)
    said = getattr(module, name)(rank, number, *arguments)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(said))
    if distributed.is_initialized():
        distributed.destroy_process_group()
    sys.stderr.flush()
    # A group that something still holds may abort the process while Python ends, which is torch's
    # own affair: everything has been written. (The example's test ends as scripts do.)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
