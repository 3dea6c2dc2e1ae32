// CUDA's execution model in plain C++, so that tests run kernels without a GPU: csrc/common/device.cuh says which names there are.
//
// Blocks run one after the other, threads as fibres of one processor thread, in random orders drawn from the launcher's seed. What would be
// luck on a GPU is an error here, thrown as std::runtime_error with block and thread:
//   - an index outside of an array in shared memory or of an argument in global memory; a misaligned vector access
//   - two accesses to the same shared memory by different threads, at least one of them writing and not both atomic, with no barrier between
//   - a read of shared memory that nobody wrote in this block; any access to it while an asynchronous copy to it is under way
//   - a barrier or a warp operation that some of the threads it waits for do not reach, a mask without the calling lane
// Shared memory holds 0xff bytes (a NaN in every float type) when a block starts, and so does what a lane takes from one outside its mask.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "fibre.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace fastdiff {
namespace emulation {

[[noreturn]] inline void fail(const std::string& what) {
  auto at = [](const dim3& i) { return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")"; };
  throw std::runtime_error("block " + at(blockIdx) + ", thread " + at(threadIdx) + ": " + what);
}

struct Random {
  uint64_t state;
  uint64_t next() {  // splitmix64
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
  }
  size_t below(size_t n) { return next() % n; }
};

enum class State { ready, block, warp, done };

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  size_t bytes;
};

struct Thread {
  std::unique_ptr<Fibre> fibre;
  dim3 index;
  State state;
  const char* operation;  // that it waits in
  uint32_t mask;
  void* offer;  // its arguments of a warp operation
  std::vector<std::vector<Copy>> groups;  // asynchronous copies: the last group is still open
};

// Two bytes of shared memory: who touched them last, and in which interval between barriers of the block and of the warp.
struct Touched {
  static constexpr int kNobody = -1, kSeveral = -2;
  struct By {
    int thread = kNobody, warp = kNobody;
    uint32_t block_interval = 0, warp_interval = 0;
    bool atomic = false;
  } write, read;
  bool arriving = false;  // an asynchronous copy to it is under way
};

// What the warps' accesses cost, the k-th shared (global) access of each lane taken as one instruction: wavefronts of shared memory (32 banks of
// 4 bytes; 8 lanes at a time for 16 bytes each, 16 for 8) and sectors of global memory (32 bytes), and the least that could do.
struct Counts {
  int64_t wavefronts = 0, least_wavefronts = 0, sectors = 0, least_sectors = 0;
};

struct Access {
  size_t at, bytes;
  int lane;
};

class Block {
 public:
  static inline Block* now = nullptr;

  std::vector<Thread> threads;
  size_t current = 0, size = 0;
  Random random{0};
  std::unique_ptr<unsigned char[]> memory;
  size_t shared = 0;
  std::vector<Touched> touched;
  uint32_t interval = 0;
  std::vector<uint32_t> warp_interval;
  std::function<void()> body;
  std::string error;
  int votes = 0, counted = 0;
  Counts* counts = nullptr;

  int lane() const { return current % 32; }
  Thread& thread() { return threads[current]; }

  void run() {
    now = this;
    memory.reset(new (std::align_val_t{128}) unsigned char[shared + 1]);
    std::memset(memory.get(), 0xff, shared);
    touched.assign((shared + 1) / 2, {});
    interval = 0;
    warp_interval.assign((size + 31) / 32, 0);
    std::fill(std::begin(arrived_), std::end(arrived_), 0);
    while (threads.size() < size) threads.emplace_back().fibre = std::make_unique<Fibre>();
    ready_.clear();
    for (size_t i = 0; i < size; ++i) {
      Thread& t = threads[i];
      t.index = {static_cast<unsigned>(i % blockDim.x), static_cast<unsigned>(i / blockDim.x % blockDim.y),
                 static_cast<unsigned>(i / blockDim.x / blockDim.y)};
      t.groups.assign(1, {});
      t.fibre->start(enter);
      wake(i);
    }
    for (auto& log : logs_) log.assign(counts ? (size + 31) / 32 : 0, {});
    for (auto& made : made_) made.assign(size, 0);
    error.clear();
    while (!ready_.empty()) {
      const size_t at = random.below(ready_.size());
      current = ready_[at];
      ready_[at] = ready_.back();
      ready_.pop_back();
      threadIdx = thread().index;
      thread().fibre->resume();
      if (!error.empty()) throw std::runtime_error(error);
    }
    if (const std::string stuck = waiting(); !stuck.empty()) {
      threadIdx = thread().index;
      fail("some threads of the block wait for others that never come: " + stuck);
    }
    if (counts) count();
  }

