#!/usr/bin/env bash
# Whether LaTeX files compile, with whichever of tectonic, pdflatex and lualatex is installed.
#
#   scripts/check_latex.sh [--pdf] [FILE.tex ...]
#
#   --pdf    leave the PDF of a document beside it; else nothing is left
#
# Without a file it says whether there is a LaTeX with the packages that tables need. A fragment (a
# table for \input) is compiled in a document of its own, which is not kept. What is wider than its
# page is told, and is no error. Exit codes: 0 all compile; 1 one does not, with the end of its log;
# 2 bad input; 3 there is no LaTeX here, or it lacks a package.
set -u

keep=no
case ${1-} in
  --pdf)
    keep=yes
    shift
    ;;
  -*)
    echo "check_latex.sh: $1: the only option is --pdf" >&2
    exit 2
    ;;
esac
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
    tectonic --keep-logs --chatter minimal --outdir "$out" "$1"
  else
    set -- -interaction=nonstopmode -halt-on-error -no-shell-escape "-output-directory=$out" "$1"
    "$engine" "$@" && "$engine" "$@"
  fi
}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
out=$scratch/out status=0
for file in "$@"; do
  rm -rf "$out" && mkdir "$out" || exit 2
  folder=$(cd "$(dirname "$file")" && pwd) || exit 2
  name=$(basename "$file") fragment=no
  if ! grep -q '\\documentclass' "$file"; then
    {
      printf '%s\n' '\documentclass[a4paper]{article}' '\usepackage[utf8]{inputenc}'
      printf '\\usepackage{%s}\n' booktabs siunitx graphicx longtable array
      printf '%s\n' '\begin{document}'
      cat "$file"
      printf '%s\n' '\end{document}'
    } >"$scratch/$name"
    folder=$scratch fragment=yes
  fi
  told=$out/${name%.tex}
  if (cd "$folder" && compile "$name") >"$scratch/screen" 2>&1; then
    echo "$file: compiles with $engine"
    grep -h '^Overfull .hbox' "$told.log" 2>/dev/null
    if [ $keep = yes ] && [ $fragment = no ]; then
      mv "$told.pdf" "$folder/" || exit 2
    fi
  else
    echo "$file: does not compile with $engine:" >&2
    grep -hE -A 3 '^!' "$told.log" "$scratch/screen" 2>/dev/null | tail -n 12 >&2
    status=1
  fi
done
exit "$status"
