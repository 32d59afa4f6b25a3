"""Bugs of the graph itself: nodes lost, of another kind or setting, or in another order."""

from __future__ import annotations

import numpy as np
import onnx

from mutation.bugs.site import DoesNotApply, Site, attribute, set_attribute, upstream

# ── Activations ─────────────────────────────────────────────────────────────────────


@upstream()
def relu_missing(site: Site) -> None:
    """A ReLU is lost where layers were fused and taken apart again."""
    site.remove(site.node("Relu", "Clip"))


@upstream()
def relu_where_there_is_none(site: Site) -> None:
    """A layer without activation gets its neighbour's."""
    reading = {name for node in site.nodes("Relu", "Clip") for name in node.input}
    layers = site.nodes("Conv", "Gemm", where=lambda node: node.output[0] not in reading)
    readers = [(r, layer) for layer in layers for r in site.readers(layer.output[0])]
    reader, layer = site.pick(readers)
    site.insert("Relu", reader, list(reader.input).index(layer.output[0]))


@upstream()
def leaky_relu_for_relu(site: Site) -> None:
    """A ReLU lets a hundredth of what is negative through."""
    node = site.node("Relu")
    site.replace(node, "LeakyRelu", node.input, alpha=0.01)


@upstream()
def relu6_without_its_bound(site: Site) -> None:
    """ReLU6 has become ReLU."""
    node = site.node("Clip")
    site.replace(node, "Relu", node.input[:1])


@upstream()
def relu6_bound_of_another_type(site: Site) -> None:
    """ReLU6's bound is 127/128 of 6, of a fixed-point format."""
    node = site.node("Clip")
    site.own(node, 2, np.array(6 * 127 / 128, dtype=np.float32))


@upstream()
def hard_sigmoid_for_sigmoid(site: Site) -> None:
    """A gate's sigmoid is replaced with its piecewise linear neighbour."""
    node = site.node("Sigmoid")
    site.replace(node, "HardSigmoid", node.input, alpha=1 / 6, beta=0.5)


@upstream()
def softmax_appended(site: Site) -> None:
    """The file gives probabilities where logits were asked for."""
    last = site.nodes("Gemm")[-1]
    output = last.output[0]
    last.output[0] = "before_softmax"
    site.graph.node.append(
        onnx.helper.make_node("Softmax", ["before_softmax"], [output], "softmax/Softmax", axis=1)
    )


@upstream()
def dropout_left_in(site: Site) -> None:
    """Dropout's factor 1/(1 − p), which belongs to training, is in the graph."""
    node = site.nodes("Gemm")[-1]
    site.put("kept", np.array(1.25, dtype=np.float32))
    site.insert("Mul", node, 0, "kept")


# ── Convolutions ────────────────────────────────────────────────────────────────────


def _padded(site: Site) -> onnx.NodeProto:
    return site.node("Conv", where=lambda node: any(attribute(node, "pads", [0])))


@upstream()
def stride_in_another_phase(site: Site) -> None:
    """Stride 2 starts one pixel further, as TensorFlow's SAME padding has it."""
    node = site.node(
        "Conv",
        where=lambda n: max(attribute(n, "strides", [1])) > 1 and any(attribute(n, "pads", [0])),
    )
    pads = list(attribute(node, "pads"))
    half = len(pads) // 2
    set_attribute(node, "pads", [p - 1 for p in pads[:half]] + [p + 1 for p in pads[half:]])


@upstream()
def padding_on_one_side(site: Site) -> None:
    """All of a layer's padding is at the end."""
    node = _padded(site)
    pads = list(attribute(node, "pads"))
    half = len(pads) // 2
    ends = [one + other for one, other in zip(pads[:half], pads[half:], strict=True)]
    set_attribute(node, "pads", [0] * half + ends)


def _pad_otherwise(site: Site, mode: str) -> None:
    node = _padded(site)
    pads = list(attribute(node, "pads"))
    half = len(pads) // 2
    name = f"pads_of_{node.name}"
    site.put(name, np.array([0, 0, *pads[:half], 0, 0, *pads[half:]], dtype=np.int64))
    site.insert("Pad", node, 0, name, mode=mode)
    set_attribute(node, "pads", [0] * len(pads))


