"""What layers compute: pure functions on one device's arrays."""

from alexnet_jax.ops.activation import activation
from alexnet_jax.ops.bias import add_bias
from alexnet_jax.ops.convolution import Padding, conv, groups_at_once
from alexnet_jax.ops.dense import dense
from alexnet_jax.ops.dropout import dropout, keep_mask
from alexnet_jax.ops.normalisation import local_response_norm, spatial_response_norm
from alexnet_jax.ops.pooling import max_pool, mean_pool, pooled_size
from alexnet_jax.ops.stage import relu_lrn_pool

__all__ = [
    "Padding",
    "activation",
    "add_bias",
    "conv",
    "dense",
    "dropout",
    "groups_at_once",
    "keep_mask",
    "local_response_norm",
    "max_pool",
    "mean_pool",
    "pooled_size",
    "relu_lrn_pool",
    "spatial_response_norm",
]
