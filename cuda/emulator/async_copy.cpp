// cp.async: from its issue on the destination is undefined (NaN, and a write as far as ThreadSanitizer goes); the data
// lands when the thread waits for the copy's group.
#include <algorithm>

#include "cuda/emulator/engine.h"
#include "cuda/emulator/sanitizers.h"

namespace orpo::emulator {

void Engine::copy_async(void* to, const void* from, int bytes, Where where) {
  if (bytes < 0 || bytes > 16) fail(where, "cp.async: reads %d bytes of 16", bytes);
  if (reinterpret_cast<uintptr_t>(to) % 16 || (bytes && reinterpret_cast<uintptr_t>(from) % 16))
    fail(where, "cp.async: an address is not 16-byte aligned");
  // Without bytes to read the source is anywhere, which may be where shared memory happens to begin.
  if (!in_shared_memory(to) || (bytes && in_shared_memory(from)))
    fail(where, "cp.async: not from global to shared memory");
  if (lane->copy_count == Lane::most_copies)
    fail(where, "cp.async: more than %d copies in flight in a thread", Lane::most_copies);
  note_write(to, 16);
  auto* words = static_cast<uint64_t*>(to);
  words[0] = words[1] = ~uint64_t{0};
  lane->copies[lane->copy_count++] = {to, from, bytes};
  lane->copied_at = where;
}

void Engine::commit_copies(Where where) {
  if (lane->group_count == Lane::most_groups)
    fail(where, "cp.async: more than %d groups in flight in a thread", Lane::most_groups);
  lane->groups[lane->group_count++] = lane->copy_count;
}

namespace {

void land(const AsyncCopy& copy) {
  note_read(copy.from, static_cast<size_t>(copy.bytes));
  note_write(copy.to, 16);
  char* to = static_cast<char*>(copy.to);
  const char* from = static_cast<const char*>(copy.from);
  for (int i = 0; i < 16; ++i) to[i] = i < copy.bytes ? from[i] : 0;
}

}  // namespace

// Lands all groups but the last groups_left.
void Engine::wait_for_copies(int groups_left) {
  Lane& l = *lane;
  const int landed_groups = l.group_count - groups_left;
  if (landed_groups <= 0) return;
  const int landed = l.groups[landed_groups - 1];
  for (int i = 0; i < landed; ++i) land(l.copies[i]);
  for (int i = landed; i < l.copy_count; ++i) l.copies[i - landed] = l.copies[i];
  for (int i = landed_groups; i < l.group_count; ++i) l.groups[i - landed_groups] = l.groups[i] - landed;
  l.copy_count -= landed;
  l.group_count = groups_left;
}

}  // namespace orpo::emulator