@upstream()
def padding_reflects(site: Site) -> None:
    """A layer's padding is the picture's reflection, where zeros were asked for."""
    _pad_otherwise(site, "reflect")


@upstream()
def padding_repeats_the_edge(site: Site) -> None:
    """A layer's padding repeats the picture's edge, where zeros were asked for."""
    _pad_otherwise(site, "edge")


@upstream()
def padding_lost(site: Site) -> None:
    """A layer pads nothing."""
    node = _padded(site)
    set_attribute(node, "pads", [0] * len(attribute(node, "pads")))


@upstream()
def dilated(site: Site) -> None:
    """A 3×3 kernel is spread over 5×5, and the padding grows with it, so every shape still fits."""
    node = site.node("Conv", where=lambda n: list(attribute(n, "pads", [])) == [1, 1, 1, 1])
    set_attribute(node, "dilations", [2, 2])
    set_attribute(node, "pads", [2, 2, 2, 2])


# ── Pools ───────────────────────────────────────────────────────────────────────────


@upstream()
def average_counts_its_padding_or_not(site: Site) -> None:
    """An average pool divides by the wrong count at the edges."""
    node = site.node("AveragePool", where=lambda n: any(attribute(n, "pads", [0])))
    counted = attribute(node, "count_include_pad", 0)
    set_attribute(node, "count_include_pad", 1 - counted)


@upstream()
def average_pool_for_max_pool(site: Site) -> None:
    """A pool takes the mean where it should take the maximum."""
    node = site.node("MaxPool")
    keys = ("kernel_shape", "strides", "pads")
    kept = {key: attribute(node, key) for key in keys if attribute(node, key) is not None}
    site.replace(node, "AveragePool", node.input, **kept)


@upstream()
def max_pool_for_average_pool(site: Site) -> None:
    """A pool takes the maximum where it should take the mean."""
    node = site.node("AveragePool")
    keys = ("kernel_shape", "strides", "pads")
    kept = {key: attribute(node, key) for key in keys if attribute(node, key) is not None}
    site.replace(node, "MaxPool", node.input, **kept)


@upstream()
def max_pool_pads_with_zeros(site: Site) -> None:
    """A max-pool's padding is 0 where it should be −∞: the same only behind a ReLU."""
    node = site.node("MaxPool", where=lambda n: any(attribute(n, "pads", [0])))
    pads = list(attribute(node, "pads"))
    half = len(pads) // 2
    site.put("pool_pads", np.array([0, 0, *pads[:half], 0, 0, *pads[half:]], dtype=np.int64))
    site.insert("Pad", node, 0, "pool_pads")
    set_attribute(node, "pads", [0] * len(pads))


@upstream()
def pool_rounds_its_size_up(site: Site) -> None:
    """ceil_mode is on: another size where the windows do not fit, and the same where they do."""
    node = site.node("MaxPool", "AveragePool")
    set_attribute(node, "ceil_mode", 1)


@upstream()
def pool_in_another_phase(site: Site) -> None:
    """A pool's windows start one pixel further."""
    node = site.node("MaxPool", "AveragePool", where=lambda n: any(attribute(n, "pads", [0])))
    pads = list(attribute(node, "pads"))
    half = len(pads) // 2
    set_attribute(node, "pads", [p - 1 for p in pads[:half]] + [p + 1 for p in pads[half:]])


@upstream()
def global_maximum_for_global_mean(site: Site) -> None:
    """The head, or a gate, takes the maximum of the picture where it should take the mean."""
    site.node("ReduceMean").op_type = "ReduceMax"


@upstream()
def global_mean_over_one_axis_too_few(site: Site) -> None:
    """The mean is taken over the rows, and the first column stands for all."""
    node = site.node("ReduceMean")
    site.own(node, 1, np.array([-2], dtype=np.int64))
    made = f"{node.output[0]}_rows"
    reader_of = node.output[0]
    node.output[0] = made
    for name, values in (("first_from", [0]), ("first_to", [1]), ("first_axis", [-1])):
        site.put(name, np.array(values, dtype=np.int64))
    ends = ["first_from", "first_to", "first_axis"]
    keep = onnx.helper.make_node("Slice", [made, *ends], [reader_of], f"{node.name}/Slice")
    place = next(i for i, other in enumerate(site.graph.node) if other.name == node.name)
    site.graph.node.insert(place + 1, keep)


