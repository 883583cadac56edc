#!/bin/bash
# Puts each fault of tests/FAULTS.md into a copy of the tree and demands that the named tests fail there. Prints
# `N passed, N failed`: a fault that no test notices is a failure of the tests.
# Usage: tools/seed_faults.sh [PATTERN]     only faults whose name contains PATTERN
set -uo pipefail
cd "$(dirname "$0")/.."
copy=build/faults
passed=0 failed=0

mkdir -p $copy
copy_tree() { # the tree as it is, without results; time stamps kept so that only what changed is rebuilt
  tar -cf - --exclude=./build --exclude=./out --exclude=./.git --exclude='./orpo_*' . | tar -xf - -C $copy
}
copy_tree
echo "building the unbroken copy"
make -s -C $copy build/release/orpo_tests || { echo "0 passed, 1 failed"; exit 1; }

# Rows of the table in FAULTS.md: | name | file | sed expression | tests (doctest pattern) |
while IFS='|' read -r _ name file expression tests _; do
  name=$(echo "$name" | xargs) file=$(echo "$file" | tr -d ' `') tests=$(echo "$tests" | sed 's/^ *`//; s/` *$//')
  expression=$(echo "$expression" | sed 's/^ *`//; s/` *$//')
  [[ -n ${1:-} && $name != *"$1"* ]] && continue
  cp -p "$copy/$file" "$copy/unbroken"
  sed -i "$expression" "$copy/$file"
  if cmp -s "$copy/$file" "$copy/unbroken"; then
    echo "NOT SEEDED  $name: the expression changes nothing in $file"; failed=$((failed + 1)); continue
  fi
  if ! make -s -C $copy build/release/orpo_tests >$copy/log 2>&1; then
    echo "NOT BUILT   $name"; tail -n 5 $copy/log; failed=$((failed + 1))
  elif (cd $copy && timeout 300 build/release/orpo_tests --test-case="$tests" >log 2>&1); then
    echo "UNNOTICED   $name ($tests)"; failed=$((failed + 1))
  else
    echo "caught      $name: $(grep -c 'ERROR' $copy/log) checks fail"; passed=$((passed + 1))
  fi
  cp "$copy/unbroken" "$copy/$file"
done < <(grep -E '^\| [a-z]' tests/FAULTS.md | grep -v '^| fault ')
make -s -C $copy build/release/orpo_tests >/dev/null 2>&1
echo "$passed passed, $failed failed"
[[ $failed == 0 ]]
