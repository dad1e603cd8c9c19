"""Seals: a file in a folder with the sizes and checksums of all its other files."""

import json
import pathlib

from alexnet_jax.files import digest, write_text

SEAL = "sha256.json"


def seal(folder: pathlib.Path) -> None:
    """Record every file's size and SHA-256; call once all of them are written."""
    found = {
        str(path.relative_to(folder)): [path.stat().st_size, digest(path)]
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != SEAL
    }
    write_text(folder / SEAL, json.dumps(found, indent=1) + "\n", sync=True)


def is_sealed(folder: pathlib.Path) -> bool:
    return (folder / SEAL).is_file()


def damage(folder: pathlib.Path) -> str | None:
    """The first difference from what was sealed, in words; None if there is none."""
    try:
        found = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        sealed = [(folder / name, name, size, known) for name, (size, known) in found.items()]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{SEAL} cannot be read ({type(error).__name__})"
    for path, name, size, known in sealed:
        try:
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, had {size}"
            if digest(path) != known:
                return f"{name} has another content"
        except FileNotFoundError:
            return f"{name} is missing"
        except (OSError, ValueError) as error:
            return f"{name!r} cannot be read ({error})"
    return None
