// Where CUDA threads meet: the block's barrier, and the warp's collectives.
#include "cuda/emulator/engine.h"
#include "cuda/emulator/sanitizers.h"

namespace orpo::emulator {

namespace {

// Two phases each: who leaves late must learn nothing of the next round.
constexpr int barrier_order(unsigned phase) { return static_cast<int>(phase % 2) * 8; }
constexpr int warp_order(int warp, unsigned phase) { return 16 + warp * 16 + static_cast<int>(phase % 2) * 8; }

}  // namespace

void Engine::barrier(Where where) {
  if (at_barrier_count_ && (barrier_where_.line() != where.line() || barrier_where_.file_name() != where.file_name()))
    fail(where, "divergent __syncthreads: others wait at %s:%u", barrier_where_.file_name(), barrier_where_.line());
  if (finished_) fail(where, "__syncthreads after some threads of the block returned");
  barrier_where_ = where;
  char* order = orders_ + barrier_order(barrier_phase_);
  release(order);
  if (at_barrier_count_ + 1 < count_) {
    at_barrier_[at_barrier_count_++] = lane;
    wait_here("__syncthreads", where);
  } else {
    wake(at_barrier_, at_barrier_count_);
    at_barrier_count_ = 0;
    ++barrier_phase_;
    let_others_go_first();
  }
  acquire(order);
}

void Engine::collective(uint32_t mask, const char* operation, Where where, const void* in, void* out, Compute compute,
                        const void* context) {
  const int warp_number = lane->linear / 32, self = lane->linear % 32, threads = count_ - warp_number * 32;
  Warp& warp = warps_[warp_number];
  if (!(mask >> self & 1)) fail(where, "%s: the calling lane is not in its mask", operation);
  if (threads < 32 && mask >> threads) fail(where, "%s: the mask names lanes beyond blockDim", operation);
  Collective *meeting = nullptr, *free = nullptr;
  for (Collective& pending : warp.pending) {
    if (pending.mask == mask)
      meeting = &pending;
    else if (pending.mask == 0)
      free = &pending;
    else if (pending.mask & mask)
      fail(where, "%s: its mask overlaps that of a pending %s at %s:%u", operation, pending.operation,
           pending.where.file_name(), pending.where.line());
  }
  if (!meeting) {
    if (!free) fail(where, "%s: too many collectives are pending in the warp", operation);
    meeting = free;
    meeting->mask = mask, meeting->arrived = 0, meeting->operation = operation, meeting->where = where;
    meeting->order = orders_ + warp_order(warp_number, warp.phase);
  } else if (meeting->operation != operation || meeting->where.line() != where.line()) {
    fail(where, "divergent warp: %s here, %s at %s:%u", operation, meeting->operation, meeting->where.file_name(),
         meeting->where.line());
  }
  meeting->in[self] = in, meeting->out[self] = out;
  meeting->arrived |= 1u << self;
  void* order = meeting->order;
  release(order);
  if (meeting->arrived != mask) {
    wait_here(operation, where);
  } else {
    acquire(order);
    if (compute) compute(*meeting, context);
    release(order);
    ++warp.phase;
    Lane* others[32];
    int count = 0;
    for (uint32_t m = mask & ~(1u << self); m; m &= m - 1)
      others[count++] = &lanes_[warp_number * 32 + std::countr_zero(m)];
    meeting->mask = 0;
    wake(others, count);
    let_others_go_first();
  }
  acquire(order);
}

}  // namespace orpo::emulator
