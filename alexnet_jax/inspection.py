"""--mode=inspect: a net's layers and counts, and what its split step sends between devices."""

import dataclasses
import functools
import logging
import math
import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from alexnet_jax import config as configs
from alexnet_jax import setup
from alexnet_jax.config import Config, stored_size
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.mesh import make_mesh, start_devices
from alexnet_jax.models.layers import Layer
from alexnet_jax.models.nets import layers
from alexnet_jax.train.calendar import Calendar
from alexnet_jax.train.state import make_apply, placed_shapes, state_shapes

log = logging.getLogger(__name__)
IMAGENET_CLASSES = 1000  # if the config gives no number; the data is not opened
BATCH_SIZE = 2  # per device, of the traced and compiled step; the counts do not depend on it

COLLECTIVE = re.compile(
    r"= .*? (all-gather|reduce-scatter|all-reduce|all-to-all|collective-permute|"
    r"collective-broadcast|ragged-all-to-all)(?:-start)?\(.*"
)
EXPLICIT_GROUPS = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}")
MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}")
IOTA_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")


def collectives(hlo: str, mesh: Mesh) -> dict[str, dict[str, int]]:
    """Counts of a compiled program's collectives by the mesh axis they run over.

    Args:
      hlo: the compiled module's text.
      mesh: `data` x `model`.

    Returns:
      {"model": {"all-gather": 5, ...}, "data": {...}}, and "other" for groups that follow no
      axis. Asynchronous pairs count once; groups of one device, which send nothing, not at all.
    """
    places = np.arange(mesh.devices.size).reshape(mesh.devices.shape)  # HLO numbers by place
    axes = {
        "model": {frozenset(map(int, row)) for row in places},
        "data": {frozenset(map(int, column)) for column in places.T},
    }
    counts: dict[str, Counter] = {"model": Counter(), "data": Counter(), "other": Counter()}
    for line in hlo.splitlines():
        found = COLLECTIVE.search(line)
        if not found:
            continue
        groups = _groups(line) or {frozenset(places.ravel().tolist())}
        if all(len(group) == 1 for group in groups):
            continue
        axis = next((name for name in axes if groups == axes[name]), "other")
        counts[axis][found[1]] += 1
    return {axis: dict(counter) for axis, counter in counts.items() if counter}


def _groups(line: str) -> set[frozenset[int]]:
    """The replica groups of one HLO instruction: explicit, by mesh axes, or as an iota."""
    explicit = EXPLICIT_GROUPS.search(line)
    if explicit:
        groups = re.findall(r"\{([\d,]+)\}", explicit[1])
        return {frozenset(int(number) for number in group.split(",")) for group in groups}
    by_axes = MESH_GROUPS.search(line)
    if by_axes:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", by_axes[1])}
        joined = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", by_axes[2])]
        numbers = np.arange(math.prod(sizes.values())).reshape(*sizes.values())
        numbers = np.moveaxis(numbers, joined, range(-len(joined), 0))
        width = math.prod(numbers.shape[-len(joined) :])
        return {frozenset(map(int, group)) for group in numbers.reshape(-1, width)}
    iota = IOTA_GROUPS.search(line)
    if not iota:
        return set()
    shape, source, order = (
        [int(number) for number in part.split(",")] if part else [] for part in iota.groups()
    )
    numbers = np.arange(math.prod(source)).reshape(source)
    numbers = numbers.transpose(order) if order else numbers
    return {frozenset(map(int, group)) for group in numbers.reshape(shape)}


