"""The net that a config names, behind one interface."""

from alexnet_jax.config import Model
from alexnet_jax.errors import UserError
from alexnet_jax.models import alexnet, cifar
from alexnet_jax.models.layers import Layer

LARGEST = 4096  # pixels a side, of the inputs that an error names


def layers(config: Model, num_classes: int) -> tuple[Layer, ...]:
    """The net's weight layers, in order, with every shape.

    Raises:
      UserError: the input is so small that a map would shrink below 1 pixel.
    """
    shapes = {"alexnet": alexnet.shapes, "cifar": cifar.shapes}[config.net]

    def fits(found: tuple[Layer, ...]) -> bool:
        return min(extent for layer in found for extent in layer.output + layer.stage_output) > 0

    found = shapes(config, num_classes, config.input_size)
    if fits(found):
        return found
    sizes = range(config.input_size + 1, LARGEST)
    least = next((size for size in sizes if fits(shapes(config, num_classes, size))), None)
    way_out = (
        f"the least input is {least}: set --config.model.input_size={least} or more"
        if least
        else "make windows and strides smaller"
    )
    raise UserError(
        f"model.input_size={config.input_size}: a map would shrink below 1 pixel; {way_out}"
    )


def make_net(config: Model, num_classes: int, shards: int) -> alexnet.AlexNet | cifar.Cifar:
    """The net's module on one device of `shards`; its parameters are placeholders."""
    if config.net == "cifar":
        return cifar.Cifar(config, num_classes)
    return alexnet.AlexNet(config, num_classes, shards)
