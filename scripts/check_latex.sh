#!/usr/bin/env bash
# Checks whether LaTeX files compile, with tectonic, pdflatex or lualatex, whichever is installed.
#
#   scripts/check_latex.sh [--pdf] [FILE.tex ...]
#
#   --pdf    keeps the PDF of a document beside it; without this option nothing is kept
#
# Without a file, the script checks whether LaTeX and the packages that the tables need are
# installed. A fragment (a table for \input) is compiled in a temporary document. A line that is
# wider than its page is reported and is no error. The exit code is 0 if all files compile; 1 if one
# does not, with the end of its log; 2 if the input was bad; and 3 if LaTeX or a package is missing.
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
elif [ "$engine" != tectonic ]; then # tectonic downloads missing packages
  for style in "${styles[@]}"; do
    kpsewhich "$style.sty" >/dev/null || missing="$missing${missing:+, }no $style.sty"
  done
fi
if [ -n "$missing" ]; then
  echo "$missing; on Debian: apt-get install --no-install-recommends" \
    "texlive-latex-recommended texlive-science, or install tectonic"
  exit 3
fi

# LaTeX runs twice: long tables and references use what the first pass has written.
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
  output=$out/${name%.tex}
  if (cd "$folder" && compile "$name") >"$scratch/screen" 2>&1; then
    echo "$file: compiles with $engine"
    grep -h '^Overfull .hbox' "$output.log" 2>/dev/null
    if [ $keep = yes ] && [ $fragment = no ]; then
      mv "$output.pdf" "$folder/" || exit 2
    fi
  else
    echo "$file: does not compile with $engine:" >&2
    grep -hE -A 3 '^!' "$output.log" "$scratch/screen" 2>/dev/null | tail -n 12 >&2
    status=1
  fi
done
exit "$status"