  void record(bool in_shared, const void* p, size_t bytes) {
    if (!counts) return;
    auto& warp = logs_[in_shared][current / 32];
    const size_t k = made_[in_shared][current]++;
    if (warp.size() <= k) warp.resize(k + 1);
    warp[k].push_back({reinterpret_cast<uintptr_t>(p), bytes, lane()});
  }

  // An access to shared memory by the current thread.
  void access(const void* p, size_t bytes, bool writes, bool atomic = false) {
    record(true, p, bytes);
    touch(p, bytes, writes, atomic);
  }

  void wake(size_t i) {
    threads[i].state = State::ready;
    ready_.push_back(i);
  }

  void wait(State state, const char* operation) {
    thread().state = state;
    thread().operation = operation;
    thread().fibre->suspend();
  }

  // The current thread at barrier `id` of `expected` threads. last() runs once, when all are there.
  template <class Last>
  void meet(const char* operation, int id, size_t expected, const Last& last) {
    thread().mask = id;
    if (++arrived_[id] < expected) return wait(State::block, operation);
    for (size_t i = 0; i < size; ++i) {
      if (threads[i].state != State::block || threads[i].mask != static_cast<uint32_t>(id)) continue;
      if (std::strcmp(threads[i].operation, operation)) fail("thread " + std::to_string(i) + " is in " + threads[i].operation + ", this one in " + operation);
      wake(i);
    }
    arrived_[id] = 0;
    last();
  }

  void arriving(const void* p, size_t bytes, bool yes) {
    const size_t first = (static_cast<const unsigned char*>(p) - memory.get()) / 2;
    for (size_t i = first; i < first + bytes / 2; ++i) touched[i].arriving = yes;
  }

  void touch(const void* p, size_t bytes, bool writes, bool atomic = false) {
    const size_t first = (static_cast<const unsigned char*>(p) - memory.get()) / 2, end = first + (bytes + 1) / 2;
    const int me = static_cast<int>(current), warp = me / 32;
    const auto clashes = [&](const Touched::By& by) {
      if (by.thread == Touched::kNobody || by.thread == me || by.block_interval != interval) return false;
      return !(by.warp == warp && by.warp_interval < warp_interval[warp]) && !(by.atomic && atomic);
    };
    const auto other = [&](const Touched::By& by) { return by.thread >= 0 ? "thread " + std::to_string(by.thread) : std::string("others"); };
    for (size_t i = first; i < end; ++i) {
      Touched& t = touched[i];
      if (t.arriving) fail("byte " + std::to_string(2 * i) + " of shared memory: a copy to it is under way");
      if (clashes(t.write)) fail(std::string("race: ") + (writes ? "writes" : "reads") + " byte " + std::to_string(2 * i) +
                                 " of shared memory, which " + other(t.write) + " wrote, and no barrier is between");
      if (writes && clashes(t.read)) fail("race: writes byte " + std::to_string(2 * i) + " of shared memory, which " + other(t.read) +
                                          " read, and no barrier is between");
      if ((!writes || atomic) && t.write.thread == Touched::kNobody) fail("reads shared memory that nobody wrote, byte " + std::to_string(2 * i));
      const Touched::By by{me, warp, interval, warp_interval[warp], atomic};
      if (writes) t.write = by;
      if (writes && !atomic) t.read = {};
      if (!writes) {
        Touched::By& r = t.read;
        const bool same = r.thread != Touched::kNobody && r.block_interval == interval;
        const int reader = same && r.thread != me ? Touched::kSeveral : me, readers = same && r.warp != warp ? Touched::kSeveral : warp;
        r = by;
        r.thread = reader, r.warp = readers;
      }
    }
  }

 private:
  std::vector<size_t> ready_;
  size_t arrived_[16];  // by barrier; 0 is __syncthreads
  std::vector<std::vector<std::vector<Access>>> logs_[2];  // global, shared: warp, number of the access, lanes
  std::vector<size_t> made_[2];

  // Different values in a list, which it sorts.
  static int64_t different(std::vector<size_t>& values) {
    std::sort(values.begin(), values.end());
    return std::unique(values.begin(), values.end()) - values.begin();
  }

