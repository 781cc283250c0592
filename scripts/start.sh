#!/usr/bin/env bash
# Start the ASLseg server.
#
#   bash scripts/start.sh [--studies DIR] [--port N] [--host ADDRESS] [-- more arguments for monailabel start_server]
#
# Without --studies, a folder of synthetic CTs is made in demo/. Settings: ... -- --conf labels liver
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

usage() {
    sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

studies="" port=8000 host=127.0.0.1
while [ $# -gt 0 ]; do
    case "$1" in
        --studies | --port | --host)
            [ $# -ge 2 ] || { echo "$1 needs a value" >&2; exit 2; }
            case "$1" in
                --studies) studies="$2" ;;
                --port) port="$2" ;;
                --host) host="$2" ;;
            esac
            shift 2 ;;
        --) shift; break ;;
        -h | --help) usage; exit 0 ;;
        *) echo "start.sh: unknown argument $1 (arguments for monailabel come after --)" >&2; usage >&2; exit 2 ;;
    esac
done

waits="${OMP_WAIT_POLICY:-}"
# without stored bytecode every start translates what is newer than the installation, or in an older one everything (12 s)
unset PYTHONDONTWRITEBYTECODE
setup
if [ -z "$studies" ]; then
    studies="$ROOT/demo/studies"
    if [ ! -d "$studies" ]; then
        echo "Making demo scans in $studies ..."
        # made beside it and renamed, so that an interrupted start leaves no half folder
        rm -rf "$ROOT/demo/new" "$ROOT/demo/new_truth"
        aslseg phantom "$ROOT/demo/new" --cases 12 --labelled 4 --seed 1 >/dev/null
        mv "$ROOT/demo/new_truth" "$ROOT/demo/studies_truth"
        mv "$ROOT/demo/new" "$studies"
    fi
fi
case "$studies" in
    http://* | https://*) ;;
    *)
        [ -d "$studies" ] || { echo "start.sh: no folder $studies; give a folder of NIfTI or NRRD scans" >&2; exit 1; }
        studies="$(cd "$studies" && pwd)" ;;
esac

echo "Server:   http://$host:$port   (3D Slicer: module MONAI Label, this address)"
echo "Progress: http://$host:$port/aslseg/"
# Threads that sleep between two layers make a click slower (docs/lab/2026-11-25-clicks.md), so they spin, for a tenth of
# a millisecond at most, which hardly disturbs a second process on the same cores.
if [ -z "$waits" ] && [ "$(uname -s)" = Linux ]; then
    export OMP_WAIT_POLICY=ACTIVE GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-5000}"
fi
# glibc gives freed activations of a network back to the kernel after every layer and has new pages cleared for the next
# one; with these limits it keeps blocks of up to 32 MB, 64 MB in all (docs/lab/2026-11-26-memory.md)
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-33554432}" MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-67108864}"
# monailabel's own wrapper script passes $* unquoted, which breaks paths with spaces
exec python -m monailabel.main start_server --app "$ROOT/apps/aslseg" --studies "$studies" \
    --host "$host" --port "$port" "$@"
