"""Training speed of this machine: input alone, step alone, both, and how long devices wait."""

import collections
import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from alexnet_jax import loop, setup
from alexnet_jax.config import Config, Data, Model
from alexnet_jax.data import augment, images, sources, stream, survey, workers
from alexnet_jax.data.examples import Source
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.mesh import put_batch, put_everywhere, training_mesh
from alexnet_jax.models.nets import layers
from alexnet_jax.train.calendar import Calendar
from alexnet_jax.train.state import initial_state, make_apply, put

SECONDS = 5.0  # minimum length of each measurement
LEAST = 3  # minimum repetitions of each
ENDLESS = 10**9  # steps
STAGE_IMAGES = 256  # timed stage by stage


def bench(config: Config) -> dict[str, Any]:
    """Measure training speed; saves nothing.

    Returns:
      `input`, `step` and `both`, each with images_per_second. `input` also has the rate without
      sending batches to the devices, the rate per worker, and the microseconds an image takes in
      each stage on one core; `both` has `waited`,
      the fraction of its time beyond what the step alone takes; `step` has the fraction that it
      reaches of a matrix product's speed, measured in the same run. As in training, steps are
      dispatched without waiting for the one before.
    """
    mesh, batch_size = training_mesh(config), config.train.batch_size
    source = sources.open_source(config.data, "train")
    config = setup.with_classes(config, source.labels)
    setup.check_parameters(config)
    source, statistics = survey.surveyed(source, config.data, config.model)

    def batches(open_stream: Callable[..., Any] = loop.device_batches) -> contextlib.closing[Any]:
        return contextlib.closing(open_stream(source, statistics, config, mesh, 0, ENDLESS))

    found: dict[str, Any] = {"batch_size": batch_size, "device": jax.devices()[0].device_kind}
    with batches() as stream_of:
        seconds = _seconds_per_batch(stream_of)
        batch = next(stream_of)
    with batches(loop.host_batches) as stream_of:  # whose files are cached by now
        unsent = _seconds_per_batch(stream_of)
    found["input"] = _input(seconds, unsent, batch_size, config.data)
    found["input"]["stages"] = _stages(source, statistics, config, mesh)
    advance = make_advance(config, mesh, statistics, len(source.labels), len(source), batch)
    seconds = _paced(itertools.repeat(batch), advance)
    found["step"] = {"images_per_second": batch_size / seconds, "seconds": seconds}
    with batches() as stream_of:
        jax.block_until_ready([next(stream_of), next(stream_of)])
        together = _paced(stream_of, advance)
    waited = max(0.0, 1 - seconds / together)
    found["both"] = {"images_per_second": batch_size / together, "waited": waited}
    flops = _flops(config.model, len(source.labels))
    found["matmul"] = _matmul_flops_per_second(config.model.dtype, mesh)
    found["step"]["share_of_matmul"] = (
        flops * found["step"]["images_per_second"] / found["matmul"]["flops_per_second"]
    )
    return found


def table(found: dict[str, Any]) -> str:
    """The results of `bench` as readable text."""
    given, stages = found["input"], found["input"]["stages"]
    times = ", ".join(f"{name} {value:.0f}" for name, value in stages.items())
    shared = ", or their cores read images," if found["device"] == "cpu" else ""
    return "\n".join(
        [
            f"{found['device']}, batches of {found['batch_size']}",
            f"input alone   {given['images_per_second']:10,.1f} images/s, "
            f"{given['images_per_second_per_worker']:,.1f} by each of {given['workers']} "
            f"{given['kind']}; {given['unsent_images_per_second']:,.1f} if not sent to the devices",
            f"              microseconds an image, one core: {times}",
            f"step alone    {found['step']['images_per_second']:10,.1f} images/s, "
            f"{found['step']['share_of_matmul']:.0%} of a matrix product's speed",
            f"both          {found['both']['images_per_second']:10,.1f} images/s, "
            f"the devices waited{shared} {found['both']['waited']:.1%} of the time",
        ]
    )


def _seconds_per_batch(batches: Iterator[Any]) -> float:
    """Seconds between batches, two on their way as in training; the first two start the workers."""
    coming = collections.deque([next(batches), next(batches)])
    jax.block_until_ready([*coming])

    def one() -> None:
        coming.append(next(batches))
        jax.block_until_ready(coming.popleft())

    return _repeated(one)


