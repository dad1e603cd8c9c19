"""The steps that follow the first two convolutions of the paper, fused."""

import functools

import jax
from jax import Array

import alexnet_jax.ops.gpu as gpu
import alexnet_jax.ops.native as native
from alexnet_jax.ops.activation import activation
from alexnet_jax.ops.normalisation import local_response_norm
from alexnet_jax.ops.pooling import max_pool, max_pool_with_argmax, pooled_size


def relu_lrn_pool(
    x: Array,
    *,
    size: int,
    k: float,
    alpha: float,
    beta: float,
    groups: int,
    window: int,
    stride: int,
) -> Array:
    """`max_pool` of `local_response_norm` of the rectified x.

    Args:
      x: (b, h, w, c), any float dtype.
      size, k, alpha, beta, groups: of `local_response_norm`.
      window, stride: of `max_pool`.

    Returns:
      (b, h', w', c) of x's dtype. Of the intermediate results, a GPU keeps only where the
      maxima were, and the rectifier takes no extra pass over memory. A CPU's kernel keeps nothing
      but x. By either it can be differentiated once.
    """
    if beta == 0.75 and x.shape[-1] % groups == 0 and native.available(x):
        return _by_images(x, native.Rule(groups, size, float(k), float(alpha)), window, stride)
    if gpu.available(x.shape, groups=groups, size=size, beta=beta):
        return _in_one(x, gpu.Rule(size, k, alpha, groups, rectify=True), window, stride)
    x = activation(x, "relu")
    x = local_response_norm(x, size=size, k=k, alpha=alpha, beta=beta, groups=groups)
    return max_pool(x, window, stride)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _by_images(x: Array, rule: native.Rule, window: int, stride: int) -> Array:
    """With a power of 3/4, one group of one image at a time."""
    rows, columns = (pooled_size(side, window, stride) for side in x.shape[1:3])
    shape = (x.shape[0], rows, columns, x.shape[3])
    return native.call("stage", shape, x, **rule._asdict(), window=window, stride=stride)


def _images_backward(rule, window, stride, x, dy):
    attributes = {**rule._asdict(), "window": window, "stride": stride}
    return (native.call("stage_gradient", x.shape, x, dy, **attributes),)


_by_images.defvjp(lambda x, *rule: (_by_images(x, *rule), x), _images_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _in_one(x: Array, rule: gpu.Rule, window: int, stride: int) -> Array:
    return _forward(x, rule, window, stride)[0]


def _forward(x, rule, window, stride):
    y, argmax = max_pool_with_argmax(gpu.normalise(x, rule), window, stride)
    return y, (x, argmax)


def _backward(rule, window, stride, residuals, dy):
    x, argmax = residuals
    dy = gpu.pool_gradient(dy, argmax, window, stride, x.shape[1:3])
    return (gpu.normalise_gradient(x, dy, rule),)


_in_one.defvjp(_forward, _backward)
