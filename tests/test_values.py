"""Routers are values: they are copied, pickled, saved, and sent to spawned and forked processes."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch

import moe_routing
from moe_routing import Router, RoutingSpec

LOGITS = torch.randn(5, 16)


class Layer(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.gate = torch.nn.Linear(8, 16, bias=False)
        self.route = Router(
            RoutingSpec(family="copied", renormalize=True, scale=2.5),
            topk=2,
            num_experts=16,
            **options,
        )

    def forward(self, hidden):
        return self.route(self.gate(hidden))


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),  # noqa: S301 -- of our own making
    "torch.save": saved,
    "AveragedModel": lambda module: torch.optim.swa_utils.AveragedModel(module).module,
}


@pytest.mark.parametrize("warm", ["cold", "plain", "training", "compiled", "watched"])
@pytest.mark.parametrize("way", COPIES)
def test_a_module_with_a_router_is_copied_and_the_copy_routes_alike(way, warm):
    layer, hidden = (
        Layer(backend="eager", verify=True if warm == "watched" else None),
        torch.randn(3, 8),
    )
    if warm == "compiled":
        torch.compile(layer, fullgraph=True, backend="eager")(hidden)
    elif warm != "cold":
        with torch.set_grad_enabled(warm == "training"):
            layer(hidden)
    made = COPIES[way](layer)
    assert made.route.spec == layer.route.spec
    assert repr(made.route) == repr(layer.route)
    for ours, theirs in zip(layer(hidden), made(hidden), strict=True):
        assert torch.equal(ours, theirs)
    if warm == "watched" and way != "copy":
        assert (
            made.route.health().calls == 1
        )  # its own, not those of the router that it was made from


def test_specs_and_outputs_are_values_too():
    spec = RoutingSpec(family="copied", scale=2.5)
    route = moe_routing.get_router("mixtral")
    output = route(LOGITS, 2)
    for way in (copy.deepcopy, COPIES["pickle"]):
        assert way(spec) == spec
        assert way(spec).to_json() == spec.to_json()
        made = way(output)
        assert type(made) is moe_routing.RoutingOutput
        assert torch.equal(made.ids, output.ids)
        assert way(route.report).winner == "eager"


def run(script):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_a_spawned_process_gets_a_router_that_routes(tmp_path):
    script = tmp_path / "spawned.py"
    script.write_text(
        textwrap.dedent("""
        import torch, moe_routing

        def work(route, logits):
            return route(logits, 2).ids.tolist(), route.backend

        if __name__ == "__main__":
            import multiprocessing
            route, logits = moe_routing.get_router("mixtral"), torch.tensor([[0.0, 3.0, 1.0, 2.0]])
            route(logits, 2)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(pool.apply(work, (route, logits)))
        """)
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False
    )
    assert done.stdout == "([[1, 3]], 'eager')\n", done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize(
    "during", ["the factory", "probing", "loading the plug-ins", "shadow mode", "nothing"]
)
def test_a_process_that_is_forked_during_another_threads_first_call_routes(during):
    # The other thread stops inside, holding whatever it holds there, until the parent has seen the
    # child end.
    said = run(
        f"""
        import faulthandler, os, sys, threading, warnings
        warnings.simplefilter("ignore")  # torch and Python warn of a fork while other threads run
        import torch, moe_routing
        import moe_routing._dispatch as dispatch
        import moe_routing_backends.eager.route as eager
        import moe_routing_registry.registry as registry
        from moe_routing.reference import shadow

        torch.set_num_threads(1)
        inside, go_on = threading.Event(), threading.Event()

        def stopping(original):
            def stop(*arguments, **options):
                if threading.current_thread() is not threading.main_thread():
                    inside.set()
                    go_on.wait()
                return original(*arguments, **options)
            return stop

        during = {during!r}
        if during == "the factory":
            eager.build = stopping(eager.build)
        elif during == "probing":
            import moe_routing.probing._probe as probing
            probing.describe = stopping(probing.describe)
        elif during == "loading the plug-ins":
            registry.load = stopping(registry.load)
        elif during == "shadow mode":
            shadow.replace = stopping(shadow.replace)
        else:
            inside.set()
        spec = moe_routing.RoutingSpec(family="forked", renormalize=True)
        route = moe_routing.Router(spec, verify=True)
        logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
        thread = threading.Thread(target=lambda: route(logits, 2))
        thread.start()
        inside.wait()
        child = os.fork()
        if child == 0:
            faulthandler.dump_traceback_later(600, exit=True)  # a child that hangs shows where
            os._exit(0 if route(logits, 2).ids.tolist() == [[1, 3]] else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        go_on.set()
        thread.join()
        print(route(logits, 2).ids.tolist())
        """
    )
    assert said.splitlines() == ["0", "[[1, 3]]"]
