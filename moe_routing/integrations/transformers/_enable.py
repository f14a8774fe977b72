"""``enable`` and ``disable``.

Models that are loaded later route through us, by transformers' own patch mapping.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any, cast

from torch import nn

from moe_routing import MoeRoutingWarning
from moe_routing.integrations.transformers._fingerprint import RefusedError
from moe_routing.integrations.transformers._patch import install
from moe_routing.integrations.transformers._proof import known


class _StandIn(type):
    """The class of the classes in the mapping.

    Each makes the router that it stands for, and puts our routing into it.

    A router made so is transformers' own class, in whose place the stand-in is in its module
    meanwhile. transformers also aims the recorders of ``output_router_logits`` at the stand-ins,
    for every model of the process and for good, so any router of the class that one stands for
    counts as its instance.

    :ivar stock: module and name of the class.
    """

    stock: tuple[str, str]

    def __call__(cls, *args: Any, **kwargs: Any) -> nn.Module:  # noqa: ANN401 -- a router's own arguments
        module, name = cls.stock
        caller = sys._getframe(1).f_globals["__name__"]  # noqa: SLF001 -- the mapping goes by name alone; this tells whose it is
        if caller != module:
            msg = (
                f"{caller} has a class {name} of its own, which transformers' patch mapping takes "
                f"for the one in {module}; call moe_routing.integrations.transformers.disable() "
                "and load this model again"
            )
            raise RuntimeError(msg)
        router = _class_named(module, name)(*args, **kwargs)
        try:
            install(router)
        except RefusedError as reason:
            warnings.warn(
                f"{name} keeps its own routing: {reason}", MoeRoutingWarning, stacklevel=2
            )
        return router

    def __instancecheck__(cls, instance: object) -> bool:
        return any(
            (base.__module__, base.__qualname__) == cls.stock for base in type(instance).__mro__
        )


def enable() -> None:
    """Let every model that transformers loads, until ``disable``, route through ``moe_routing``.

    Works through ``transformers.monkey_patching.register_patch_mapping``, which ``from_pretrained``
    and ``from_config`` read; calling a model's class does not. The models are as if ``patch`` had
    been called on them: ``patch(model)`` reports their layers, ``unpatch(model)`` gives them their
    own code back. A router that cannot be proven to be the one that we know keeps its own, with a
    warning. Enabling twice changes nothing. Loading takes under a second longer, the time that
    transformers needs to look for the classes.

    :raises RuntimeError: transformers' patch mapping cannot be used here, as up to 5.20 without
        torchvision.

    >>> enable()
    >>> disable()
    """
    from transformers.monkey_patching import apply_patches, register_patch_mapping

    register_patch_mapping(_mapping(), overwrite=True)
    try:
        with apply_patches():  # up to 5.20 it looks into modules that need torchvision
            pass
    except ImportError as error:
        disable()
        msg = (
            f"transformers' patch mapping cannot be used here: {error}; install that, or call "
            "patch(model) after loading"
        )
        raise RuntimeError(msg) from error


def disable() -> None:
    """Let transformers load its own routers again.

    Models that were loaded meanwhile stay as they are.
    """
    from transformers.monkey_patching import get_patch_mapping, unregister_patch_mapping

    unregister_patch_mapping([key for key in get_patch_mapping() if key in _mapping()])
    _remove_left_behind()


def _mapping() -> dict[str, type[nn.Module]]:
    """Return anchored patterns: transformers searches for a key anywhere in a name."""
    paths = (path.split(".") for path in known())
    return {
        f"^{name}$": _stand_in(f"transformers.models.{folder}.modeling_{folder}", name)
        for folder, name in paths
    }


def _stand_in(module: str, name: str) -> type[nn.Module]:
    return cast("type[nn.Module]", _StandIn(name, (nn.Module,), {"stock": (module, name)}))


def _class_named(module: str, name: str) -> type[nn.Module]:
    """Find a class while a stand-in is in its module: the one whose methods are that module's."""
    names = vars(sys.modules[module])
    found = [
        cls
        for base in (nn.Module, nn.Linear)
        for cls in base.__subclasses__()
        if cls.__qualname__ == name
    ]
    own = [
        cls
        for cls in found
        if any(getattr(value, "__globals__", None) is names for value in vars(cls).values())
    ]
    return own[-1]


def _remove_left_behind() -> None:
    """Put classes back whose stand-ins are still in a module.

    Transformers leaves them there if loading a model fails.
    """
    for module in [
        module for name, module in sys.modules.items() if name.startswith("transformers.models.")
    ]:
        for name, value in list(vars(module).items()):
            if isinstance(value, _StandIn):
                setattr(module, name, _class_named(*value.stock))
