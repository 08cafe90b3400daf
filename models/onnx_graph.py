"""ONNX graphs, written node by node; the backbone's too where every layer is known here, else by torch's exporter.

Most backbones are convolutions, rectifiers, sums and one pooling, so the whole translation fits on a screen. It takes a
tenth of a second where torch's general exporter takes five or more, and leaves number and size of the images open.
"""

import operator
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import torch
from onnx import TensorProto, compose, helper, numpy_helper
from torch import Tensor, nn

from models.backbone import Backbone
from models.efficientnet_lite import SameConv2d
from models.tracing import UnknownLayer, trace

OPSET, IR_VERSION = 18, 8  # of 2022: onnxruntime reads versions older than itself, not newer ones
FUNCTIONS = {operator.add: "Add", operator.iadd: "Add", operator.sub: "Sub", operator.truediv: "Div"}

Value = str | Tensor | np.ndarray | int | float | Sequence[int]  # a name, or what is constant


class Writer:
    """A graph in the making. A value is known by its name, which calls give; everything else among inputs is constant.

    >>> write = Writer()
    >>> write("Mul", write("Relu", "images"), 2.0)
    'Mul1'
    """

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def __call__(self, operator: str, *inputs: Value, **attributes: object) -> str:
        """The name of what an operator with one output makes of its inputs."""
        return self.several(operator, 1, *inputs, **attributes)[0]

    def several(self, operator: str, count: int, *inputs: Value, **attributes: object) -> list[str]:
        """The names of an operator's first ``count`` outputs."""
        first = f"{operator}{len(self.nodes)}"
        names = [first, *(f"{first}.{number}" for number in range(1, count))]
        self.nodes.append(
            helper.make_node(operator, [self._named(value) for value in inputs], names, name=first, **attributes)
        )
        return names

    def insert(self, graph: onnx.GraphProto, images: str) -> list[str]:
        """Put a graph with one input in here, to work on ``images``; the names of its outputs."""
        graph = compose.add_prefix_graph(graph, f"{graph.name}/")
        self.nodes.append(helper.make_node("Identity", [images], [graph.input[0].name]))
        self.nodes += graph.node
        self.weights += graph.initializer
        return [output.name for output in graph.output]

    def model(self, entry: onnx.ValueInfoProto, outputs: Mapping[str, onnx.ValueInfoProto]) -> onnx.ModelProto:
        """What was written, as a model with this input; ``outputs`` tells what each value that it gives is called."""
        for node in self.nodes:
            for names in (node.input, node.output):
                names[:] = [outputs[name].name if name in outputs else name for name in names]
        return model_of(helper.make_graph(self.nodes, "detector", [entry], list(outputs.values()), self.weights))

    def _named(self, value: Value) -> str:
        """Numbers are float32, whole ones int64, as the operators take them."""
        if isinstance(value, str):
            return value
        if not isinstance(value, np.ndarray):
            value = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.array(value)
        if value.dtype == np.float64:
            value = value.astype(np.float32)
        name = f"constant{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(value).reshape(value.shape), name))
        return name


def onnx_graph(backbone: Backbone, trunk: onnx.GraphProto) -> onnx.ModelProto:
    """A backbone whose trunk is given: input ``images`` (B, 3, H, W) in [0, 1]; outputs ``layer2`` and ``layer3``."""
    write = Writer()
    layers = write.insert(trunk, write("Div", write("Sub", "images", backbone.mean), backbone.std))
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, "height", "width"])
    names = dict(zip(layers, ("layer2", "layer3"), strict=True))
    return write.model(
        images, {layer: helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for layer, name in names.items()}
    )


def trunk_graph(backbone: Backbone, size: tuple[int, int]) -> onnx.GraphProto:
    """A backbone's trunk, batch norms folded, for any number of images of ``size`` (height, width), normalised."""
    try:
        return written_graph(backbone.trunk)
    except UnknownLayer:
        return exported_graph(backbone.trunk, {"images": torch.zeros(2, 3, *size)}, ["layer2", "layer3"])


def written_graph(network: nn.Module) -> onnx.GraphProto:
    """A network of one input, of any size. Raises :class:`UnknownLayer` for what has no translation here."""
    layers = dict(network.named_modules())
    nodes, weights = [], []

    def constant(name: str, value: Tensor) -> str:
        weights.append(numpy_helper.from_array(value.detach().numpy(), name))
        return name

    for step in trace(network).nodes:
        inputs = [source.name for source in step.all_input_nodes]
        if step.op == "placeholder":
            images = helper.make_tensor_value_info(step.name, TensorProto.FLOAT, ["batch", 3, "height", "width"])
        elif step.op == "output":
            outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in inputs]
        elif step.op == "get_attr":
            constant(step.name, operator.attrgetter(step.target)(network))
        elif step.kwargs or len(inputs) != len(step.args):  # numbers among the arguments, or one tensor twice
            raise UnknownLayer(f"no ONNX operator is known for {step.format_node()}")
        elif step.op == "call_function" and step.target in FUNCTIONS:
            nodes.append(helper.make_node(FUNCTIONS[step.target], inputs, [step.name]))
        elif step.op == "call_module":
            operator_name, attributes, parameters = _translate(layers[step.target])
            inputs += [constant(f"{step.name}_{i}", value) for i, value in enumerate(parameters)]
            nodes.append(helper.make_node(operator_name, inputs, [step.name], **attributes))
        else:
            raise UnknownLayer(f"no ONNX operator is known for {step.format_node()}")
    return helper.make_graph(nodes, "backbone", [images], outputs, weights)


def exported_graph(module: nn.Module, inputs: dict[str, Tensor], outputs: Sequence[str]) -> onnx.GraphProto:
    """A network as torch exports it, with an open batch: examples of its ``inputs``, and its ``outputs``' names."""
    open_batch = {0: torch.export.Dim("batch")}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the inputs share one batch is just what is meant
        program = torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=(open_batch,) * len(inputs),
            verbose=False,
        )
    graph = program.model_proto.graph
    graph.name = "backbone"
    for node in graph.node:
        del node.metadata_props[:]  # where in this machine's source files each came from
    return graph


def model_of(graph: onnx.GraphProto) -> onnx.ModelProto:
    """The graph as a model of the versions that are written here."""
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def _translate(layer: nn.Module) -> tuple[str, dict, list[Tensor]]:
    """ONNX operator, its attributes, and the constants it takes after its input."""
    kind = type(layer)  # and no class made from it, which may do something else
    if kind in (nn.Conv2d, SameConv2d) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        padding = {"auto_pad": "SAME_UPPER"} if kind is SameConv2d else {"pads": layer.padding * 2}
        attributes = {"strides": layer.stride, "dilations": layer.dilation, "group": layer.groups, **padding}
        return "Conv", attributes, [layer.weight, *([] if layer.bias is None else [layer.bias])]
    if kind is nn.ReLU6:
        return "Clip", {}, [torch.tensor(0.0), torch.tensor(6.0)]
    if kind is nn.ReLU:
        return "Relu", {}, []
    if kind is nn.MaxPool2d and layer.dilation == 1 and not layer.ceil_mode:
        sizes = {"kernel_shape": layer.kernel_size, "strides": layer.stride, "pads": layer.padding}
        return "MaxPool", {k: [v] * (4 if k == "pads" else 2) for k, v in sizes.items()}, []
    if kind in (nn.Identity, nn.Dropout):
        return "Identity", {}, []
    raise UnknownLayer(f"no ONNX operator is known for {layer}")
