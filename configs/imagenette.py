"""Imagenette, ten classes of ImageNet, at the paper's size.

    python -m alexnet_jax.main --config=configs/imagenette.py --workdir=runs/imagenette

Not measured.
"""

from alexnet_jax.config import blank


def get_config():
    config = blank()
    config.model.preset = "paper"
    config.data.source = "tfds:imagenette"
    config.optim.schedule = "cosine"
    config.train.num_epochs = 60
    return config