# ── Branches ────────────────────────────────────────────────────────────────────────


def _sum(site: Site) -> onnx.NodeProto:
    return site.node("Add", where=lambda n: not any(site.has(name) for name in n.input))


@upstream()
def shortcut_lost(site: Site) -> None:
    """A residual sum has one term."""
    node = _sum(site)
    kept = site.pick([0, 1])
    node.input[0] = node.input[kept]
    site.remove(node)


@upstream()
def shortcut_subtracted(site: Site) -> None:
    """A residual sum has become a difference."""
    _sum(site).op_type = "Sub"


@upstream()
def shortcut_behind_the_relu(site: Site) -> None:
    """ReLU(F(x)) + x, where ReLU(F(x) + x) was asked for."""
    node = _sum(site)
    (reader, *_) = site.readers(node.output[0])
    if reader.op_type != "Relu":
        raise DoesNotApply
    site.insert("Relu", node, 0)
    site.remove(reader)


@upstream()
def branches_in_another_order(site: Site) -> None:
    """A concatenation has its parts the other way round."""
    node = site.node("Concat", where=lambda n: len(n.input) > 1)
    node.input[:] = list(node.input)[::-1]


@upstream()
def a_branch_reads_the_wrong_tensor(site: Site) -> None:
    """A layer reads another tensor of the same shape, one that was computed earlier."""
    shapes = site.shapes()
    places = []
    earlier: list[str] = [value.name for value in site.graph.input]
    for node in site.graph.node:
        want = shapes.get(node.input[0])
        others = [n for n in earlier if n != node.input[0] and want and shapes.get(n) == want]
        if node.op_type in ("Conv", "Add", "Concat", "MaxPool", "Relu") and others:
            places.append((node, others))
        earlier += node.output
    node, others = site.pick(places)
    node.input[0] = site.pick(others)


@upstream()
def gate_missing(site: Site) -> None:
    """A squeeze-and-excite gate is left out."""
    node = site.node("Mul", where=lambda n: not any(site.has(name) for name in n.input))
    site.remove(node)


@upstream()
def shift_behind_the_pool_lost(site: Site) -> None:
    """What is left of a BatchNorm behind a ReLU, an addition per channel, is lost."""
    site.remove(site.node("Add", where=lambda n: any(site.has(name) for name in n.input)))


@upstream()
def sign_behind_the_relu_lost(site: Site) -> None:
    """What is left of a negative γ behind a ReLU, a factor −1, is lost."""
    site.remove(site.node("Mul", where=lambda n: any(site.has(name) for name in n.input)))


# ── Inputs ──────────────────────────────────────────────────────────────────────────


def _first(site: Site) -> onnx.NodeProto:
    return site.readers(site.graph.input[0].name)[0]


@upstream()
def mean_taken_off_twice(site: Site) -> None:
    """The pictures' mean, which the data have lost already, is taken off once more."""
    mean = np.array([0.485, 0.456, 0.406], dtype=np.float32).reshape(3, 1, 1)
    site.put("picture_mean", mean)
    site.insert("Sub", _first(site), 0, "picture_mean")


@upstream()
def deviation_of_another_data_set(site: Site) -> None:
    """The pictures are divided by one data set's deviation and trained on another's."""
    site.put("picture_deviation", np.array([1.02, 1.01, 0.99], np.float32).reshape(3, 1, 1))
    site.insert("Mul", _first(site), 0, "picture_deviation")


@upstream()
def mean_in_the_first_bias(site: Site) -> None:
    """A mean is folded into the first layer's bias, which is wrong where its padding comes in."""
    node = site.nodes("Conv")[0]
    weights = site.value(node.input[1])
    mean = np.array([0.485, 0.456, 0.406], dtype=np.float32)
    moved = (weights.sum(axis=(2, 3)) * mean).sum(axis=1)
    site.put("picture_mean", mean.reshape(3, 1, 1))
    site.insert("Add", node, 0, "picture_mean")
    if len(node.input) > 2:
        site.edit(node.input[2], lambda bias: bias - moved)
    else:
        site.put("moved_mean", -moved)
        node.input.append("moved_mean")


@upstream()
def height_and_width_swapped(site: Site) -> None:
    """The picture is on its side."""
    site.insert("Transpose", _first(site), 0, perm=[0, 1, 3, 2])
