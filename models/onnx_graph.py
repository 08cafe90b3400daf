"""The backbone as an ONNX graph, written node by node.

A backbone is convolutions, rectifiers, sums and one pooling, so the whole translation fits on a screen. It takes a
tenth of a second where torch's general exporter takes five or more, and leaves number and size of the images open.
"""

import operator

import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx, nn

from models.efficientnet_lite import SameConv2d

OPSET, IR_VERSION = 18, 8  # of 2022: onnxruntime reads versions older than itself, not newer ones
FUNCTIONS = {operator.add: "Add", operator.iadd: "Add", operator.sub: "Sub", operator.truediv: "Div"}


def onnx_graph(backbone: nn.Module) -> bytes:
    """Serialised graph of a backbone whose batch norms are folded.

    Input ``images`` (B, 3, H, W) in [0, 1]; outputs layer 2 and layer 3, in this order. Raises KeyError or TypeError
    for a function or layer that no backbone here has.
    """
    layers = dict(backbone.named_modules())
    nodes, weights = [], []

    def constant(name: str, value: Tensor) -> str:
        weights.append(numpy_helper.from_array(value.detach().numpy(), name))
        return name

    for step in _Tracer().trace(backbone).nodes:
        inputs = [source.name for source in step.all_input_nodes]
        if step.op == "placeholder":
            images = helper.make_tensor_value_info(step.name, TensorProto.FLOAT, ["batch", 3, "height", "width"])
        elif step.op == "get_attr":
            constant(step.name, backbone.get_buffer(step.target))
        elif step.op == "output":
            outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in inputs]
        elif step.op == "call_function":
            nodes.append(helper.make_node(FUNCTIONS[step.target], inputs, [step.name]))
        else:
            operator_name, attributes, parameters = _translate(layers[step.target])
            inputs += [constant(f"{step.name}_{i}", value) for i, value in enumerate(parameters)]
            nodes.append(helper.make_node(operator_name, inputs, [step.name], **attributes))

    graph = helper.make_graph(nodes, "backbone", [images], outputs, weights)
    opset = helper.make_opsetid("", OPSET)
    return helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION).SerializeToString()


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, SameConv2d) or super().is_leaf_module(module, name)


def _translate(layer: nn.Module) -> tuple[str, dict, list[Tensor]]:
    """ONNX operator, its attributes, and the constants it takes after its input."""
    match layer:
        case nn.Conv2d():
            same = isinstance(layer, SameConv2d)
            padding = {"auto_pad": "SAME_UPPER"} if same else {"pads": layer.padding * 2}
            attributes = {"strides": layer.stride, "dilations": layer.dilation, "group": layer.groups, **padding}
            return "Conv", attributes, [layer.weight, layer.bias]
        case nn.ReLU6():
            return "Clip", {}, [torch.tensor(0.0), torch.tensor(6.0)]
        case nn.ReLU():
            return "Relu", {}, []
        case nn.MaxPool2d():
            sizes = {"kernel_shape": layer.kernel_size, "strides": layer.stride, "pads": layer.padding}
            return "MaxPool", {k: [v] * (4 if k == "pads" else 2) for k, v in sizes.items()}, []
        case nn.Identity():
            return "Identity", {}, []
    raise TypeError(f"no ONNX operator is known for {layer}")
