"""The paper's figure 1: a four-layer net on unmodified CIFAR-10, without regularisation.

    python -m alexnet_jax.study --study=figure1 --config=configs/figure1.py --workdir=DIR

trains it with ReLU and with tanh, each at the best of five learning rates after six epochs. ReLU
reached 25 % training error after 6.82 epochs (rate .003), tanh after 45.23 (rate .01), 6.6 times as
many. The study took 2 h 10 min on one CPU core that did other work besides; for ReLU alone,
`--variants=relu --config.train.num_epochs=10` is enough. A single net, at the preset's rate of
.001:

    python -m alexnet_jax.main --config=configs/figure1.py --workdir=runs/figure1
"""

from alexnet_jax.config import blank


def get_config():
    config = blank()
    config.model.preset = "cifar"
    config.mesh.cpu_devices = 2
    config.data.source = "tfds:cifar10"
    config.train.num_epochs = 51
    return config
