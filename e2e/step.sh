#!/usr/bin/env bash
# step.sh WHAT COMMAND...: runs COMMAND and says on standard error that it does so, how long it has taken so far
# (every 30 s) and in all. A parenthesis at the end of WHAT, the usual time, is in the first line only. STEP in the
# environment, such as "[3/11] ", begins each line. e2e/lab/src/progress.rs prints the same lines for the lab.
set -uo pipefail

what=$1
shift
short=${what% (*}
begin=$SECONDS

elapsed() {
  local s=$((SECONDS - begin))
  if ((s < 100)); then echo "$s s"; else echo "$((s / 60)) min $((s % 60)) s"; fi
}

say() { echo "${STEP:-}$1" >&2; }

# Reading a descriptor that never has anything waits without a child process, so that nothing outlives the ticker.
tick() {
  exec {never}<> <(:)
  while kill -0 $$ 2>/dev/null; do
    read -r -t 30 -u "$never" || say "$short: $(elapsed) so far"
  done
}

say "$what ..."
ticker=
# On a terminal, cargo shows a progress bar of its own.
if ! { [ -t 2 ] && [[ " $* " != *" --quiet "* && " $* " == *" cargo "* ]]; }; then
  tick &
  ticker=$!
fi
trap '[ -z "$ticker" ] || kill "$ticker" 2>/dev/null' EXIT
"$@"
status=$?
if ((status == 0)); then say "$short: done in $(elapsed)"; else say "$short: failed after $(elapsed)"; fi
exit "$status"
