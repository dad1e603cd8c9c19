"""The house: every module imports only from modules below it, at the top of the file."""

import ast
import pathlib

import alexnet_jax

ROOT = pathlib.Path(alexnet_jax.__file__).parent

# Bottom first.
ROOMS = (
    "__init__",
    "errors",
    "config",
    "files",
    "seals",
    "cluster",
    "interrupts",
    "command",
    "compiled",
    "ops.native",
    "ops.gpu",
    "ops.varying",
    "ops.activation",
    "ops.bias",
    "ops.convolution",
    "ops.dense",
    "ops.pooling",
    "ops.normalisation",
    "ops.stage",
    "ops.dropout",
    "ops",
    "metrics",
    "mesh",
    "data.workers",
    "data.buffers",
    "data.examples",
    "data.native",
    "data.images",
    "data.statistics",
    "data.augment",
    "data.shapes",
    "data.records",
    "data.sources",
    "data.tars",
    "data.imagenet",
    "data.stream",
    "data.survey",
    "data.inputs",
    "data.prepare",
    "models.layers",
    "models.alexnet",
    "models.cifar",
    "models.nets",
    "train.pixels",
    "train.calendar",
    "train.optim",
    "train.state",
    "train.step",
    "checkpoint",
    "workdir",
    "report",
    "validate",
    "predict",
    "evaluate",
    "figures",
    "gallery",
    "resident",
    "setup",
    "loop",
    "bench",
    "inspection",
    "main",
    "studies",
    "tables",
    "study",
    "prepare",
)


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        name = name if name == "__init__" else name.removesuffix(".__init__")
        if path.stat().st_size:
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imported(tree: ast.AST) -> set[str]:
    """Names of this package's modules that a tree imports."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    own = {name.removeprefix("alexnet_jax.") for name in names if name.startswith("alexnet_jax.")}
    return own & set(ROOMS)


def test_every_module_has_its_room():
    assert sorted(modules()) == sorted(ROOMS)


def test_imports_point_down():
    for name, tree in modules().items():
        above = {other for other in imported(tree) if ROOMS.index(other) >= ROOMS.index(name)}
        assert not above, f"{name} imports {above}"


def test_own_modules_are_imported_at_the_top_of_a_file():
    for name, tree in modules().items():
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert imported(tree) == set().union(*(imported(node) for node in top)), name
