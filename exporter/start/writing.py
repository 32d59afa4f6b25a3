"""A folded graph of layers, written back into the ONNX graph that `layers` read.

What folding left alone is the node that it was. A layer that took something up has other weights,
and may have a bias that it had not; what folding left in a BatchNorm's place is an addition, a
multiplication, or a clamp of two nodes. Tensors keep their names.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from exporter.errors import GraphError
from exporter.fold import ChannelClamp, ChannelScale, ChannelShift
from exporter.onnx_edits import drop_unread, replace_nodes
from exporter.start.layers import Held

if TYPE_CHECKING:
    import onnx

_LEFT = {
    ChannelShift: (("Add", "shift"),),
    ChannelScale: (("Mul", "scale"),),
    ChannelClamp: (("Max", "low"), ("Min", "high")),
}


def write_back(folded: fx.GraphModule, model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of the model that computes what the folded graph of its layers does.

    Constants are of the type that the folded graph has. Raises `GraphError` where the two do not go
    together, which would be a fault of this program.
    """
    written = type(model)()
    written.CopyFrom(model)
    return _Writer(folded, written).write()


class _Writer:
    """One walk over the folded graph."""

    def __init__(self, folded: fx.GraphModule, model: onnx.ModelProto) -> None:
        graph = model.graph
        self.folded = folded
        self.model = model
        self.old = list(graph.node)
        self.nodes: list[onnx.NodeProto] = []
        self.names: dict[fx.Node, str] = {}
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.readers = Counter(name for node in graph.node for name in node.input)
        self.taken = {*self.constants, *self.readers, *(v.name for v in graph.input)}
        self.taken |= {name for node in graph.node for name in (node.name, *node.output)}

    def write(self) -> onnx.ModelProto:
        graph = self.model.graph
        inputs = iter(graph.input)
        for node in self.folded.graph.nodes:
            if node.op == "placeholder":
                self.names[node] = next(inputs).name
            elif node.op == "output":
                gives: Any = node.args[0]
                if len(set(gives)) < len(gives):
                    raise GraphError("folding left one tensor for two outputs")
                for given, value in zip(gives, graph.output, strict=True):
                    self._rename(self.names[given], value.name)
            else:
                self._visit(node)
        replace_nodes(graph, self.nodes)
        drop_unread(graph)
        return self.model

    def _visit(self, node: fx.Node) -> None:
        module, written = self._module(node), self._written(node)
        if written is None:
            self._leave(node, module)
        elif written.node is not None:
            self._copy(node, module, written.node, written.holds)
        elif module is None:  # one of several that a node gives
            source, place = node.args
            self.names[node] = self.old[self._written(source).node].output[place]
        else:  # the padding of the layer behind it
            self.names[node] = self.names[node.all_input_nodes[0]]

    def _module(self, node: fx.Node) -> Any:
        is_call = node.op == "call_module"
        return self.folded.get_submodule(str(node.target)) if is_call else None

    def _written(self, node: Any) -> Any:
        module = self._module(node)
        return node.meta.get("written") if module is None else getattr(module, "written", None)

    def _copy(self, node: fx.Node, module: Any, number: int, holds: tuple[Held, ...]) -> None:
        """Write a node of the file with what it reads now, and the constants that it has now."""
        copy = type(self.old[0])()
        copy.CopyFrom(self.old[number])
        computed = iter(self._reads(node))
        for place, name in enumerate(copy.input):
            if name and name not in self.constants:
                copy.input[place] = self.names[next(computed)]
        for held in holds:
            self._put(copy, getattr(module, held.name), held)
        self.nodes.append(copy)
        self.names[node] = copy.output[0]
        bias = getattr(module, "bias", None) if copy.op_type == "MatMul" else None
        if bias is not None:
            copy.output[0] = self._free(f"{copy.output[0]}_product")
            self._append("Add", f"{copy.name}/Add", [copy.output[0]], bias, self.names[node])

    def _reads(self, node: fx.Node) -> list[fx.Node]:
        found: list[fx.Node] = []
        fx.node.map_arg((node.args, node.kwargs), lambda read: found.append(read))
        return found

    def _put(self, node: onnx.NodeProto, value: Tensor | None, held: Held) -> None:
        """Let a node read this constant; a constant that others read keeps its value for them."""
        if value is None:
            return
        value = value.detach().T if held.turned else value.detach()
        name = node.input[held.place] if len(node.input) > held.place else ""
        if name and self._is(name, value):
            return
        if not name or self.readers[name] > 1:
            name = self._free(f"{node.name}.{held.name}")
        self._constant(name, value)
        node.input.extend([""] * (held.place + 1 - len(node.input)))
        node.input[held.place] = name

    def _leave(self, node: fx.Node, module: Any) -> None:
        """Write what folding left in a BatchNorm's place."""
        if type(module) not in _LEFT:
            raise GraphError(f"what folding left as {node.name!r} cannot be written as ONNX")
        reads = self.names[node.all_input_nodes[0]]
        for op, constant in _LEFT[type(module)]:
            gives = self._free(f"{node.target}_{op.lower()}")
            self._append(op, f"{node.target}/{op}", [reads], getattr(module, constant), gives)
            reads = gives
        self.names[node] = reads

    def _append(self, op: str, name: str, reads: list[str], value: Tensor, gives: str) -> None:
        import onnx

        held = self._free(f"{name}.constant")
        self._constant(held, value.detach())
        self.nodes.append(onnx.helper.make_node(op, [*reads, held], [gives], self._free(name)))

    def _is(self, name: str, value: Tensor) -> bool:
        """Return whether a constant has this value, as it is stored."""
        import numpy as np
        import onnx

        stored = onnx.numpy_helper.to_array(self.constants[name])
        return stored.shape == tuple(value.shape) and np.array_equal(stored, value.numpy())

    def _constant(self, name: str, value: Tensor) -> None:
        import onnx

        tensor = onnx.numpy_helper.from_array(value.contiguous().numpy(), name)
        if name in self.constants:
            self.constants[name].CopyFrom(tensor)
        else:
            self.model.graph.initializer.append(tensor)
            self.constants[name] = self.model.graph.initializer[-1]

    def _free(self, name: str) -> str:
        """Return the name, or one like it, that nothing has."""
        free, count = name, 1
        while free in self.taken:
            count += 1
            free = f"{name}_{count}"
        self.taken.add(free)
        return free

    def _rename(self, name: str, wanted: str) -> None:
        """Let what is called ``name`` be called as the output, once the node that gave it went."""
        if name == wanted:
            return
        for node in self.nodes:
            for names in (node.input, node.output):
                names[:] = [wanted if one == name else one for one in names]
