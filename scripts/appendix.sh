#!/usr/bin/env bash
# Runs all sweeps of the appendix, and writes a folder with every table, claim and figure and with
# appendix.tex.
#
#   scripts/appendix.sh [-o FOLDER] [-r RESULTS] [-s SWEEPS] [override ...]
#
#   -o FOLDER    receives tables, figures, claims, report.html and appendix.tex (default: appendix)
#   -r RESULTS   contains the run directories (default: results)
#   -s SWEEPS    names of sweeps, separated by commas (default: appendix, all sweeps of the paper)
#   override     applies to every cell, such as task.heldout_batches=1 or hydra/launcher=local
#
# Run the same command again to continue: completed cells are not run a second time. The variable
# PYTHON names an interpreter other than .venv/bin/python. The exit code is 0 if everything was
# written; 1 if some cells failed or did not end (the folder is written and lists them); 2 if the
# input was bad and nothing was run; 3 if the folder could not be written or appendix.tex does not
# compile; and above 128 if a signal interrupted the script.
set -u
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 3
folder=appendix results=results sweeps=appendix

die() {
  echo "appendix.sh: $2" >&2
  exit "$1"
}

while getopts ":o:r:s:h" option; do
  case $option in
    o) folder=$OPTARG ;;
    r) results=$OPTARG ;;
    s) sweeps=$OPTARG ;;
    h)
      sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    *) die 2 "-$OPTARG: options are -o FOLDER, -r RESULTS, -s SWEEPS and -h" ;;
  esac
done
shift $((OPTIND - 1))

python=${PYTHON:-$here/.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
command -v "$python" >/dev/null || die 2 "there is no $python"
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"

# Expand collections: the folder reports these sweeps only, whatever else RESULTS contains.
names=$("$python" -c '
import sys
from fisher_lab.config import errors, sweep_files
try:
    print(*(file.name for file in sweep_files.expand(sys.argv[1].split(","))))
except errors.ConfigError as error:
    sys.exit(f"appendix.sh: {error}")
' "$sweeps") || exit 2

began=$SECONDS status=0
"$python" -m fisher_lab -m "+sweeps=[$sweeps]" "sweep.dir=$results" "$@" || status=$?
[ "$status" -le 1 ] || exit "$status"
case " $* " in *" sweep.dry_run=true "* | *" sweep.detach=true "*) exit "$status" ;; esac

paths=()
for name in $names; do
  paths+=("$results/$name")
done
echo "== $folder"
"$python" -m fisher_lab report "${paths[@]}" -o "$folder/report.html" --appendix "$folder" ||
  die 3 "the report was not written"
"$here/scripts/check_latex.sh" --pdf "$folder/appendix.tex"
case $? in
  0) ;;
  3) echo "appendix.tex is not compiled" ;;
  *) exit 3 ;;
esac
echo "the appendix took $(((SECONDS - began) / 60)) min $(((SECONDS - began) % 60)) s"
[ "$status" -eq 0 ] || echo "appendix.sh: not every cell is completed, see above" >&2
exit "$status"
