#!/usr/bin/env bash
# run.sh SECONDS [TARGET]: fuzzes each target, one after the other, with libFuzzer and AddressSanitizer, and prints how many
# inputs it executed and how many of the program's edges they covered. Inputs that cover new ones are kept in
# ~/.cache/bascule/fuzz, for the next run. A finding does not end the run of the other targets; the exit code is 1, and the
# paths of the inputs are printed.
# run.sh minimise [TARGET]: replaces each corpus in fuzz/corpus by a few KiB that cover most of what is known.
set -euo pipefail
cd "$(dirname "$0")/.."

what=$1 only=${2:-}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/bascule/fuzz
build=${CARGO_TARGET_DIR:-$cache/target}/fuzz
programs=$build/x86_64-unknown-linux-gnu/release
# Coverage and sanitizers are unstable options, which the pinned compiler takes with this.
export RUSTC_BOOTSTRAP=1
mib_max=1536
corpus_bytes_max=6000

targets=()
for program in fuzz/targets/*.rs; do
  name=$(basename "$program" .rs)
  [[ -n $only && $name != "$only" ]] || targets+=("$name")
done
[[ ${#targets[@]} -gt 0 ]] || { echo "no target is named $only" >&2; exit 2; }

command -v cargo-fuzz >/dev/null || cargo install --quiet --locked cargo-fuzz
cargo fuzz build --fuzz-dir fuzz --features libfuzzer --target-dir "$build" ${only:+"$only"}

fuzz() {
  local name=$1 log=$cache/logs/$1.log found=$cache/findings/$1 status=0
  mkdir -p "$cache/corpus/$name" "$cache/logs" "$found"
  "$programs/$name" "$cache/corpus/$name" "fuzz/corpus/$name" -max_total_time="$what" -rss_limit_mb=$mib_max \
    -timeout=20 -max_len=4096 -print_final_stats=1 -artifact_prefix="$found/" >"$log" 2>&1 || status=$?
  local runs edges rate
  runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
  rate=$(sed -n 's/^stat::average_exec_per_sec: *//p' "$log")
  edges=$(grep -o 'cov: [0-9]*' "$log" | tail -1 | cut -d' ' -f2)
  printf '%-20s %10s executions, %6s/s, %6s edges\n' "$name" "${runs:-?}" "${rate:-?}" "${edges:-?}"
  ((status == 0)) && return
  sed -n 's/^artifact_prefix=.*Test unit written to /  finding: /p' "$log"
  echo "  log: $log"
  return 1
}

minimise() {
  local name=$1 merged bytes=0 size file
  merged=$(mktemp -d)
  "$programs/$name" "$merged" "$cache/corpus/$name" "fuzz/corpus/$name" -merge=1 -max_len=1024 -rss_limit_mb=$mib_max >/dev/null 2>&1
  rm -f "fuzz/corpus/$name/"*
  # The longest ones do the most in one input.
  while read -r size file; do
    ((bytes + size <= corpus_bytes_max)) || continue
    bytes=$((bytes + size))
    cp "$merged/$file" "fuzz/corpus/$name/"
  done < <(find "$merged" -type f -printf '%s %f\n' | sort -rn)
  rm -rf "$merged"
  echo "$name: $(find "fuzz/corpus/$name" -type f | wc -l) inputs, $bytes bytes"
}

failed=0
for name in "${targets[@]}"; do
  if [[ $what == minimise ]]; then minimise "$name"; else fuzz "$name" || failed=1; fi
done
exit $failed
