#!/usr/bin/env bash
# All sweeps of the appendix, then appendix/: every table, claim and figure, and appendix.tex.
#
#   scripts/appendix.sh [override ...]
#
# Overrides go to every sweep, for instance task.heldout_batches=1. Finished cells are not run again.
# SWEEPS="policy damping" takes these only, RESULTS and APPENDIX name other directories, PYTHON
# another interpreter. A sweep with failed cells does not keep the others from running; the exit code
# is then 1.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

results=${RESULTS:-results}
appendix=${APPENDIX:-appendix}
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || command -v "$python" >/dev/null || python=python3

status=0
for name in ${SWEEPS:-appendix}; do
  echo "== $name"
  "$python" -m fisher_lab -m "+sweeps=$name" "sweep.dir=$results" "$@" || status=1
done

echo "== $appendix"
"$python" -m fisher_lab report "$results" -o "$appendix/report.html" --appendix "$appendix" || exit 1

for latex in tectonic pdflatex lualatex; do
  command -v "$latex" >/dev/null || continue
  flags=()
  [ "$latex" = tectonic ] || flags=(-interaction=nonstopmode -halt-on-error)
  (cd "$appendix" && "$latex" "${flags[@]}" appendix.tex >appendix.log) || {
    echo "appendix.tex does not compile; see $appendix/appendix.log" >&2
    exit 1
  }
  echo "$appendix/appendix.pdf"
  exit "$status"
done
echo "no LaTeX here: $appendix/appendix.tex is not compiled"
exit "$status"
