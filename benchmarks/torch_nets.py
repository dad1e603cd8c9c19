"""The paper's net and its update in PyTorch, written for speed: what the benchmarks compare with.

The same mathematics as preset `paper`: two towers, normalisation within each, dropout without
rescaling, biases at twice the rate and without decay. Only for timing; `against_pytorch.py`
compares values.
"""

import platform
from collections.abc import Sequence
from typing import Any

import timing
import torch
import torch.nn.functional as F  # noqa: N812  (so PyTorch calls it)
from torch import Tensor, nn

LEARNING_RATE = 0.0  # the same work, but the net does not change


def configure(dtype: str = "tf32") -> str:
    """Set PyTorch's fast options; the device it will use. On a GPU `float32` forbids TF32."""
    exact = dtype == "float32" and torch.cuda.is_available()
    torch.set_float32_matmul_precision("highest" if exact else "high")
    torch.backends.cudnn.allow_tf32 = not exact
    torch.backends.cudnn.benchmark = True
    return "cuda" if torch.cuda.is_available() else "cpu"


def work(call: Any, device: str) -> timing.Work:
    """A call to be timed."""
    if device == "cpu":
        return timing.Work(call, lambda _: None)
    return timing.Work(call, lambda _: torch.cuda.synchronize(), rest=torch.cuda.empty_cache)


