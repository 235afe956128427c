#!/usr/bin/env bash
# Sends the W&B runs of a sweep (or of any directory) that were not sent yet, many at a time: those
# written offline, and those that were online and could not finish their upload.
#
#   scripts/wandb_sync.sh results/train_damping        # 4 at a time
#   JOBS=16 scripts/wandb_sync.sh results              # 16 at a time
#   TIMEOUT=600 scripts/wandb_sync.sh results          # seconds for a file; 300
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

send_file() { # whether all of it was taken; wandb 0.31 exits with 0 where the service refuses it
  local file=$1
  rm -f "$file.synced"
  # Without a network it would try for ever.
  timeout --kill-after=10 "${TIMEOUT:-300}" "$WANDB" sync --include-synced --include-online \
    "$(dirname "$file")" >"$file.log" 2>&1 || return 1
  # The mark of wandb's own says that it came to the end, the log whether something was refused.
  [ -e "$file.synced" ] && ! grep -q '^wandb: ERROR' "$file.log"
}

send_run() { # the attempts of one run, oldest first
  local id=$1 file mark size
  shift
  for file in "$@"; do
    mark="$file.sent"
    size=$(wc -c <"$file")
    [ "$(cat "$mark" 2>/dev/null)" = "$size" ] && continue
    if [ "$DRY" = 1 ]; then
      echo "would send $file"
    elif send_file "$file"; then
      echo "$size" >"$mark.tmp" && mv "$mark.tmp" "$mark" && echo "sent $id"
    else
      echo "failed $id: see $file.log" >&2
      return 1
    fi
  done
}
export -f send_file send_run
export WANDB DRY=$dry

# A line a run: its id, then its files by the time in the name of their directory.
find "$root" -type f \( -path '*/offline-run-*/run-*.wandb' -o -path '*/run-*/run-*.wandb' \) |
  awk '{ n = split($0, part, "/"); time = part[n - 1]; sub(/^(offline-)?run-/, "", time)
    print time "\t" $0 }' |
  LC_ALL=C sort | cut -f 2- | awk '
  { n = split($0, part, "/run-"); id = part[n]; sub(/\.wandb$/, "", id)
    files[id] = files[id] "\t" $0 }
  END { for (id in files) print id files[id] }' |
  LC_ALL=C sort |
  xargs -r -d '\n' -P "${JOBS:-4}" -I LINE bash -c '
    IFS=$'"'\t'"' read -r -a part <<<"$1"
    send_run "${part[@]}"' - LINE
[ $? -eq 0 ] || exit 1
