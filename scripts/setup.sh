# Sourced by the other scripts: makes .venv with the tested packages, once, and activates it.
# ASLSEG_PYTHON names another interpreter; a second call compares a hash, and stores the bytecode of our own files, which
# a `git pull` may have changed, where it may write them.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

find_python() {
    local candidate
    for candidate in "${ASLSEG_PYTHON:-}" python3.11 python3 python; do
        # tried, not only looked up: a version manager's shim exists for versions that are not there
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "Python 3.11 is needed (MONAI Label 0.8.5 does not run on newer ones) and was not found." >&2
    echo "Install it (Debian, Ubuntu: apt-get install python3.11 python3.11-venv), or say where it is:" >&2
    echo "ASLSEG_PYTHON=/path/to/python3.11 bash scripts/start.sh" >&2
    exit 1
}

# Bytecode of what the server imports (12 s, 145 MB). Without it the first start takes twice as long, and every start of
# a server that may not write its own programs.
store_bytecode() {
    (cd "$ROOT/apps/aslseg" && env -u PYTHONDONTWRITEBYTECODE "$ROOT/.venv/bin/python" -W ignore -c "import monailabel.main, monailabel.app, main") >/dev/null
}

# A quarter of a second where nothing has changed.
store_own_bytecode() {
    if [ -w "$ROOT/lib/aslseg" ]; then
        "$ROOT/.venv/bin/python" -m compileall -q "$ROOT/lib/aslseg" "$ROOT/apps/aslseg/main.py" >/dev/null 2>&1 || true
    fi
}

setup() {
    local stamp python
    stamp="$(cat "$ROOT/requirements.txt" "$ROOT/pyproject.toml" | sha256sum | cut -d' ' -f1)"
    if [ "$(cat "$ROOT/.venv/aslseg.stamp" 2>/dev/null)" != "$stamp" ]; then
        if [ ! -x "$ROOT/.venv/bin/python" ]; then
            python="$(find_python)" || exit 1
            echo "Making $ROOT/.venv with $("$python" --version) ..."
            if ! "$python" -m venv "$ROOT/.venv"; then
                rm -rf "$ROOT/.venv"
                echo "The venv module is missing: apt-get install python3.11-venv, then start again." >&2
                exit 1
            fi
        fi
        echo "Installing packages (several minutes and 7 GB the first time) ..."
        # pip would make the bytecode of all packages, which takes 50 s of a processor and 520 MB
        "$ROOT/.venv/bin/python" -m pip install --quiet --no-compile -r "$ROOT/requirements.txt" || exit 1
        "$ROOT/.venv/bin/python" -m pip install --quiet --no-deps -e "$ROOT" || exit 1
        store_bytecode || exit 1
        echo "$stamp" > "$ROOT/.venv/aslseg.stamp"
    else
        store_own_bytecode
    fi
    # shellcheck disable=SC1091
    . "$ROOT/.venv/bin/activate"
    # OpenMP threads that spin while they wait starve each other as soon as two processes share a machine
    export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
}
