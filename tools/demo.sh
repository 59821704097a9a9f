#!/bin/sh
# demo.sh [--preset tiny|demo] [--no-view]: twin -> run -> accuracy against truth -> napari.
set -eu

preset=demo
view=yes
while [ $# -gt 0 ]; do
    case $1 in
        --preset) preset=${2:?"--preset needs a name: tiny or demo"}; shift ;;
        --preset=*) preset=${1#--preset=} ;;
        --no-view) view=no ;;
        *) echo "demo.sh: expected --preset NAME or --no-view, got $1" >&2; exit 2 ;;
    esac
    shift
done

python=${PYTHON:-python}
folder=demo
[ "$preset" = demo ] || folder=demo-$preset
out=$folder-out

xanes_tomo() {
    "$python" -m napari_xanes_tomo.cli "$@"
}

xanes_tomo demo "$folder" --preset "$preset"
xanes_tomo run "$folder" --out "$out"
"$python" benchmarks/accuracy.py "$folder" "$out"

echo
echo "raw files and truth: $folder/"
echo "results:             $out/  (tables/, maps.ome.zarr, journal.jsonl, recipe.yaml)"
if [ -f "$out/report.html" ]; then
    echo "report:              $out/report.html"
fi
if [ "$view" = yes ] && [ -n "${DISPLAY:-}${WAYLAND_DISPLAY:-}" ]; then
    xanes_tomo view "$folder" --out "$out"
else
    echo "to look at it:       $python -m napari_xanes_tomo.cli view $folder --out $out"
fi
