#!/usr/bin/env bash
# Sends the W&B runs of a sweep (or of any directory) that were not sent yet: runs that were written
# offline, and runs that were online and could not finish their upload.
#
#   scripts/wandb_sync.sh results/train_damping        # sends 4 runs at a time
#   JOBS=16 scripts/wandb_sync.sh results              # sends 16 runs at a time
#   TIMEOUT=600 scripts/wandb_sync.sh results          # allows 600 s per file (default: 300)
#   scripts/wandb_sync.sh --dry-run results            # lists what would be sent
#
# The script can be run again, and while a sweep is running: it marks each file that it has sent
# with the file's size, and sends the file again only if it has grown. The attempts of one run are
# sent one after the other, the oldest first, so that its curve continues where it ended. The exit
# code is 1 if a run could not be sent.
set -u
dry=0
[ "${1:-}" = "--dry-run" ] && { dry=1; shift; }
root=${1:-}
[ -n "$root" ] && [ -d "$root" ] || { echo "usage: $0 [--dry-run] DIRECTORY" >&2; exit 2; }
WANDB=${WANDB:-wandb}
command -v "$WANDB" >/dev/null || { echo "$0: there is no $WANDB on the PATH" >&2; exit 2; }

# Succeeds if the service has taken the whole file. (wandb 0.31 exits with 0 if it refuses a file.)
send_file() {
  local file=$1
  rm -f "$file.synced"
  # Without a network, wandb would retry for ever.
  timeout --kill-after=10 "${TIMEOUT:-300}" "$WANDB" sync --include-synced --include-online \
    "$(dirname "$file")" >"$file.log" 2>&1 || return 1
  # The file .synced shows that wandb came to the end; the log shows whether anything was refused.
  [ -e "$file.synced" ] && ! grep -q '^wandb: ERROR' "$file.log"
}

# Sends the attempts of one run, the oldest first.
send_run() {
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

# One line per run: its id, then its files, sorted by the time in the names of their directories.
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
