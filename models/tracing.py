"""What a network does, layer by layer: to merge layers, and to write it in another form."""

from collections import Counter

from torch import fx, nn
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
