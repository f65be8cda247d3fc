"""How a forward becomes a graph: by running it on proxies (torch.fx)."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable
from functools import partialmethod
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pbkd.errors import UserError


class _Proxy(fx.Proxy):
    """One that knows `y += x`, which a plain one takes for `y = y + x`, and `y[index] = x`."""

    def _changed_by(self, name: str, other: Any) -> fx.Proxy:
        target = getattr(operator, f"i{name}")
        return self.tracer.create_proxy("call_function", target, (self, other), {}, name=name)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    __iadd__ = partialmethod(_changed_by, "add")
    __isub__ = partialmethod(_changed_by, "sub")
    __imul__ = partialmethod(_changed_by, "mul")
    __itruediv__ = partialmethod(_changed_by, "truediv")
    __ifloordiv__ = partialmethod(_changed_by, "floordiv")
    __imod__ = partialmethod(_changed_by, "mod")
    __ipow__ = partialmethod(_changed_by, "pow")


class NetworkTracer(fx.Tracer):
    """Traces into modules made of others; a module that cannot be traced stays whole."""

    proxy_buffer_attributes = True  # else what is computed from a buffer would be a tensor on the meta device

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """What stands for the node's value."""
        return _Proxy(node, self)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Images alone; all other arguments keep their defaults."""
        return root_fn, [self.root, self.create_proxy("placeholder", "x", (), {})]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Modules without parts, and norms: traced in eval mode, they would stay in it for good."""
        return not any(True for _ in m.children()) or isinstance(m, _BatchNorm)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        last = next(iter(reversed(self.graph.nodes)))
        stack = OrderedDict(self.module_stack)
        try:
            return super().call_module(m, forward, args, kwargs)
        except UserError:
            raise
        except Exception:  # whatever its forward raises when it gets no tensors
            while (node := next(iter(reversed(self.graph.nodes)))) is not last:
                self.graph.erase_node(node)
            self.module_stack = stack
            path = self.path_of_module(m)
            if _single_tensor(args, kwargs):
                return self.create_proxy("call_module", path, args, kwargs)
            raise


def _single_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return len(args) == 1 and isinstance(args[0], fx.Proxy) and not kwargs
