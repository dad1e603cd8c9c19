"""The net that a config names, behind one interface."""

from alexnet_jax.config import Model
from alexnet_jax.errors import UserError
from alexnet_jax.models import alexnet, cifar
from alexnet_jax.models.layers import Layer


def layers(config: Model, num_classes: int) -> tuple[Layer, ...]:
    """The net's weight layers, in order, with every shape.

    Raises:
      UserError: the input is so small that a map would shrink below 1.
    """
    shapes = {"alexnet": alexnet.shapes, "cifar": cifar.shapes}[config.net]

    def fits(found: tuple[Layer, ...]) -> bool:
        return min(extent for layer in found for extent in layer.output + layer.stage_output) > 0

    found = shapes(config, num_classes, config.input_size)
    if fits(found):
        return found
    least = next(size for size in range(1, 4096) if fits(shapes(config, num_classes, size)))
    raise UserError(
        f"model.input_size={config.input_size}: a map would shrink below 1 pixel; "
        f"the least input is {least}: set --config.model.input_size={least} or more"
    )


def make_net(config: Model, num_classes: int, shards: int) -> alexnet.AlexNet | cifar.Cifar:
    """The net's module on one device of `shards`, all parameters 0."""
    if config.net == "cifar":
        return cifar.Cifar(config, num_classes)
    return alexnet.AlexNet(config, num_classes, shards)