def _input(seconds: float, unsent: float, batch_size: int, data: Data) -> dict[str, Any]:
    """The input stream alone, by the seconds a batch takes to reach the devices and the host."""
    count, kind = workers.count(data.workers), workers.kind(data, ENDLESS * batch_size)
    if data.on_device:
        count, kind = 1, "threads"  # which only says what the devices are to crop
    return {
        "images_per_second": batch_size / seconds,
        "unsent_images_per_second": batch_size / unsent,
        "images_per_second_per_worker": batch_size / seconds / count,
        "workers": count,
        "kind": kind,
    }


def _stages(source: Source, statistics: Statistics, config: Config, mesh: Mesh) -> dict[str, float]:
    """Microseconds an image takes to be read, decoded, augmented and copied to the devices."""
    data, size, count = config.data, config.model.input_size, STAGE_IMAGES
    stored = statistics.stored_size
    indices = stream.examples_at(config.seed, 0, count, len(source))
    batch = np.empty((count, size, size, 3), np.uint8)
    clock = [time.perf_counter()]
    draws = augment.draw(config.seed, 0, count, stored - size, data)
    augment.colour_shift(draws.colour, statistics, data.colour_noise)
    clock.append(time.perf_counter())
    for index, offset, mirror, out in zip(indices, draws.offset, draws.mirror, batch):
        example = source.read(int(index))
        clock.append(time.perf_counter())
        image = images.decode(example.data, example.name, fleeting=True)
        clock.append(time.perf_counter())
        images.crop(image, stored, offset, mirror, out)
        clock.append(time.perf_counter())
    times = np.diff(clock) / count * 1e6
    read, decode, crop = times[1:].reshape(count, 3).sum(0)
    rows = batch[: count // mesh.shape["data"] * mesh.shape["data"]]
    for _ in range(2):  # the first touches memory for the first time
        started = time.perf_counter()
        jax.block_until_ready(put_batch({"image": rows}, mesh))
        copy = (time.perf_counter() - started) / count * 1e6
    stages = {"read": read, "decode": decode, "augment": times[0] + crop, "copy": copy}
    return {name: float(microseconds) for name, microseconds in stages.items()}


def make_advance(
    config: Config,
    mesh: Mesh,
    statistics: Statistics,
    num_classes: int,
    num_examples: int,
    batch: Any,
) -> Callable[[Any], Any]:
    """A compiled, warmed-up function that trains on a batch; its result is ready after the step."""
    calendar = Calendar(num_examples, config.train.batch_size, ENDLESS)
    apply = make_apply(config.model, num_classes, mesh.shape["model"])
    step = setup.make_step(apply, config, mesh, calendar)
    state = put(initial_state(config.model, num_classes, config.seed), mesh)
    scale = jnp.float32(1e-6)  # multiplies the learning rate, so that weights hardly move

    everywhere = put_everywhere(statistics, mesh)

    def advance(batch: Any) -> Any:
        nonlocal state
        state, results = step(state, batch, everywhere, scale)
        return results

    jax.block_until_ready(advance(batch))
    return advance


def _paced(batches: Iterator[Any], advance: Callable[[Any], Any]) -> float:
    """Seconds per step, dispatched at most two steps ahead."""
    sent: collections.deque[Any] = collections.deque()
    batch = next(batches)
    started, count = time.perf_counter(), 0
    while count < LEAST or time.perf_counter() - started < SECONDS:
        sent.append(advance(batch))
        batch = next(batches)  # sent to the devices while the step runs
        count += 1
        if len(sent) > 2:
            jax.block_until_ready(sent.popleft())
    jax.block_until_ready([*sent])
    return (time.perf_counter() - started) / count


def _flops(model: Model, num_classes: int) -> int:
    """FLOPs of training on one image: forward, and backward to inputs and to weights."""
    net = layers(model, num_classes)
    forward = [2 * layer.multiply_adds for layer in net]
    return 3 * sum(forward) - forward[0]  # the gradient of the image is not needed


def _matmul_flops_per_second(dtype: str, mesh: Mesh) -> dict[str, float]:
    """FLOP/s of a large matrix product, one device's times the mesh's devices; and its size."""
    on_cpu = jax.default_backend() == "cpu"  # whose virtual devices share the cores
    size = 2048 if on_cpu else 8192
    matrix = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(matrix, matrix))
    seconds = _repeated(lambda: jax.block_until_ready(product(matrix, matrix)))
    devices = 1 if on_cpu else mesh.size
    return {"flops_per_second": 2 * size**3 / seconds * devices, "size": size}


def _repeated(work: Callable[[], Any]) -> float:
    """Seconds per call, averaged over at least LEAST calls and at least SECONDS."""
    started, count = time.perf_counter(), 0
    while count < LEAST or time.perf_counter() - started < SECONDS:
        work()
        count += 1
    return (time.perf_counter() - started) / count