def exchanged_bytes(traced: jax.stages.Traced) -> list[int]:
    """Bytes each tower sends the other per image, per exchange, in a step's forward pass."""
    sent = []

    def visit(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            if equation.primitive.name.startswith("all_gather"):
                operand = equation.invars[0].aval
                sent.append(operand.size * operand.dtype.itemsize // operand.shape[0])
            for inner in core.jaxprs_in_params(equation.params):
                visit(inner)

    visit(traced.jaxpr)
    return sent


def inspect(config: Config) -> dict[str, Any]:
    """The table of --mode=inspect as nested dicts; sizes per tower, bytes per image and direction.

    The step is compiled for CPU devices: `mesh.data` of them (at least one), or twice as many
    for a net that splits, whatever `mesh.model` says.

    Raises:
      UserError: `mesh.model` is 2, but the net does not split.
    """
    jax.config.update("jax_platforms", "cpu")  # ops choose implementations by platform
    model = config.model
    asked = configs.Mesh(
        model=max(config.mesh.model, 1 + model.splits), data=max(config.mesh.data, 1)
    )
    start_devices(asked.model * asked.data, at_least=True)
    num_classes = model.num_classes or IMAGENET_CLASSES
    if not model.num_classes:
        log.info("model.num_classes is not set: the net is shown with ImageNet's %d", num_classes)
    mesh = make_mesh(asked, model)
    found = layers(model, num_classes)
    reads_both = [layer for layer in found if layer.groups == 1][1:] if model.splits else []
    step, arguments = training_step(config, num_classes, mesh, BATCH_SIZE * asked.data)
    traced = step.trace(*arguments)
    sent = exchanged_bytes(traced) if model.splits else []
    into = dict(zip((layer.name for layer in reads_both), sent))
    hlo = traced.lower().compile().as_text()
    rows = [_row(layer, model.towers, into.get(layer.name, 0)) for layer in found]
    return {
        "preset": model.preset,
        "width": model.width,
        "input_size": model.input_size,
        "num_classes": num_classes,
        "dtype": model.dtype,
        "towers": model.towers,
        "layers": rows,
        "logits": {"exchanged_bytes": sent[-1] if sent else 0},
        "totals": {
            "parameters": sum(layer.parameters for layer in found),
            "multiply_adds": sum(layer.multiply_adds for layer in found),
            "neurons": sum(math.prod(layer.output) for layer in found),
            "exchanged_bytes": sum(sent),
        },
        "mesh": dict(mesh.shape),
        "collectives": collectives(hlo, mesh),
    }


def table(found: dict[str, Any]) -> str:
    """The result of `inspect` as readable text."""
    towers = found["towers"]
    lines = [
        f"preset {found['preset']}, width {found['width']:g}, input {found['input_size']}, "
        f"{found['num_classes']} classes, {found['dtype']}, {towers} tower{'s' * (towers > 1)}",
        "",
        f"{'layer':8}{'output, per tower':>28}{'parameters':>14}{'multiply-adds':>16}"
        f"{'bytes exchanged':>18}",
    ]
    for row in found["layers"]:
        shape, stage = ("x".join(map(str, row[key])) for key in ("output", "stage_output"))
        output = shape if shape == stage else f"{shape} -> {stage}"
        lines.append(
            f"{row['name']:8}{output:>28}{row['parameters']:>14,}{row['multiply_adds']:>16,}"
            f"{row['exchanged_bytes']:>18,}"
        )
    lines.append(f"{'logits':66}{found['logits']['exchanged_bytes']:>18,}")
    totals = found["totals"]
    lines.append(
        f"{'total':36}{totals['parameters']:>14,}{totals['multiply_adds']:>16,}"
        f"{totals['exchanged_bytes']:>18,}"
    )
    lines += [
        "",
        f"Parameters and multiply-adds (per image) are of all towers, which have "
        f"{totals['neurons']:,} neurons.",
        "Bytes are what each tower sends the other per image and direction, before the layer they",
        "stand beside (logits: after fc8), as traced; the CPU backend widens bfloat16 collectives",
        "to float32.",
        "",
        "collectives of the compiled training step, mesh "
        + " x ".join(f"{name}={size}" for name, size in found["mesh"].items())
        + ":",
    ]
    for axis, counts in found["collectives"].items():
        each = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
        lines.append(f"  over {axis}: {each}")
    if not found["collectives"]:
        lines.append("  none")
    return "\n".join(lines)


def _row(layer: Layer, towers: int, exchanged: int) -> dict[str, Any]:
    output, stage = (
        (*shape[:-1], -(-shape[-1] // towers)) for shape in (layer.output, layer.stage_output)
    )
    return {
        "name": layer.name,
        "output": list(output),
        "stage_output": list(stage),
        "parameters": layer.parameters,
        "multiply_adds": layer.multiply_adds,
        "exchanged_bytes": exchanged,
    }


def training_step(
    config: Config, num_classes: int, mesh: Mesh, batch_size: int
) -> tuple[Any, tuple]:
    """The training step, and arguments of the right shapes to trace it with."""
    model, size, stored = (
        config.model,
        config.model.input_size,
        stored_size(config.data, config.model),
    )
    # In one part: a batch of a few rows may not split into more.
    train = dataclasses.replace(config.train, accumulation_steps=1)
    apply = make_apply(model, num_classes, mesh.shape["model"])
    calendar = Calendar(1000, batch_size, 1000)
    step = setup.make_step(apply, dataclasses.replace(config, train=train), mesh, calendar)

    def shaped(spec: P, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    rows = functools.partial(shaped, P("data"))
    batch = {
        "image": rows(jnp.uint8, batch_size, size, size, 3),
        "label": rows(jnp.int32, batch_size),
        "offset": rows(jnp.int32, batch_size, 2),
        "mirror": rows(jnp.bool_, batch_size),
        "shift": rows(jnp.float32, batch_size, 3),
        "gain": rows(jnp.float32, batch_size),
    }
    whole = functools.partial(shaped, P(), jnp.float32)
    statistics = Statistics._make(
        whole(*shape) for shape in ((stored, stored, 3), (3,), (3,), (3, 3))
    )
    state = placed_shapes(state_shapes(model, num_classes), mesh)
    return step, (state, batch, statistics, whole())
