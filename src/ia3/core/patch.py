"""Replace a module's forward, in layers that come off in any order.

The last patch on a module is outermost, and `Patch.below` is the forward that it replaced. Patches
are copied and pickled with their module.

accelerate replaces forwards too: it moves the one it finds to `_old_forward` and calls that.
Patches are put there then, so that accelerate's hooks and patches may each come or go first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import CodeType, MethodType
from typing import Any, NoReturn

from torch import nn

from ..errors import IA3Error

# Where a module's forward is found, if it is not the class's.
SLOTS = ("forward", "_old_forward")


@dataclass(eq=False, slots=True)
class Patch:
    """A forward in the place of a module's own, and the handle that removes it."""

    module: nn.Module
    forward: Callable[..., Any] | None  # `None` once removed
    before: Callable[..., Any] | None  # what was in the slot, if anything

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.forward
        if args and args[0] is self.module:  # bound to it, see `patches`
            args = args[1:]
        return (self.below if forward is None else forward)(*args, **kwargs)

    @property
    def below(self) -> Callable[..., Any]:
        """The forward that was replaced: another patch's, another library's or the class's."""
        if self.before is not None:
            return self.before
        # Not a method: torch.compile cannot trace how one is made.
        return partial(type(self.module).forward, self.module)

    # `inspect.signature` of the module's forward stays what it was.
    __wrapped__ = below

    @property
    def __code__(self) -> CodeType:
        """torch.export wants to know where a model's forward is written."""
        return type(self.module).forward.__code__

    def remove(self) -> None:
        """Take the patch off; a second time does nothing.

        Where another library has wrapped it, it stays there and runs the forward below.
        """
        for above in patches(self.module):
            if above.before is self:
                above.before = self.before
        own = self.module.__dict__
        for slot in SLOTS:
            if own.get(slot) is self:
                if self.before is not None:
                    own[slot] = self.before
                elif slot == "forward":
                    del own[slot]
                else:
                    own[slot] = MethodType(type(self.module).forward, self.module)
        self.forward = None


def patch(module: nn.Module, forward: Callable[..., Any]) -> Patch:
    """Have calls of a module run `forward` until the returned handle's `remove()`.

    To be copied and pickled with the module, `forward` must be an object of a class with
    `__call__`, a bound method or a function of a module.
    """
    own, slot = module.__dict__, slot_for(module)
    handle = own[slot] = Patch(module, forward, own.get(slot))
    return handle


def patches(module: nn.Module) -> Iterator[Patch]:
    """The patches on a module, outermost first."""
    for slot in SLOTS:
        found = module.__dict__.get(slot)
        # accelerate binds the forward that it has taken its wrapper off to the module once more.
        found = getattr(found, "__func__", found)
        while isinstance(found, Patch):
            yield found
            found = found.before


def patched(module: nn.Module, kind: type) -> Patch | None:
    """The patch whose forward is of this class, or is a method of it; `None` without one."""
    for found in patches(module):
        if isinstance(getattr(found.forward, "__self__", found.forward), kind):
            return found
    return None


def rebound(forward: Any, module: nn.Module, twin: nn.Module) -> Callable[..., Any] | None:
    """A forward found on a module, for a shallow copy of the module.

    Of a patch it is the forward below. `None` where the forward works for that module alone.
    """
    if isinstance(forward, Patch):
        return rebound(forward.below, module, twin)
    if getattr(forward, "__self__", None) is module:
        return partial(forward.__func__, twin)
    if isinstance(forward, partial):
        bound = rebound(forward.func, module, twin)
        if bound is not None:
            return partial(bound, *forward.args, **forward.keywords)
        if forward.args[:1] == (module,):
            return partial(forward.func, twin, *forward.args[1:], **forward.keywords)
    return None


def slot_for(module: nn.Module) -> str:
    """The attribute to put a forward in."""
    return "_old_forward" if "_old_forward" in module.__dict__ else "forward"


def refuse_replica(module: nn.Module) -> NoReturn:
    """In place of `nn.Module._replicate_for_data_parallel`, which copies a module for each GPU.

    The copies would share the first one's hooks and patches, and compute with its vectors.
    """
    raise IA3Error(
        "nn.DataParallel cannot copy a model with adapters: run a process a GPU (torchrun, "
        "accelerate launch), or show this one a single GPU (CUDA_VISIBLE_DEVICES=0)"
    )
