#!/bin/sh
# replay.sh <file> [once]
#
# Appends the events of vulcan to a file, a line each: its sequence, a tab, the event. Needs nothing but the `nats`
# command. Stopped and started again it goes on behind the last line: nothing is missed.
#
#   NATS_URL, NATS_USER, NATS_PASSWORD   as the `nats` command reads them
#   PREFIX   of JetStream's requests; `vulcan.js` for the reader in nats.conf
set -eu
file=$1
prefix=${PREFIX:-'$JS.API'}
touch "$file"

while :; do
  seq=$(tail -n 1 "$file" | cut -f 1)
  # Up to 200 messages from a sequence on, and an empty one behind them; what heads them is on standard error.
  nats request "$prefix.DIRECT.GET.VULCAN_EVENTS" "{\"seq\":$((${seq:-0} + 1)),\"batch\":200}" \
    --replies=0 --wait-for-empty --reply-timeout=5s >"$file.batch" 2>&1 || {
    cat "$file.batch" >&2
    exit 1
  }
  awk '/ Nats-Sequence: /{ seq = $NF } /^{/ && seq { print seq "\t" $0; seq = 0 }' "$file.batch" >"$file.new"
  rm "$file.batch"
  if [ -s "$file.new" ]; then
    cat "$file.new" >>"$file"
    continue
  fi
  rm "$file.new"
  [ "${2:-}" = once ] && break
  # Until the next event is heard. One that came in between waits for the time to pass.
  timeout 5 nats subscribe 'vulcan.events.>' --count=1 >/dev/null 2>&1 || true
done
