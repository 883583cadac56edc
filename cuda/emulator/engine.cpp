// Blocks, threads and who goes next.
#include "cuda/emulator/engine.h"

#include <cstdarg>
#include <cstdio>
#include <numeric>
#include <utility>

#include "cuda/emulator/sanitizers.h"

namespace orpo::emulator {

void fiber_entry() { engine->fiber_loop(); }

Engine::~Engine() {
  for (Fiber* fiber : fibers_) destroy(fiber);
}

// ---- a launch, a block

void Engine::run(Launch& l) {
  engine = this;
  launch = &l;
  adopt_current_thread(main_);
  acquire(&l.started);
  const uint64_t blocks = uint64_t{l.grid.x} * l.grid.y * l.grid.z;
  for (uint64_t turn; !l.failed && (turn = l.next_block++) < blocks;) run_block(block_at(turn, blocks));
  acquire(&l.ended);
}

// random: turn -> stride * turn + start, modulo the number of blocks, with a stride that shares no factor with it.
uint64_t Engine::block_at(uint64_t turn, uint64_t blocks) const {
  if (settings.order == Order::forward) return turn;
  if (settings.order == Order::reverse) return blocks - 1 - turn;
  uint64_t stride = settings.seed * 0x9e3779b97f4a7c15u % blocks | 1;
  while (std::gcd(stride, blocks) != 1) stride += 2;
  return (turn * (stride % blocks) + settings.seed) % blocks;
}

void Engine::run_block(uint64_t number) {
  const dim3& grid = launch->grid;
  block = {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
           static_cast<unsigned>(number / grid.x / grid.y)};
  place_threads(number);
  clear_shared_memory();
  choose_fibers();
  release(&block_started_);
  bool fresh;
  running_ = &main_;
  resume(next(fresh), true);
  ++blocks_run_;
  if (launch->failed) abandon_fibers();
}

void Engine::place_threads(uint64_t block_number) {
  const dim3& size = launch->block;
  count_ = static_cast<int>(size.x * size.y * size.z);
  started_ = finished_ = at_barrier_count_ = 0;
  ready_head_ = ready_tail_ = 0;
  random_state_ = (settings.seed + 1) * 0x9e3779b97f4a7c15u ^ (block_number + 1) * 0xbf58476d1ce4e5b9u;
  for (int i = 0; i < count_; ++i) {
    Lane& l = lanes_[i];
    const unsigned n = static_cast<unsigned>(i);
    l.index = {n % size.x, n / size.x % size.y, n / size.x / size.y};
    l.linear = i;
    l.state = Lane::unstarted;
    l.copy_count = l.group_count = 0;
    starts_[i] = settings.order == Order::reverse ? count_ - 1 - i : i;
  }
  if (settings.order == Order::random)
    for (int i = count_ - 1; i > 0; --i) std::swap(starts_[i], starts_[random() % static_cast<unsigned>(i + 1)]);
  for (int w = 0; w < (count_ + 31) / 32; ++w)
    for (Collective& free : warps_[w].pending) free.mask = 0;
}

// Any fiber serves any CUDA thread, but for ThreadSanitizer, where a fiber is a thread: there each thread of a block
// has its own, and two sets take turns, rotated, so that neither program order nor a barrier orders a block before the
// next one. So races between blocks show.
void Engine::choose_fibers() {
  if (!thread_sanitizer) return;
  while (fibers_.size() < 2 * static_cast<size_t>(count_))
    fibers_.push_back(make_fiber(settings.stack_bytes, static_cast<int>(fibers_.size())));
  free_.clear();
  for (int i = 0; i < count_; ++i)
    free_.push_back(fibers_[(blocks_run_ % 2) * count_ + (i + blocks_run_ / 2) % count_]);
}

void Engine::abandon_fibers() {
  for ([[maybe_unused]] Fiber* fiber : fibers_) {
    THREAD_SANITIZER_ONLY(__tsan_switch_to_fiber(fiber->thread_sanitizer, __tsan_switch_to_fiber_no_sync);
                          release(&launch->ended));
  }
  THREAD_SANITIZER_ONLY(__tsan_switch_to_fiber(main_.thread_sanitizer, __tsan_switch_to_fiber_no_sync));
  for (Fiber* fiber : fibers_) rewind(*fiber);
  free_ = fibers_;
}

// ---- who goes next

uint32_t Engine::random() {  // xorshift
  random_state_ ^= random_state_ << 13, random_state_ ^= random_state_ >> 7, random_state_ ^= random_state_ << 17;
  return static_cast<uint32_t>(random_state_ >> 32);
}

void Engine::push(Lane* l) { ready_[ready_tail_++ % most_fibers] = l; }

// forward: first in, first out. reverse: last in, first out. random: any.
Lane* Engine::pop() {
  if (settings.order == Order::reverse) return ready_[--ready_tail_ % most_fibers];
  if (settings.order == Order::random)
    std::swap(ready_[ready_head_ % most_fibers],
              ready_[(ready_head_ + random() % (ready_tail_ - ready_head_)) % most_fibers]);
  return ready_[ready_head_++ % most_fibers];
}

// A thread that woke, or one that has not started (then `fresh`); null where there is neither.
Lane* Engine::next(bool& fresh) {
  bool woken = ready_head_ != ready_tail_;
  const bool unstarted = started_ < count_;
  if (woken && unstarted && settings.order == Order::random) woken = random() & 1;
  fresh = !woken && unstarted;
  return woken ? pop() : fresh ? &lanes_[starts_[started_++]] : nullptr;
}

Fiber* Engine::take_fiber() {
  if (free_.empty()) {
    fibers_.push_back(make_fiber(settings.stack_bytes, static_cast<int>(fibers_.size())));
    free_.push_back(fibers_.back());
  }
  Fiber* fiber = free_.back();
  free_.pop_back();
  return fiber;
}

void Engine::switch_to(Fiber* fiber) {
  if (fiber != running_) switch_fibers(*std::exchange(running_, fiber), *fiber);
}

void Engine::resume(Lane* l, bool fresh) {
  if (fresh)
    l->fiber = take_fiber(), starting_ = l;
  else
    l->state = Lane::running, lane = l;
  switch_to(l->fiber);
}

// The running thread waits; others run until one of them wakes it.
void Engine::wait_here(const char* what, Where where) {
  Lane* self = lane;
  self->state = Lane::waiting, self->waits_for = what, self->where = where;
  bool fresh;
  Lane* other = next(fresh);
  if (!other) deadlock();
  resume(other, fresh);
  lane = self;
}

void Engine::wake(Lane* const* lanes, int count) {
  for (int i = 0; i < count; ++i) push(lanes[settings.order == Order::reverse ? count - 1 - i : i]);
}

// After a thread completed a collective: does it go on first?
void Engine::let_others_go_first() {
  if (settings.order == Order::forward || (settings.order == Order::random && (random() & 1))) return;
  push(lane);
  wait_here("its turn", Where());
}

// Runs threads one after another on this stack, for as long as none of them waits.
void Engine::fiber_loop() {
  for (;;) {
    Lane* l = lane = starting_;
    l->state = Lane::running;
    acquire(&block_started_);
    launch->run_thread(launch->arguments);
    finish(l);
    bool fresh;
    Lane* other = next(fresh);
    if (!other && finished_ < count_) deadlock();
    if (!thread_sanitizer) {
      free_.push_back(l->fiber);
      if (other && fresh) {  // no switch at all
        other->fiber = take_fiber();
        starting_ = other;
        continue;
      }
    }
    if (other)
      resume(other, fresh);
    else
      switch_to(&main_);
  }
}

void Engine::finish(Lane* l) {
  if (l->copy_count) fail(l->copied_at, "a thread ends with cp.async copies that it never waited for");
  l->state = Lane::finished;
  ++finished_;
  release(&launch->ended);
  if (at_barrier_count_) fail(barrier_where_, "a thread returned while others wait in __syncthreads");
}

// ---- what a kernel does wrong

// Leaves the fibers where they are; launch() throws.
void Engine::fail(Where where, const char* format, ...) {
  char message[700], text[sizeof Launch::error];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  const uint3& t = lane->index;
  snprintf(text, sizeof text, "%s [block (%u, %u, %u), thread (%u, %u, %u), %s:%u]", message, block.x, block.y, block.z,
           t.x, t.y, t.z, *where.file_name() ? where.file_name() : "at its end", where.line());
  if (!launch->failed.exchange(true)) std::copy(text, text + sizeof text, launch->error);
  switch_to(&main_);
  __builtin_unreachable();
}

void Engine::deadlock() {
  char places[500] = "";
  size_t length = 0;
  const Lane* previous = nullptr;
  for (int i = 0, shown = 0; i < count_ && shown < 5; ++i) {
    const Lane& l = lanes_[i];
    if (l.state != Lane::waiting) continue;
    if (!previous || previous->where.line() != l.where.line()) {
      length +=
          static_cast<size_t>(snprintf(places + length, sizeof places - length, " thread %d on in %s at %.60s:%u;", i,
                                       l.waits_for, l.where.file_name(), l.where.line()));
      ++shown;
    }
    previous = &l;
  }
  fail(lane->state == Lane::waiting ? lane->where : Where(), "deadlock:%s %d of %d threads returned", places, finished_,
       count_);
}

}  // namespace orpo::emulator