  void count() {
    for (const auto& warp : logs_[1])
      for (const auto& lanes : warp) {
        const int together = static_cast<int>(128 / std::max<size_t>(lanes[0].bytes, 4));
        for (int first = 0; first < 32; first += together) {
          std::vector<size_t> words[32];
          for (const Access& a : lanes)
            if (a.lane >= first && a.lane < first + together)
              for (size_t word = a.at / 4; word <= (a.at + a.bytes - 1) / 4; ++word) words[word % 32].push_back(word);
          int64_t most = 0;
          for (auto& bank : words) most = std::max(most, different(bank));
          counts->wavefronts += most, counts->least_wavefronts += most > 0;
        }
      }
    for (const auto& warp : logs_[0])
      for (const auto& lanes : warp) {
        std::vector<size_t> sectors, halves;
        for (const Access& a : lanes)
          for (size_t byte = a.at; byte < a.at + a.bytes; byte += 2) sectors.push_back(byte / 32), halves.push_back(byte / 2);
        counts->sectors += different(sectors), counts->least_sectors += (different(halves) + 15) / 16;
      }
  }

  static void enter() {
    Block& b = *now;
    try {
      b.body();
    } catch (const std::exception& e) {
      b.error = e.what();
    }
    b.wait(State::done, nullptr);
  }

  std::string waiting() const {
    std::string out;
    size_t done = 0;
    for (size_t i = 0; i < size; ++i) {
      if (threads[i].state == State::done) ++done;
      else if (out.size() < 200) out += (out.empty() ? "" : ", ") + std::to_string(i) + " in " + threads[i].operation;
    }
    return out.empty() ? out : out + "; " + std::to_string(done) + " have ended";
  }
};

inline void meet_block(const char* operation) {
  Block& b = *Block::now;
  b.meet(operation, 0, b.size, [&] { ++b.interval; });
}

// What the lanes of a mask do together: the last that comes runs combine(offers), offers[lane] null outside of the mask.
template <class Offer, class Combine>
void meet_warp(const char* operation, uint32_t mask, Offer& mine, const Combine& combine) {
  Block& b = *Block::now;
  const size_t first = b.current / 32 * 32;
  if (!(mask >> b.lane() & 1)) fail(std::string(operation) + ": the mask does not name the calling lane " + std::to_string(b.lane()));
  b.thread().offer = &mine;
  b.thread().mask = mask;
  Offer* offers[32] = {};
  for (int l = 0; l < 32; ++l) {
    if (!(mask >> l & 1) || l == b.lane()) continue;
    if (first + l >= b.size) fail(std::string(operation) + ": the mask names lane " + std::to_string(l) + ", which the block does not have");
    const Thread& t = b.threads[first + l];
    if (t.state != State::warp || t.mask != mask || std::strcmp(t.operation, operation)) return b.wait(State::warp, operation);
    offers[l] = static_cast<Offer*>(t.offer);
  }
  offers[b.lane()] = &mine;
  combine(offers);
  for (int l = 0; l < 32; ++l)
    if (offers[l] && l != b.lane()) b.wake(first + l);
}

template <class T>
T poison() {
  T x;
  std::memset(static_cast<void*>(&x), 0xff, sizeof x);
  return x;
}

// source(lane) -> the lane that this one reads.
template <class T, class Source>
T shuffle(const char* operation, uint32_t mask, T value, const Source& source) {
  static_assert(std::is_trivially_copyable_v<T>);
  struct Offer { T value, result; int from; } mine{value, value, source(Block::now->lane())};
  meet_warp(operation, mask, mine, [](Offer* (&all)[32]) {
    for (Offer* o : all)
      if (o) o->result = all[o->from] ? all[o->from]->value : poison<T>();
  });
  return mine.result;
}

inline uint32_t ballot(const char* operation, uint32_t mask, bool vote) {
  struct Offer { bool vote; uint32_t result; } mine{vote, 0};
  meet_warp(operation, mask, mine, [](Offer* (&all)[32]) {
    uint32_t votes = 0;
    for (int l = 0; l < 32; ++l)
      if (all[l] && all[l]->vote) votes |= 1u << l;
    for (Offer* o : all)
      if (o) o->result = votes;
  });
  return mine.result;
}

inline int count_block(const char* operation, bool vote) {
  Block& b = *Block::now;
  b.votes += vote;
  b.meet(operation, 0, b.size, [&] { ++b.interval, b.counted = b.votes, b.votes = 0; });
  return b.counted;
}

// A pointer that knows its array.
template <class T, bool shared>
class Checked;

