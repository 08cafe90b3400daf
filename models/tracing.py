"""What a network does, layer by layer: to merge layers, and to write it in another form."""

import operator
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.efficientnet_lite import SameConv2d


class UnknownLayer(TypeError):
    """A network does something that cannot be followed, or has no translation."""


def trace(backbone: nn.Module) -> fx.Graph:
    """The steps of a network, torch's own layers whole. Raises :class:`UnknownLayer` if images decide on them."""
    try:
        return _Tracer().trace(backbone)
    except Exception as error:  # another library's forward, run on stand-ins for tensors, may raise anything
        raise UnknownLayer(f"{type(backbone).__name__} cannot be traced") from error


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, (SameConv2d, nn.BatchNorm2d)) or super().is_leaf_module(module, name)


def fold_batch_norms(backbone: nn.Module) -> nn.Module:
    """Merge, in place, each batch norm into the convolution before it, if nothing else takes what that gives.

    A network of which that cannot be told, since what it does depends on the images, is left as it is.
    """
    try:
        steps = trace(backbone).nodes
    except UnknownLayer:
        return backbone
    layers = dict(backbone.named_modules())
    uses = Counter(step.target for step in steps if step.op == "call_module")
    for step in steps:
        before = step.all_input_nodes[0] if step.op == "call_module" and len(step.all_input_nodes) == 1 else step
        if before.op != "call_module" or len(before.users) > 1 or uses[step.target] > 1 or uses[before.target] > 1:
            continue
        convolution, norm = layers[before.target], layers[step.target]
        # Of convolutions only those that use their weights as they are.
        if type(convolution) not in (nn.Conv2d, SameConv2d) or not isinstance(norm, nn.BatchNorm2d):
            continue
        if type(norm) is nn.BatchNorm2d:
            rest = nn.Identity()
        elif isinstance(getattr(norm, "drop", None), nn.Identity):  # timm's, with an activation in it
            rest = norm.act
        else:
            continue
        backbone.set_submodule(before.target, fuse_conv_bn_eval(convolution, norm))
        backbone.set_submodule(step.target, rest)
    return backbone


class FusedConv(nn.Module):
    """A convolution, what is added to it if anything, and ReLU: on an NVIDIA GPU in one step of cuDNN's."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        own = self.convolution
        if not x.is_cuda:
            return F.relu(own(x) if added is None else own(x) + added)
        layout = own.stride, own.padding, own.dilation, own.groups
        if added is None:
            return torch.cudnn_convolution_relu(x, own.weight, own.bias, *layout)
        return torch.cudnn_convolution_add_relu(x, own.weight, added, 1.0, own.bias, *layout)


def fuse_relu(backbone: nn.Module) -> nn.Module:
    """A network whose batch norms are folded, with each ReLU in the step of the convolution before it.

    Of single images a GPU is done so soon that what counts is the number of steps. A network of which it cannot be told
    what it does is given back as it is.
    """
    try:
        graph = trace(backbone)
    except UnknownLayer:
        return backbone
    network, layers = fx.GraphModule(backbone, graph), dict(backbone.named_modules())

    def is_layer(step: fx.Node, *kinds: type[nn.Module]) -> bool:
        return step.op == "call_module" and type(layers[step.target]) in kinds

    for step in list(graph.nodes):
        if is_layer(step, nn.Identity):
            step.replace_all_uses_with(step.args[0])
            graph.erase_node(step)
    for step in list(graph.nodes):
        if not (is_layer(step, nn.ReLU) or step.target in (torch.relu, F.relu)):
            continue
        before, added = step.args[0], ()
        steps = [step, before]
        if before.target in (operator.add, operator.iadd, torch.add) and len(before.users) == 1:
            first, second = before.args
            if isinstance(first, fx.Node) and isinstance(second, fx.Node):
                before, added = (first, (second,)) if is_layer(first, nn.Conv2d) else (second, (first,))
                steps.append(before)
        if not is_layer(before, nn.Conv2d) or len(before.users) > 1 or not _plain(layers[before.target]):
            continue
        name = f"fused_{before.name}"
        network.add_module(name, FusedConv(layers[before.target]))
        with graph.inserting_before(step):
            step.replace_all_uses_with(graph.call_module(name, (before.args[0], *added)))
        for each in steps:
            graph.erase_node(each)
    network.recompile()
    return network


def _plain(convolution: nn.Conv2d) -> bool:
    """Whether it has what cuDNN's fused step asks for: a bias, and padding by zeros that is given in pixels."""
    return convolution.bias is not None and convolution.padding_mode == "zeros" and convolution.padding != "same"
