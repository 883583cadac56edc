#!/bin/sh
# make rooms: every room X has src/cpu/X.cpp, tests/X.cpp and, once cuda/backend.cu exists, cuda/X.cu; and includes
# follow the arrows
#   tokenizer <- data <- train -> model -> backend.h <- {src/cpu, cuda}
# Usage: tools/check_rooms.sh ROOM...
bad=0
say() { echo "rooms: $*" >&2; bad=1; }

for room in "$@"; do
  [ -f "src/cpu/$room.cpp" ] || say "$room has no src/cpu/$room.cpp"
  [ -f "tests/$room.cpp" ] || say "$room has no tests/$room.cpp"
  [ ! -f cuda/backend.cu ] || [ -f "cuda/$room.cu" ] || say "$room has no cuda/$room.cu"
  for file in "src/cpu/$room.cpp" "cuda/$room.cu"; do
    [ ! -f "$file" ] || grep -Eq "::$room(_forward)?\(" "$file" || say "$file does not hold ${room}_forward"
  done
done

# may_include WHERE WHAT: files of WHERE include nothing of the house but what matches WHAT.
may_include() {
  for file in $1; do
    [ -f "$file" ] || continue
    # shellcheck disable=SC2013
    for header in $(sed -n 's/^#include "\(.*\)".*/\1/p' "$file"); do
      echo "$header" | grep -Eq "^($2)$" || say "$file includes $header, against the arrows"
    done
  done
}
core='src/(fail|tensor|master|batch|objective|preference|backend|shapes|host_memory)\.h'
may_include "tokenizer/*.h tokenizer/*.cpp" 'tokenizer/.*|src/(fail|files)\.h'
may_include "data/*.h data/*.cpp" "data/.*|tokenizer/.*|src/rng\.h|src/files\.h|$core"
may_include "src/backend.h src/objective.h src/preference.h src/batch.h src/tensor.h" "$core"
may_include "src/cpu/*.h src/cpu/*.cpp" "src/cpu/.*|$core"
may_include "cuda/*.cu" "cuda/(gpu|partials|rows|tiles|attention)\.cuh|cuda/(products|transfers|backend)\.h|src/(objective|plugin)\.h"
may_include "cuda/*.h cuda/*.cuh" "cuda/.*|$core"
may_include "cuda/emulator/*" "cuda/(emulator/.*|(backend|runtime)\.h)|$core"
may_include "src/model.h src/model.cpp src/head.h src/head.cpp src/arena.h src/arena.cpp" \
  "src/(model|head|arena)\.h|$core"
for file in src/*.cpp src/*.h src/cpu/* src/bench/* data/* tokenizer/*; do
  case $file in src/safetensors_names.cpp) continue ;; esac
  if [ -f "$file" ] && grep -Eq 'q_proj|gate_proj|lm_head\.weight|embed_tokens|c_attn|c_proj|wte\.' "$file"; then
    say "$file knows Hugging Face tensor names; only src/safetensors_names.cpp may"
  fi
done
[ ! -f src/train.cpp ] || [ "$(wc -l < src/train.cpp)" -lt 200 ] || say "src/train.cpp has 200 lines or more"

[ $bad = 0 ] && echo "rooms: in order"
exit $bad
