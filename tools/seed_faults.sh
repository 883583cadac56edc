#!/bin/bash
# Puts each fault of tests/FAULTS.md into a copy of the tree and demands that the named tests fail there. Prints
# `N passed, N failed`: a fault that no test notices is a failure of the tests.
# Usage: tools/seed_faults.sh [PATTERN]     only faults whose name contains PATTERN; JOBS=N copies at a time (a core each);
# SHARE=I/N every N-th fault from the I-th (0 to N - 1) on
set -uo pipefail
cd "$(dirname "$0")/.."
pattern=${1:-}
jobs=${JOBS:-$(nproc)}
share=${SHARE:-0/1}
worker=${WORKER:-}  # set in the processes that this script starts of itself: takes every jobs-th fault
copy=build/faults/${worker:-0}
passed=0 failed=0

# The tree and what is built of it, without results; time stamps kept, so that only what a fault changes is built again.
if [[ -z $worker ]]; then
  rm -rf build/faults
  mkdir -p $copy/build
  tar -cf - --exclude=./build --exclude=./out --exclude=./.git . | tar -xf - -C $copy
  [[ ! -d build/release ]] || cp -a build/release build/.packages $copy/build/
fi
# What a fault touches is compiled quickly rather than well: the tests ask for right or wrong.
build() { make -s -j2 -C $copy flags.release='-O1 -g0' orpo_train orpo_eval orpo_data orpo_generate build/release/orpo_tests >$copy/log 2>&1; }
# The objective is included everywhere, by way of backend.h, and used in few places. Those alone are built anew: its time
# stamp stays what it was, and the objects go of every source that names one of its functions or includes a header that does.
touch_users() {
  local names users headers
  touch -r "$copy/unbroken" "$copy/src/objective.h"
  names=$(grep -oE 'inline \w+ \w+\(' "$copy/src/objective.h" | awk '{print $3}' | tr -d '(' | grep -vx 'preference\|sigmoid' |
    paste -sd'|')  # two names that others have too; who uses them uses another one as well
  users=$(cd $copy && grep -lE "\b($names)\(" -r src data tests cuda)
  headers=$(echo "$users" | grep '\.h$' | grep -v objective.h | paste -sd'|')
  users+=$'\n'$(cd $copy && grep -lE "include \"(${headers:-none})\"" -r src data tests cuda)
  for user in $(echo "$users" | grep -E "\.(cpp|cu)$" | sort -u); do rm -f "$copy/build/release/${user%.*}.o"; done
}
run_tests() { (cd $copy && timeout 600 build/release/orpo_tests --test-case="$1" >log 2>&1); }
rows() { grep '^| ' tests/FAULTS.md | grep -v '^| fault '; }

if [[ -z $worker ]]; then
  echo "the unbroken copy"
  all_tests=$(rows | cut -d'|' -f5 | sed 's/^ *`//; s/` *$//' | paste -sd,)
  if ! build || ! run_tests "$all_tests"; then
    tail -n 20 $copy/log
    echo "0 passed, 1 failed"
    exit 1
  fi
  for ((w = 1; w < jobs; ++w)); do cp -a build/faults/0 build/faults/$w; done
  for ((w = 0; w < jobs; ++w)); do
    WORKER=$w JOBS=$jobs OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} "$0" "$pattern" | tee build/faults/result.$w | grep -v ' passed, ' &
  done
  wait
  awk '/ passed, / { p += $1; f += $3; n += 1 } END { print p + 0 " passed, " f + 0 " failed"; exit !(f == 0 && n == '"$jobs"') }' build/faults/result.*
  exit
fi

# Rows of the table in FAULTS.md: | name | file | sed expression | tests (doctest pattern) |
number=0 row=0
while IFS='|' read -r _ name file expression tests _; do
  name=$(echo "$name" | sed "s|^ *||; s| *$||") file=$(echo "$file" | tr -d ' `') tests=$(echo "$tests" | sed 's/^ *`//; s/` *$//')
  expression=$(echo "$expression" | sed 's/^ *`//; s/` *$//')
  [[ $name == *"$pattern"* ]] || continue
  ((row++ % ${share#*/} == ${share%/*})) || continue
  ((number++ % jobs == worker)) || continue
  cp -p "$copy/$file" "$copy/unbroken"
  sed -i "$expression" "$copy/$file"
  if cmp -s "$copy/$file" "$copy/unbroken"; then
    echo "NOT SEEDED  $name: the expression changes nothing in $file"; failed=$((failed + 1)); continue
  fi
  [[ $file != src/objective.h ]] || touch_users
  if ! build; then
    echo "NOT BUILT   $name"; tail -n 5 $copy/log; failed=$((failed + 1))
  elif run_tests "$tests"; then
    echo "UNNOTICED   $name ($tests)"; failed=$((failed + 1))
  else
    echo "caught      $name: $(grep -c 'ERROR' $copy/log) checks fail"; passed=$((passed + 1))
  fi
  cp -p "$copy/unbroken" "$copy/$file"
  if [[ $file == src/objective.h ]]; then touch_users; else touch "$copy/$file"; fi
done < <(rows)
echo "$passed passed, $failed failed"
[[ $failed == 0 ]]
