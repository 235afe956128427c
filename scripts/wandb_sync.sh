#!/usr/bin/env bash
# Sends the offline W&B runs of a sweep (or of any directory), many at a time.
#
#   scripts/wandb_sync.sh results/train_damping        # 4 at a time
#   JOBS=16 scripts/wandb_sync.sh results              # 16 at a time
#   scripts/wandb_sync.sh --dry-run results            # what would be sent
#
# Can be run again, and while a sweep goes on: what was sent is marked beside the run, with the size
# that it had, and is sent again only if it has grown. The attempts of one run are sent one after
# the other, oldest first, so that its curve goes on where it was. Exit code 1 where one failed.
set -u
dry=0
[ "${1:-}" = "--dry-run" ] && { dry=1; shift; }
root=${1:-}
[ -n "$root" ] && [ -d "$root" ] || { echo "usage: $0 [--dry-run] DIRECTORY" >&2; exit 2; }
WANDB=${WANDB:-wandb}
command -v "$WANDB" >/dev/null || { echo "$0: there is no $WANDB on the PATH" >&2; exit 2; }

send_run() { # the attempts of one run, oldest first
  local id=$1 file mark size
  shift
  for file in "$@"; do
    mark="$file.sent"
    size=$(wc -c <"$file")
    [ "$(cat "$mark" 2>/dev/null)" = "$size" ] && continue
    if [ "$DRY" = 1 ]; then
      echo "would send $file"
    elif "$WANDB" sync --include-synced "$(dirname "$file")" >"$file.log" 2>&1; then
      echo "$size" >"$mark.tmp" && mv "$mark.tmp" "$mark" && echo "sent $id"
    else
      echo "failed $id: see $file.log" >&2
      return 1
    fi
  done
}
export -f send_run
export WANDB DRY=$dry

# A line a run: its id, then its files by the time in the name of their directory.
find "$root" -path '*/offline-run-*/run-*.wandb' -type f | LC_ALL=C sort | awk '
  { n = split($0, part, "/run-"); id = part[n]; sub(/\.wandb$/, "", id)
    files[id] = files[id] "\t" $0 }
  END { for (id in files) print id files[id] }' |
  LC_ALL=C sort |
  xargs -r -d '\n' -P "${JOBS:-4}" -I LINE bash -c '
    IFS=$'"'\t'"' read -r -a part <<<"$1"
    send_run "${part[@]}"' - LINE
[ $? -eq 0 ] || exit 1
