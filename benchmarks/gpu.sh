#!/usr/bin/env bash
# All measurements for a GPU, on a machine that may have no network.
#
#   benchmarks/gpu.sh OUT [PART ...] [--tiny] [--limit=SECONDS] [--work=FOLDER]
#   benchmarks/gpu.sh OUT train --caltech101=folder:PATH --cifar10=records:PATH
#
# Writes OUT/results.json and OUT/results.md, the results; OUT/parts holds the pieces they are made
# of. benchmarks/gpu.py lists the parts. JAX with CUDA, Flax, Optax and Orbax must be installed, and
# PyTorch for comparisons. Other missing packages are installed from WHEELS (default: wheels/ in the
# repository) into a virtual environment at VENV, which sees everything that PYTHON (default:
# python3) sees. To fetch the wheels, where there is a network, for a machine with Python 3.12:
#
#   pip download --no-deps --only-binary=:all: --python-version=3.12 --implementation=cp \
#     --platform=manylinux_2_28_x86_64 --platform=manylinux_2_17_x86_64 -d wheels \
#     grain array_record cloudpickle ml_collections simplejpeg tensorboardX portpicker \
#     importlib_resources
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
wheels=${WHEELS:-$root/wheels}
venv=${VENV:-${TMPDIR:-/tmp}/alexnet_jax_gpu}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

whole() { "$1" -c 'import alexnet_jax.main, alexnet_jax.prepare' 2>/dev/null; }

needs() { # the package's dependencies that PYTHON lacks, one a line
  "$python" -c 'import importlib.metadata, re, sys, tomllib
for need in tomllib.load(open(sys.argv[1], "rb"))["project"]["dependencies"]:
    try: importlib.metadata.version(re.match(r"[\w.-]+", need)[0])
    except importlib.metadata.PackageNotFoundError: print(need)' "$root/pyproject.toml"
}

if ! whole "$python"; then
  mapfile -t needed < <(needs)
  if ! [[ -d $wheels ]]; then
    echo "error: WHEELS=$wheels is no folder; in it are needed:" >&2
    printf '  %s\n' "${needed[@]}" >&2
    exit 2
  fi
  # --system-site-packages alone would miss PYTHON's packages if PYTHON is itself a venv's.
  "$python" -m venv --without-pip --system-site-packages "$venv"
  "$python" -c 'import site, sys
for folder in site.getsitepackages(): print(f"import site; site.addsitedir({folder!r})")' \
    >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/parent.pth"
  python=$venv/bin/python
  install=("$python" -m pip install --quiet --no-index --only-binary=:all: --disable-pip-version-check)
  "${install[@]}" --find-links="$wheels" "${needed[@]}" ||
    "${install[@]}" --no-deps "$wheels"/*.whl # what pip finds missing may be unused
  whole "$python" || { "$python" -c 'import alexnet_jax.main, alexnet_jax.prepare'; exit 2; }
fi
exec "$python" "$root/benchmarks/gpu.py" "$@"
