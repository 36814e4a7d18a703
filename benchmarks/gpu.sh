#!/usr/bin/env bash
# Tests and benchmarks on a GPU in 8 minutes, on a machine that may have no network. README.md beside this has more.
#
#   benchmarks/gpu.sh [--device cuda|cpu] [--wheels FOLDER] [--out FOLDER] [--seconds 480]
#   benchmarks/gpu.sh --collect FOLDER [--python VERSION] [--have FILE]
set -u -o pipefail

# What the tests and benchmarks import, and what builds fxmse; torch is the machine's.
REQUIREMENTS=(compressed-tensors llmcompressor==0.14.0.1 pyyaml safetensors tabulate tqdm
    expecttest hypothesis pytest pytest-xdist "setuptools>=77")
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}

fail() {
    echo "gpu.sh: $*" >&2
    exit 2
}

# Downloads wheels of the requirements and of all that they need, but torch with what comes with it, and what the file
# $3 names, one package a line (as pip freeze prints them).
collect() {
    local folder=$1 version=$2 have=$3 report packages
    report=$(mktemp)
    local for_version=(--python-version "$version" --only-binary :all:)
    "$PYTHON" -m pip install --quiet --dry-run --ignore-installed --report "$report" --target "$report.none" \
        "${for_version[@]}" -c "$REPOSITORY/constraints.txt" "${REQUIREMENTS[@]}" || fail "pip found no versions"
    mapfile -t packages < <("$PYTHON" - "$report" "$have" <<'PYTHON'
import json, re, sys

def canonical(name):
    return re.sub(r"[-_.]+", "-", re.split(r"[ =<>;@\[]", name)[0]).lower()

report, have = sys.argv[1:]
left_out = {canonical(line.strip()) for line in open(have)} if have else set()
for package in json.load(open(report))["install"]:
    name, version = canonical(package["metadata"]["name"]), package["metadata"]["version"]
    if name not in left_out and not re.match(r"(torch|triton|nvidia-(?!ml-py)|cuda-)", name):
        print(f"{name}=={version}")
PYTHON
    )
    rm -f "$report"
    ((${#packages[@]})) || fail "nothing to collect"
    "$PYTHON" -m pip download --quiet --no-deps "${for_version[@]}" --dest "$folder" "${packages[@]}" ||
        fail "pip could not download them"
    echo "$(find "$folder" -name '*.whl' | wc -l) wheels, $(du -sh "$folder" | cut -f1), in $folder"
}

describe_machine() {
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || echo "no nvidia-smi"
    "$PYTHON" - <<'PYTHON'
import importlib.util, os, platform
import torch

has_gpu = torch.cuda.is_available()
print("GPU:", torch.cuda.get_device_name() if has_gpu else "none that torch can use")
print("torch:", torch.__version__, "  CUDA:", torch.version.cuda)
print("triton:", __import__("triton").__version__ if importlib.util.find_spec("triton") else "none")
print("Python:", platform.python_version(), "  cores:", os.cpu_count())
PYTHON
}

# A virtual environment that sees the machine's packages and has what these lack: nothing of the machine is changed.
# --system-site-packages would pass over those of a virtual environment, where torch often is.
install() {
    "$PYTHON" -m venv --without-pip "$ENVIRONMENT" || return
    local site pip=("$PYTHON" -m pip --python "$ENVIRONMENT/bin/python" install --quiet --no-index)
    site=$("$ENVIRONMENT/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))') || return
    "$PYTHON" >"$site/machine.pth" <<'PYTHON'
import sys

for path in sys.path:
    if path.endswith("-packages"):
        print(f"import site; site.addsitedir({path!r})")
PYTHON
    [[ -d $WHEELS ]] && pip+=(--find-links "$WHEELS")
    if ! "${pip[@]}" "${REQUIREMENTS[@]}"; then
        echo "The machine's packages and the wheels do not go together, says pip: what is missing is taken as it is."
        local missing
        mapfile -t missing < <("$ENVIRONMENT/bin/python" - "$WHEELS" <<'PYTHON'
import importlib.metadata, pathlib, sys

for wheel in sorted(pathlib.Path(sys.argv[1]).glob("*.whl")):
    try:
        importlib.metadata.version(wheel.name.split("-")[0])
    except importlib.metadata.PackageNotFoundError:
        print(wheel)
PYTHON
        )
        ((${#missing[@]})) && { "${pip[@]}" --no-deps "${missing[@]}" || return; }
    fi
    "${pip[@]}" --no-deps --no-build-isolation --editable "$REPOSITORY" ||
        echo "fxmse is not installed; it is imported from $REPOSITORY"
    PYTHON=$ENVIRONMENT/bin/python
    "$PYTHON" -c 'import fxmse, llmcompressor.observers; print(fxmse.__file__)'
}

# step NAME LIMIT COMMAND...: runs a command for at most so many seconds, or as many as are left, and notes how it went.
step() {
    local name=$1 limit=$2 start=$SECONDS rc
    shift 2
    ((limit > SECONDS_IN_ALL - SECONDS)) && limit=$((SECONDS_IN_ALL - SECONDS))
    if ((limit <= 0)); then
        echo "| $name | no time left | 0 |" >>"$OUT/summary.md"
        return
    fi
    echo "== $name, at most $limit s"
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$OUT/$name.log"
    rc=${PIPESTATUS[0]}
    ((SECONDS - start >= limit)) && rc="$rc (out of time)"
    echo "| $name | $rc | $((SECONDS - start)) |" >>"$OUT/summary.md"
}

DEVICE=cuda WHEELS=$REPOSITORY/wheels OUT=${OUT:-gpu-results} SECONDS_IN_ALL=480 COLLECT="" HAVE="" VERSION=""
while (($#)); do
    (($# > 1)) || fail "$1 needs a value; see the top of this file"
    case $1 in
        --device) DEVICE=$2 ;;
        --wheels) WHEELS=$2 ;;
        --out) OUT=$2 ;;
        --seconds) SECONDS_IN_ALL=$2 ;;
        --collect) COLLECT=$2 ;;
        --python) VERSION=$2 ;;
        --have) HAVE=$2 ;;
        *) fail "unknown argument $1; see the top of this file" ;;
    esac
    shift 2
done
[[ $DEVICE == cuda || $DEVICE == cpu ]] || fail "--device $DEVICE: expected cuda or cpu"
if [[ $COLLECT ]]; then
    collect "$COLLECT" "${VERSION:-$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')}" "$HAVE"
    exit
fi

mkdir -p "$OUT" || fail "cannot write to $OUT"
OUT=$(cd "$OUT" && pwd)
SCRATCH=$(mktemp -d)
ENVIRONMENT=$SCRATCH/environment
trap 'rm -rf "$SCRATCH"' EXIT
describe_machine 2>&1 | tee "$OUT/machine.txt"
{
    echo '```'
    cat "$OUT/machine.txt"
    printf '```\n\n| step | rc | s |\n|---|---|---|\n'
} >"$OUT/summary.md"
rm "$OUT/machine.txt"

# Nothing is left in the user's caches, and in the checkout fxmse.egg-info alone.
export PYTHONPATH=$REPOSITORY PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1
export TORCHINDUCTOR_CACHE_DIR=$SCRATCH/inductor TRITON_CACHE_DIR=$SCRATCH/triton
export -f install
export PYTHON ENVIRONMENT WHEELS REPOSITORY
step install $((SECONDS_IN_ALL / 5)) bash -c "REQUIREMENTS=(${REQUIREMENTS[*]@Q}); install"
[[ -x $ENVIRONMENT/bin/python ]] && PYTHON=$ENVIRONMENT/bin/python
cd "$REPOSITORY" || exit

if [[ $DEVICE == cuda ]]; then
    search=(--size 8192 --runs 5) counting=(--runs 25) workers=$(($(nproc) > 16 ? 8 : ($(nproc) + 1) / 2))
else # a rehearsal
    search=(--size 256 --runs 1 --norm 2.4 --schemes "int8 tensor" "int8 channel" "int4 g128" "int4 g128 asymmetric"
        "fp8 channel" "fp8 block 128" mxfp4 nvfp4) counting=(--runs 1) workers=2
fi
# Other machines' libraries warn of other things: here no warning is an error.
step tests $((SECONDS_IN_ALL * 2 / 5)) "$PYTHON" -m pytest -v --device "$DEVICE" -m device -n "$workers" -W default \
    -p no:cacheprovider tests
step counting $((SECONDS_IN_ALL / 8)) "$PYTHON" benchmarks/counting.py --device "$DEVICE" \
    --out "$OUT/counting.md" "${counting[@]}"
step search "$SECONDS_IN_ALL" "$PYTHON" benchmarks/search.py --device "$DEVICE" --dtype bfloat16 \
    --out "$OUT/search.md" "${search[@]}"

echo
cat "$OUT/summary.md"
! grep -qE '^\| [a-z]+ \| [^0]' "$OUT/summary.md"