// An element of shared memory: converts to T and takes assignments, and both are seen.
template <class T>
class Element {
 public:
  explicit Element(T* at) : at_(at) {}
  Element(const Element&) = default;
  operator std::remove_const_t<T>() const {
    Block::now->access(at_, sizeof(T), false);
    return *at_;
  }
  T operator=(T x) const {
    Block::now->access(at_, sizeof(T), true);
    return *at_ = x;
  }
  T operator=(const Element& x) const { return *this = static_cast<T>(x); }
  T operator+=(T x) const { return *this = static_cast<T>(*this) + x; }
  T operator-=(T x) const { return *this = static_cast<T>(*this) - x; }
  T operator*=(T x) const { return *this = static_cast<T>(*this) * x; }
  T operator|=(T x) const { return *this = static_cast<T>(*this) | x; }
  Checked<T, true> operator&() const;

 private:
  T* at_;
};

template <class T, bool shared>
class Checked {
 public:
  Checked() = default;
  Checked(std::nullptr_t) {}
  Checked(T* at, T* first, T* last) : at_(at), first_(first), last_(last) {}
  template <class U, class = std::enable_if_t<std::is_same_v<const U, T> && !std::is_same_v<U, T>>>
  Checked(const Checked<U, shared>& p) : at_(p.at()), first_(p.first()), last_(p.last()) {}

  decltype(auto) operator[](int64_t i) const {
    T* p = check(i, 1);
    if constexpr (shared) return Element<T>(p);
    else return static_cast<T&>(*p);
  }
  decltype(auto) operator*() const { return (*this)[0]; }
  Checked operator+(int64_t i) const { return {at_ + i, first_, last_}; }
  Checked operator-(int64_t i) const { return {at_ - i, first_, last_}; }
  Checked& operator+=(int64_t i) { return at_ += i, *this; }
  Checked& operator-=(int64_t i) { return at_ -= i, *this; }
  Checked& operator++() { return ++at_, *this; }
  int64_t operator-(const Checked& p) const { return at_ - p.at_; }
  bool operator==(const Checked& p) const { return at_ == p.at_; }
  explicit operator bool() const { return at_ != nullptr; }

  // The address of elements i to i + n - 1, which must be in the array, n > 1 together aligned.
  T* check(int64_t i, int64_t n) const {
    T* p = at_ + i;
    if (p < first_ || p + n > last_)
      fail(std::string(shared ? "shared" : "global") + " memory: element " + std::to_string(p - first_) + (n > 1 ? " and on" : "") + " of " +
           std::to_string(last_ - first_));
    if (reinterpret_cast<uintptr_t>(p) % (n * sizeof(T))) fail("an access of " + std::to_string(n * sizeof(T)) + " bytes is not aligned to them");
    if (!shared) Block::now->record(false, p, n * sizeof(T));
    return p;
  }
  T* at() const { return at_; }
  T* first() const { return first_; }
  T* last() const { return last_; }

 private:
  T *at_ = nullptr, *first_ = nullptr, *last_ = nullptr;
};

template <class T>
Checked<T, true> Element<T>::operator&() const { return {at_, at_, at_ + 1}; }

}  // namespace emulation

template <class T>
using Shared = emulation::Checked<T, true>;
template <class T>
using Global = emulation::Checked<T, false>;

template <class U, class T, bool shared>
emulation::Checked<U, shared> as(const emulation::Checked<T, shared>& p) {
  return {reinterpret_cast<U*>(p.at()), reinterpret_cast<U*>(p.first()), reinterpret_cast<U*>(p.last())};
}

template <class T, int n>
struct alignas(sizeof(T) * n) Pack {
  T value[n];
  T& operator[](int i) { return value[i]; }
  const T& operator[](int i) const { return value[i]; }
};

template <int n, class T, bool shared>
Pack<std::remove_const_t<T>, n> load(const emulation::Checked<T, shared>& p) {
  static_assert(sizeof(T) * n <= 16);
  Pack<std::remove_const_t<T>, n> x;
  const T* at = p.check(0, n);
  if (shared) emulation::Block::now->access(at, sizeof x, false);
  std::memcpy(static_cast<void*>(&x), at, sizeof x);
  return x;
}

template <class T, int n, bool shared>
void store(const emulation::Checked<T, shared>& p, const Pack<T, n>& x) {
  static_assert(sizeof(T) * n <= 16);
  T* at = p.check(0, n);
  if (shared) emulation::Block::now->access(at, sizeof x, true);
  std::memcpy(static_cast<void*>(at), &x, sizeof x);
}

