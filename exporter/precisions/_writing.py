"""A graph of two float types, written: constants in the type that reads them, casts between."""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporter.onnx_edits import replace_nodes
from exporter.precisions._floats import ALWAYS_FLOAT, Half
from exporter.precisions._regions import READS_ANY, Regions

if TYPE_CHECKING:
    import onnx
    from onnx import NodeProto

FLOAT = 1
_SUFFIX = {True: "float", False: "half"}


class Writer:
    """Rewrites a graph in place by the regions found for it; counts what constants lose."""

    def __init__(self, graph: onnx.GraphProto, regions: Regions, half: Half) -> None:
        self.graph, self.regions, self.half = graph, regions, half
        self.below = self.total = 0
        self._lost = self._size = 0.0
        self._floats = regions.floats
        self._taken = {name for node in graph.node for name in (*node.input, *node.output)}
        self._node_names = {node.name for node in graph.node}

    def off(self) -> float:
        """Return the relative L2 error of all constants that became halves."""
        return (self._lost / self._size) ** 0.5 if self._size else 0.0

    def write(self) -> None:
        self._write_constants()
        self._write_attributes()
        self._write_casts()
        if self.regions.half_io:
            for value in (*self.graph.input, *self.graph.output):
                if value.type.tensor_type.elem_type == FLOAT:
                    value.type.tensor_type.elem_type = self.half.dtype

    # ── Constants ───────────────────────────────────────────────────────────────────

    def _write_constants(self) -> None:
        import onnx

        readers: dict[str, list[tuple[int, int, bool]]] = {}
        for index, node in enumerate(self.graph.node):
            fixed = ALWAYS_FLOAT.get(node.op_type, ())
            for at, name in enumerate(node.input):
                single = index in self.regions.single or at in fixed
                readers.setdefault(name, []).append((index, at, single))
        outputs = {value.name for value in self.graph.output}
        for tensor in list(self.graph.initializer):
            if tensor.data_type != FLOAT:
                continue
            read = readers.get(tensor.name, [])
            shared = tensor.name in outputs and not self.regions.half_io
            if not shared and all(not single for _, _, single in read):
                self._halve(tensor)
            elif any(not single for _, _, single in read):
                copy = onnx.TensorProto()
                copy.CopyFrom(tensor)
                copy.name = self._unused(f"{tensor.name}_half")
                self._halve(copy)
                self.graph.initializer.append(copy)
                for index, at, single in read:
                    if not single:
                        self.graph.node[index].input[at] = copy.name

    def _halve(self, tensor: onnx.TensorProto) -> None:
        import numpy as np
        import onnx

        values = onnx.numpy_helper.to_array(tensor)
        sizes = np.abs(values[np.isfinite(values)]).astype(np.float64)
        self.total += values.size
        self.below += int(((sizes < self.half.normal) & (sizes > 0)).sum())
        off = self.half.rounded(values)[np.isfinite(values)].astype(np.float64)
        self._lost += float(((np.abs(off) - sizes) ** 2).sum())
        self._size += float((sizes**2).sum())
        name, raw = tensor.name, self.half.bits(values).tobytes()
        tensor.CopyFrom(onnx.helper.make_tensor(name, self.half.dtype, values.shape, raw, raw=True))

    def _write_attributes(self) -> None:
        import onnx

        for index, node in enumerate(self.graph.node):
            if index in self.regions.single:
                continue
            for attribute in node.attribute:
                is_tensor = attribute.type == onnx.AttributeProto.TENSOR
                if is_tensor and attribute.t.data_type == FLOAT:
                    self._halve(attribute.t)
                elif node.op_type == "Cast" and attribute.name == "to" and attribute.i == FLOAT:
                    attribute.i = self.half.dtype

    # ── Casts ───────────────────────────────────────────────────────────────────────

    def _write_casts(self) -> None:
        """Put a Cast behind every tensor that is read in the other type, and let that read it."""
        names: dict[tuple[str, bool], str] = {}
        casts: dict[str, NodeProto] = {}
        half_io = self.regions.half_io
        written = [name for node in self.graph.node for name in node.output]
        for name in dict.fromkeys([*(v.name for v in self.graph.input), *written]):
            if not self._floats.activation(name):
                continue
            own = self.regions.is_single(name)
            other = not own
            names[name, own] = names[name, other] = name
            if other not in self.regions.wanted(name):
                continue
            if name in self.regions.outputs and own == half_io:  # the Cast writes the output
                names[name, own] = self._unused(f"{name}_{_SUFFIX[own]}")
            else:
                names[name, other] = self._unused(f"{name}_{_SUFFIX[other]}")
            casts[name] = self._cast(name, names[name, own], names[name, other], single=other)
        self._rename(names)
        self._place(casts)

    def _cast(self, name: str, source: str, target: str, *, single: bool) -> NodeProto:
        import onnx

        producer = self.regions.producer.get(name)
        edge = producer is None or target == name
        base = name if edge or producer is None else self.graph.node[producer].name or name
        called, count = f"{base}/Cast", 1
        while called in self._node_names:
            count += 1
            called = f"{base}/Cast.{count}"
        self._node_names.add(called)
        to = FLOAT if single else self.half.dtype
        return onnx.helper.make_node("Cast", [source], [target], called, to=to)

    def _rename(self, names: dict[tuple[str, bool], str]) -> None:
        for index, node in enumerate(self.graph.node):
            single = index in self.regions.single
            fixed = ALWAYS_FLOAT.get(node.op_type, ())
            for at, name in enumerate(node.input):
                if (name, single) in names and at not in fixed:
                    kind = self.regions.is_single(name) if node.op_type in READS_ANY else single
                    node.input[at] = names[name, kind]
            for at, name in enumerate(node.output):
                if (name, single) in names:
                    node.output[at] = names[name, single]

    def _place(self, casts: dict[str, NodeProto]) -> None:
        """Write the nodes, each Cast right behind what it reads."""
        behind: dict[int | None, list[NodeProto]] = {}
        for name, cast in casts.items():
            behind.setdefault(self.regions.producer.get(name), []).append(cast)
        nodes = list(behind.get(None, ()))
        for index, node in enumerate(self.graph.node):
            nodes += [node, *behind.get(index, ())]
        replace_nodes(self.graph, nodes)

    def _unused(self, name: str) -> str:
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name
