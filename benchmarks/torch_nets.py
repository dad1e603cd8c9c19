"""The paper's net and its update written for speed in PyTorch: what the benchmarks run against.

The same mathematics as preset `paper`: two towers, normalisation within each, dropout without
rescaling, biases at twice the rate and without decay. Only for measuring; `against_pytorch.py`
compares values.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812  (so PyTorch calls it)
from torch import Tensor, nn

LEARNING_RATE = 0.0  # the same work, and the net stays as it is


def configure() -> str:
    """PyTorch's fast settings, and the device it will use."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    return "cuda" if torch.cuda.is_available() else "cpu"


class Paper(nn.Module):
    """(b, 224, 224, 3) uint8 and colour shifts (b, 3) -> (b, classes) logits."""

    mean: Tensor
    band1: Tensor
    band2: Tensor

    def __init__(self, memory_format: torch.memory_format, classes: int = 1000):
        super().__init__()
        self.memory_format = memory_format
        self.register_buffer("band1", band(48))
        self.register_buffer("band2", band(128))
        self.register_buffer("mean", torch.full((1, 3, 224, 224), 120.0))
        self.conv1 = nn.Conv2d(3, 96, 11, 4)
        self.conv2 = nn.Conv2d(96, 256, 5, padding=2, groups=2)
        self.conv3 = nn.Conv2d(256, 384, 3, padding=1)
        self.conv4 = nn.Conv2d(384, 384, 3, padding=1, groups=2)
        self.conv5 = nn.Conv2d(384, 256, 3, padding=1, groups=2)
        self.fc6 = nn.Linear(9216, 4096)
        self.fc7 = nn.Linear(4096, 4096)
        self.fc8 = nn.Linear(4096, classes)

    def forward(self, images: Tensor, shift: Tensor) -> Tensor:
        x = images.permute(0, 3, 1, 2) + shift[:, :, None, None] - self.mean
        x = F.pad(x, (0, 3, 0, 3)).contiguous(memory_format=self.memory_format)
        x = F.max_pool2d(response_norm(F.relu(self.conv1(x)), self.band1), 3, 2)
        x = F.max_pool2d(response_norm(F.relu(self.conv2(x)), self.band2), 3, 2)
        x = F.relu(self.conv3(x))
        x = F.relu(self.conv4(x))
        x = F.max_pool2d(F.relu(self.conv5(x)), 3, 2)
        x = self.drop(F.relu(self.fc6(x.flatten(1))))
        x = self.drop(F.relu(self.fc7(x)))
        return self.fc8(x)

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5) * 0.5 if self.training else x * 0.5


def band(maps: int) -> Tensor:
    """(2 * maps, maps, 1, 1): ones where maps of a tower are at most 2 apart."""
    near = (torch.arange(maps)[:, None] - torch.arange(maps)).abs() <= 2
    return near.float().repeat(2, 1)[:, :, None, None]


def response_norm(x: Tensor, band: Tensor) -> Tensor:
    """Within each tower, in the layout x has.

    `F.local_response_norm` needs the towers in a layout of their own, and was slower in every form.
    """
    total = 2 + 1e-4 * F.conv2d(x * x, band.to(x.dtype), groups=2)
    return x * (total.rsqrt() * total.sqrt().rsqrt()).to(x.dtype)


def make_step(
    batch: int, device: str, form: str, autocast: bool, training: bool
) -> Callable[[], None]:
    """A training step or an evaluation of one batch, run again at each call, waited for.

    Args:
      form: of `eager`, `channels_last`, `compile`, `compile+channels_last`.
      autocast: products in bfloat16, parameters in float32.
    """
    torch.manual_seed(0)
    last = "channels_last" in form
    memory_format = torch.channels_last if last else torch.contiguous_format
    net = Paper(memory_format).to(device, memory_format=memory_format).train(training)
    images = torch.randint(0, 256, (batch, 224, 224, 3), dtype=torch.uint8, device=device)
    shift = torch.randn(batch, 3, device=device)
    labels = torch.randint(0, 1000, (batch,), device=device)
    kernels = [p for name, p in net.named_parameters() if name.endswith("weight")]
    biases = [p for name, p in net.named_parameters() if name.endswith("bias")]
    groups = [
        {"params": kernels, "weight_decay": 0.0005},
        {"params": biases, "lr": 2 * LEARNING_RATE},
    ]
    optimizer = torch.optim.SGD(groups, lr=LEARNING_RATE, momentum=0.9, fused=True)

    def loss_of(images: Tensor, shift: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            logits = net(images, shift)
        return F.cross_entropy(logits.float(), labels)

    run = torch.compile(loss_of) if "compile" in form else loss_of

    def train() -> None:
        optimizer.zero_grad(set_to_none=True)
        run(images, shift).backward()
        optimizer.step()

    @torch.no_grad()
    def evaluate() -> None:
        run(images, shift)

    def step() -> None:
        (train if training else evaluate)()
        if device == "cuda":
            torch.cuda.synchronize()

    return step