template <class T>
constexpr size_t arena_bytes(size_t n) { return (n * sizeof(T) + 15) / 16 * 16; }

class Arena {
 public:
  template <class T>
  Shared<T> take(size_t n) {
    emulation::Block& b = *emulation::Block::now;
    T* first = reinterpret_cast<T*>(b.memory.get() + used_);
    used_ += arena_bytes<T>(n);
    if (used_ > b.shared)
      emulation::fail("the arena takes " + std::to_string(used_) + " bytes of shared memory, the launch gave " + std::to_string(b.shared));
    return {first, first, first + n};
  }

 private:
  size_t used_ = 0;
};

struct Launcher {
  uint64_t seed = 0;
  int architecture = 80;
  emulation::Counts* counts = nullptr;  // to be added to

  template <class... P, class... A>
  void operator()(void (*kernel)(P...), dim3 blocks, dim3 threads, size_t shared, A... arguments) const {
    static emulation::Block block;  // keeps its stacks
    block.random.state = seed;
    block.counts = counts;
    block.shared = shared;
    block.size = size_t{threads.x} * threads.y * threads.z;
    if (block.size == 0 || block.size > 1024) throw std::runtime_error("a block has 1 to 1024 threads, not " + std::to_string(block.size));
    if (blocks.y > 65535 || blocks.z > 65535) throw std::runtime_error("a grid has at most 65535 blocks along y and z");
    if (const size_t most = (architecture < 90 ? 163 : 227) << 10; shared > most)
      throw std::runtime_error("a block has at most " + std::to_string(most) + " bytes of shared memory, not " + std::to_string(shared));
    block.body = [&] { kernel(arguments...); };
    blockDim = threads, gridDim = blocks;
    std::vector<size_t> order(size_t{blocks.x} * blocks.y * blocks.z);
    if (order.empty()) throw std::runtime_error("a grid has at least one block");
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[block.random.below(i)]);
    for (size_t i : order) {
      blockIdx = {static_cast<unsigned>(i % blocks.x), static_cast<unsigned>(i / blocks.x % blocks.y),
                  static_cast<unsigned>(i / blocks.x / blocks.y)};
      block.run();
    }
  }
};

// Storage types; arithmetic is in float.
template <int exponent_bits>
struct Half {
  uint16_t bits;
};
using bf16 = Half<8>;
using f16 = Half<5>;

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return from_bits(uint32_t{x.bits} << 16); }
inline float to_float(f16 x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                                    : std::ldexp(static_cast<float>(exponent ? 1024 + fraction : fraction), (exponent ? exponent : 1) - 25);
  return x.bits >> 15 ? -size : size;
}

template <class T>
T from_float(float x) {
  if constexpr (std::is_same_v<T, bf16>) {
    const uint32_t bits = to_bits(x);
    if (x != x) return {static_cast<uint16_t>(bits >> 16 | 64)};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  } else if constexpr (std::is_same_v<T, f16>) {
    const uint16_t sign = to_bits(x) >> 16 & 0x8000;
    const float size = std::fabs(x);
    if (x != x) return {0x7fff};
    if (size >= 65520.f) return {static_cast<uint16_t>(sign | 0x7c00)};
    int exponent = -14;
    if (size >= std::ldexp(1.f, -14)) std::frexp(size, &exponent), --exponent;
    const auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, 10 - exponent)));  // 1024..2048 unless subnormal
    return {static_cast<uint16_t>(sign | (units + (static_cast<uint32_t>(exponent + 14) << 10)))};
  } else {
    return x;
  }
}

template <class T>
uint32_t pair(float low, float high) {
  return from_float<T>(low).bits | uint32_t{from_float<T>(high).bits} << 16;
}

template <class T>
void split(uint32_t bits, float& low, float& high) {
  low = to_float(T{static_cast<uint16_t>(bits)}), high = to_float(T{static_cast<uint16_t>(bits >> 16)});
}

inline float exp2_approx(float x) { return std::exp2(x); }
inline uint32_t to_tf32(float x) { return (to_bits(x) + 0x1000) & 0xffffe000; }

inline void barrier(int id, int threads) {
  emulation::Block& b = *emulation::Block::now;
  if (id < 1 || id > 15 || threads % 32) emulation::fail("barrier: id from 1 to 15, whole warps");
  // To the race detector it is a barrier of the whole block: it may overlook a race, and never sees one that is not.
  b.meet("barrier", id, threads, [&] { ++b.interval; });
}

}  // namespace fastdiff

