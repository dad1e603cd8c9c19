"""The paper's net on ImageNet 2012, its two towers on two devices.

    python -m alexnet_jax.main --config=configs/alexnet.py --workdir=runs/alexnet

Needs two devices, or pairs of them; on one, add --config.mesh.model=1. Not measured: ImageNet has
to be downloaded by hand, and training needs a GPU. The paper reports 40.7 % top-1 and 18.2 % top-5
validation error with ten crops (--mode=eval --config.eval.num_crops=10), after 90 epochs.
"""

from alexnet_jax.config import blank


def get_config():
    config = blank()
    config.model.preset = "paper"
    config.model.num_classes = 1000
    config.data.source = "tfds:imagenet2012"
    config.mesh.model = 2
    return config
