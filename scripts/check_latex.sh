#!/usr/bin/env bash
# Whether LaTeX files compile, with whichever of tectonic, pdflatex and lualatex is installed.
#
#   scripts/check_latex.sh [FILE.tex ...]
#
# Without a file it says whether there is a LaTeX with the packages that tables need. A fragment (a table for \input) is compiled in a document of its own, which is not kept; a
# document leaves its PDF and log beside it. Exit codes: 0 all compile; 1 one does not, with the end
# of its log; 2 bad input; 3 there is no LaTeX here, or it lacks a package.
set -u

engine=
for name in tectonic pdflatex lualatex; do
  if command -v "$name" >/dev/null; then
    engine=$name
    break
  fi
done
for file in "$@"; do
  [ -r "$file" ] || { echo "check_latex.sh: $file cannot be read" >&2; exit 2; }
done
styles=(booktabs siunitx longtable graphicx geometry array inputenc)
missing=
if [ -z "$engine" ]; then
  missing="no LaTeX here"
elif [ "$engine" != tectonic ]; then # which fetches what it lacks
  for style in "${styles[@]}"; do
    kpsewhich "$style.sty" >/dev/null || missing="$missing${missing:+, }no $style.sty"
  done
fi
if [ -n "$missing" ]; then
  echo "$missing; on Debian: apt-get install --no-install-recommends" \
    "texlive-latex-recommended texlive-science, or install tectonic"
  exit 3
fi

# Twice: columns of a table over several pages, and references, need the first pass.
compile() {
  if [ "$engine" = tectonic ]; then
    tectonic --keep-logs --chatter minimal "$1"
  else
    "$engine" -interaction=nonstopmode -halt-on-error -no-shell-escape "$1" &&
      "$engine" -interaction=nonstopmode -halt-on-error -no-shell-escape "$1"
  fi
}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
status=0
for file in "$@"; do
  folder=$(cd "$(dirname "$file")" && pwd) || exit 2
  name=$(basename "$file")
  told="$folder/${name%.tex}.log"
  if ! grep -q '\\documentclass' "$file"; then
    {
      printf '%s\n' '\documentclass[a4paper]{article}' '\usepackage[utf8]{inputenc}'
      printf '\\usepackage{%s}\n' booktabs siunitx graphicx longtable array
      printf '%s\n' '\begin{document}'
      cat "$file"
      printf '%s\n' '\end{document}'
    } >"$scratch/$name"
    folder=$scratch told="$scratch/${name%.tex}.log"
  fi
  if (cd "$folder" && compile "$name") >"$scratch/screen" 2>&1; then
    echo "$file: compiles with $engine"
  else
    echo "$file: does not compile with $engine:" >&2
    grep -hE -A 3 '^!' "$told" "$scratch/screen" 2>/dev/null | tail -n 12 >&2
    status=1
  fi
done
exit "$status"