inline void __syncthreads() { fastdiff::emulation::meet_block("__syncthreads"); }
inline int __syncthreads_count(int x) { return fastdiff::emulation::count_block("__syncthreads_count", x); }
inline int __syncthreads_or(int x) { return fastdiff::emulation::count_block("__syncthreads_or", x) > 0; }
inline int __syncthreads_and(int x) { return fastdiff::emulation::count_block("__syncthreads_and", !x) == 0; }

inline void __syncwarp(unsigned mask = 0xffffffff) {
  char none = 0;
  auto& b = *fastdiff::emulation::Block::now;
  fastdiff::emulation::meet_warp("__syncwarp", mask, none, [&](auto&) { ++b.warp_interval[b.current / 32]; });
}

template <class T>
T __shfl_sync(unsigned mask, T x, int source, int width = 32) {
  return fastdiff::emulation::shuffle("__shfl_sync", mask, x, [=](int l) { return (l & ~(width - 1)) + (source & (width - 1)); });
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, unsigned delta, int width = 32) {
  return fastdiff::emulation::shuffle("__shfl_up_sync", mask, x, [=](int l) { return l % width < static_cast<int>(delta) ? l : l - static_cast<int>(delta); });
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, unsigned delta, int width = 32) {
  return fastdiff::emulation::shuffle("__shfl_down_sync", mask, x, [=](int l) { return l % width + static_cast<int>(delta) >= width ? l : l + static_cast<int>(delta); });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int bits, int width = 32) {
  return fastdiff::emulation::shuffle("__shfl_xor_sync", mask, x, [=](int l) { return (l ^ bits) < (l & ~(width - 1)) + width ? l ^ bits : l; });
}
inline unsigned __ballot_sync(unsigned mask, int x) { return fastdiff::emulation::ballot("__ballot_sync", mask, x); }
inline int __any_sync(unsigned mask, int x) { return fastdiff::emulation::ballot("__any_sync", mask, x) != 0; }
inline int __all_sync(unsigned mask, int x) { return fastdiff::emulation::ballot("__all_sync", mask, !x) == 0; }

// On &p[i]: a plain pointer in global memory, a Shared in shared memory.
namespace fastdiff::emulation {
template <class T, class F>
T atomically(T* at, const F& f) {
  const T old = *at;
  *at = f(old);
  return old;
}
template <class T, class F>
T atomically(const Checked<T, true>& p, const F& f) {
  T* at = p.check(0, 1);
  Block::now->access(at, sizeof(T), true, true);
  return atomically(at, f);
}
template <class T>
T value_of(T*);
template <class T>
T value_of(Checked<T, true>);
}  // namespace fastdiff::emulation
#define FASTDIFF_ATOMIC(name, expression)                                  \
  template <class P, class T = decltype(fastdiff::emulation::value_of(std::declval<P>()))> \
  T name(P at, std::type_identity_t<T> x) {                                \
    return fastdiff::emulation::atomically(at, [=](T old) -> T { return expression; }); \
  }
FASTDIFF_ATOMIC(atomicAdd, old + x)
FASTDIFF_ATOMIC(atomicMax, old > x ? old : x)
FASTDIFF_ATOMIC(atomicMin, old < x ? old : x)
FASTDIFF_ATOMIC(atomicExch, (void(old), x))
#undef FASTDIFF_ATOMIC
template <class P, class T = decltype(fastdiff::emulation::value_of(std::declval<P>()))>
T atomicCAS(P at, std::type_identity_t<T> expected, std::type_identity_t<T> x) {
  return fastdiff::emulation::atomically(at, [=](T old) { return old == expected ? x : old; });
}

inline void __threadfence() {}
inline void __threadfence_block() {}

using std::max;
using std::min;
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
template <class T>
T __ldg(const T* p) { return *p; }
inline unsigned __float_as_uint(float x) { return fastdiff::to_bits(x); }
inline int __float_as_int(float x) { return static_cast<int>(fastdiff::to_bits(x)); }
inline float __uint_as_float(unsigned x) { return fastdiff::from_bits(x); }
inline float __int_as_float(int x) { return fastdiff::from_bits(static_cast<unsigned>(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline void sincospif(float x, float* s, float* c) {
  *s = static_cast<float>(std::sin(M_PI * std::fmod(static_cast<double>(x), 2.0)));
  *c = static_cast<float>(std::cos(M_PI * std::fmod(static_cast<double>(x), 2.0)));
}
