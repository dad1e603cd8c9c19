"""A narrow two-tower net on Caltech-101, or any folder of class folders.

    python -m alexnet_jax.main --config=configs/caltech101.py --workdir=runs/caltech101 \\
        --config.data.source=folder:PATH

Reached 23.5 % top-1 validation error on 12 of the classes (812 training images) after 90 epochs, in
less than three minutes on two CPU cores. Not measured on all 102 classes, which TFDS provides.
"""

from alexnet_jax.config import blank


def get_config():
    config = blank()
    config.model.preset = "paper"
    config.model.width = 0.5
    config.model.input_size = 112
    config.mesh.model = 2
    config.mesh.cpu_devices = 2
    config.data.source = "tfds:caltech101"
    config.optim.schedule = "cosine"
    config.train.batch_size = 32
    config.train.num_epochs = 90
    return config