class Paper(nn.Module):
    """(b, size, size, 3) uint8 and colour shifts (b, 3) -> (b, classes) logits."""

    mean: Tensor
    band1: Tensor
    band2: Tensor

    def __init__(
        self,
        form: str,
        classes: int = 1000,
        size: int = 224,
        widths: Sequence[int] = (96, 256, 384, 384, 256, 4096, 4096),
    ):
        super().__init__()
        self.memory_format, self.shifts = memory_format(form), "shifts" in form
        self.towers = 2 if "towers" in form else 1  # apart, or as groups of one array
        c1, c2, c3, c4, c5, f6, f7 = widths
        self.overhang = (11 - size) % 4
        side = (size + self.overhang - 11) // 4 + 1
        for _ in range(3):
            assert side % 2, (
                f"at {size} pixels a pool would overhang its map, which is not done here"
            )
            side = side // 2
        self.register_buffer("band1", band(c1 // 2))
        self.register_buffer("band2", band(c2 // 2))
        self.register_buffer("mean", torch.full((1, 3, size, size), 120.0))
        self.conv1 = nn.Conv2d(3, c1, 11, 4)
        self.conv2 = nn.Conv2d(c1, c2, 5, padding=2, groups=2)
        self.conv3 = nn.Conv2d(c2, c3, 3, padding=1)
        self.conv4 = nn.Conv2d(c3, c4, 3, padding=1, groups=2)
        self.conv5 = nn.Conv2d(c4, c5, 3, padding=1, groups=2)
        self.fc6 = nn.Linear(side * side * c5, f6)
        self.fc7 = nn.Linear(f6, f7)
        self.fc8 = nn.Linear(f7, classes)

    def forward(self, images: Tensor, shift: Tensor) -> Tensor:
        x = images.permute(0, 3, 1, 2) + shift[:, :, None, None] - self.mean
        x = F.pad(x, (0, self.overhang, 0, self.overhang)).contiguous(
            memory_format=self.memory_format
        )
        x = space_to_depth(self.conv1, x) if self.towers == 2 else self.conv1(x)
        parts = x.chunk(self.towers, 1)
        parts = [F.max_pool2d(self.norm(F.relu(part), self.band1), 3, 2) for part in parts]
        parts = apart(self.conv2, parts)
        parts = [F.max_pool2d(self.norm(F.relu(part), self.band2), 3, 2) for part in parts]
        x = F.relu(self.conv3(torch.cat(parts, 1) if self.towers == 2 else parts[0]))
        parts = [F.relu(part) for part in apart(self.conv4, x.chunk(self.towers, 1))]
        parts = [F.max_pool2d(F.relu(part), 3, 2) for part in apart(self.conv5, parts)]
        x = torch.cat(parts, 1) if self.towers == 2 else parts[0]
        x = self.drop(F.relu(self.fc6(x.flatten(1))))
        x = self.drop(F.relu(self.fc7(x)))
        return self.fc8(x)

    def norm(self, x: Tensor, band: Tensor) -> Tensor:
        """Of both towers, or of one if they are apart."""
        groups = 2 // self.towers
        if self.shifts:
            return response_norm_by_shifts(x, groups)
        return response_norm(x, band[: x.shape[1]], groups)

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5) * 0.5 if self.training else x * 0.5


def band(maps: int) -> Tensor:
    """(2 * maps, maps, 1, 1): ones where maps of one tower are at most 2 apart."""
    near = (torch.arange(maps)[:, None] - torch.arange(maps)).abs() <= 2
    return near.float().repeat(2, 1)[:, :, None, None]


def space_to_depth(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """conv1 as a 3x3 convolution over blocks of 4x4 pixels, whose twelfth row and column are 0."""
    sides = [0, -x.shape[3] % 4, 0, -x.shape[2] % 4]
    blocks = F.pixel_unshuffle(F.pad(x, sides), 4)
    return F.conv2d(blocks, F.pixel_unshuffle(F.pad(conv.weight, (0, 1, 0, 1)), 4), conv.bias)


def apart(conv: nn.Conv2d, parts: Sequence[Tensor]) -> list[Tensor]:
    """A convolution of two groups, each of its own array; or of one array that holds both."""
    if len(parts) == 1:
        return [conv(parts[0])]
    leaves = zip(parts, conv.weight.chunk(2), conv.bias.chunk(2))
    return [F.conv2d(x, weight, bias, padding=conv.padding) for x, weight, bias in leaves]


def response_norm(x: Tensor, band: Tensor, groups: int) -> Tensor:
    """Within each tower, in the layout of x.

    `F.local_response_norm` needs a different layout of the towers, and was slower in every form.
    """
    total = 2 + 1e-4 * F.conv2d(x * x, band.to(x.dtype), groups=groups)
    return x * (total.rsqrt() * total.sqrt().rsqrt()).to(x.dtype)


def response_norm_by_shifts(x: Tensor, groups: int) -> Tensor:
    """The same as sums of shifted squares, in float32, which `torch.compile` can fuse."""
    maps = x.shape[1] // groups
    squares = F.pad(x.float().square().unflatten(1, (groups, maps)), (0, 0, 0, 0, 2, 2))
    total = 2 + 1e-4 * sum(squares.narrow(2, shift, maps) for shift in range(5))
    return x * (total.rsqrt() * total.sqrt().rsqrt()).flatten(1, 2).to(x.dtype)


def memory_format(form: str) -> torch.memory_format:
    last = "channels_last" in form or "graphs" in form
    return torch.channels_last if last else torch.contiguous_format


def compiled(call: Any, form: str) -> Any:
    """A function or a net, compiled if the form says so."""
    if "graphs" in form:
        return torch.compile(call, mode="reduce-overhead")
    return torch.compile(call) if "compile" in form else call


def make_step(batch: int, form: str, dtype: str, training: bool) -> tuple[timing.Work, str]:
    """A repeatable training step or evaluation of one batch, and the device's name.

    Args:
      form: one of `train_step.FORMS`.
      dtype: one of `timing.DTYPES`; parameters are always float32, and `bfloat16` is autocast.
    """
    torch.manual_seed(0)
    device = configure(dtype)
    net = Paper(form).train(training)
    net.to(device, memory_format=net.memory_format)
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
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = net(images, shift)
        return F.cross_entropy(logits.float(), labels)

    run = compiled(loss_of, form)

    def train() -> None:
        optimizer.zero_grad(set_to_none=True)
        run(images, shift).backward()
        optimizer.step()

    @torch.no_grad()
    def evaluate() -> None:
        run(images, shift)

    name = platform.machine() if device == "cpu" else torch.cuda.get_device_name()
    return work(train if training else evaluate, device), name
