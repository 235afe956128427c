#!/usr/bin/env bash
# All sweeps of the appendix, then a folder with every table, claim and figure, and appendix.tex.
#
#   scripts/appendix.sh [-o FOLDER] [-r RESULTS] [-s SWEEPS] [override ...]
#
#   -o FOLDER    what is written: tables, figures, claims, report.html, appendix.tex (appendix)
#   -r RESULTS   where the runs lie or will lie (results)
#   -s SWEEPS    sweeps, several with commas (appendix, which stands for those of the paper)
#   override     for every cell, for instance task.heldout_batches=1 or hydra/launcher=local
#
# Run it again to go on: cells that are completed are not run a second time. PYTHON names another
# interpreter than .venv/bin/python. Exit codes: 0 all is there; 1 some cells failed or did not come
# to an end (the folder is written all the same, and says which); 2 bad input, nothing was run;
# 3 the folder could not be written, or appendix.tex does not compile; above 128: interrupted.
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

# What the sweeps stand for: the folder is about these, whatever else lies in RESULTS.
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
