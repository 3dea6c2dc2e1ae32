// Kernels of the harness's own tests: right as they stand, wrong where `bug` says so.
#include "bind.h"

using namespace fastdiff;
using emulation::Array;

// y = x in the order of the block's threads, reversed through shared memory.
__global__ void reverse(Global<const float> x, Global<float> y, int bug) {
  Arena arena;
  const Shared<float> s = arena.take<float>(blockDim.x);
  const int i = threadIdx.x, n = blockDim.x;
  s[bug == 2 ? i + 1 : i] = x[int64_t{blockIdx.x} * n + i];
  if (bug != 1) __syncthreads();
  if (bug == 3 && i == 0) return;
  const float value = s[n - 1 - i];
  if (bug == 3) __syncthreads();
  y[int64_t{blockIdx.x} * n + i + (bug == 4)] = value;
}
BIND(reverse, +[](uint64_t seed, int64_t threads, Array x, Array y, int64_t bug) {
  Launcher{seed}(reverse, x.size / threads, threads, arena_bytes<float>(threads - (bug == 5 ? 4 : 0)), x.as<const float>(), y.as<float>(), bug);
})

// y[block] = sum of its x: shuffles within warps, shared memory between them.
__global__ void sum(Global<const float> x, Global<float> y, int bug) {
  Arena arena;
  const Shared<float> partial = arena.take<float>(32);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float value = x[int64_t{blockIdx.x} * blockDim.x + threadIdx.x];
  const unsigned mask = bug == 1 ? 0xffff : 0xffffffff;
  if (bug == 2 && lane == 31) return;
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(mask, value, step);
  if (lane == 0) partial[warp] = value;
  __syncthreads();
  if (bug == 3) {  // only half of the warp says that it takes part, and reads the other half
    if (lane < 16) value = __shfl_down_sync(0xffff, value, 16);
    if (threadIdx.x == 0) y[blockIdx.x] = value;
    return;
  }
  if (warp == 0) {
    value = 0;
    if (lane < static_cast<int>(blockDim.x) / 32 + (bug == 4)) value = partial[lane];
    for (int step = 16; step > 0; step /= 2) value += __shfl_down_sync(0xffffffff, value, step);
    if (lane == 0) y[blockIdx.x] = value;
  }
}
BIND(sum, +[](uint64_t seed, int64_t threads, Array x, Array y, int64_t bug) {
  Launcher{seed}(sum, x.size / threads, threads, arena_bytes<float>(32), x.as<const float>(), y.as<float>(), bug);
})

// y = x through two buffers of copies under way, every thread reading what its neighbour's copy brought.
__global__ void stream(Global<const float> x, Global<float> y, int tiles, int bug) {
  Arena arena;
  const int n = 4 * blockDim.x, i = threadIdx.x, next = (i + 1) % blockDim.x;
  const Shared<float> buffer = arena.take<float>(2 * n);
  copy_async<4>(buffer + 4 * i, x + 4 * i);
  copy_async_commit();
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles) copy_async<4>(buffer + (tile + 1) % 2 * n + 4 * i, x + (tile + 1) * n + 4 * i);
    copy_async_commit();
    if (bug != 1) copy_async_wait<1>();
    if (bug != 2) __syncthreads();
    store(y + tile * n + 4 * next, load<4>(buffer + tile % 2 * n + 4 * next));
    if (bug != 3) __syncthreads();
  }
}
BIND(stream, +[](uint64_t seed, int64_t threads, int64_t tiles, Array x, Array y, int64_t bug) {
  Launcher{seed}(stream, 1, threads, arena_bytes<float>(8 * threads), x.as<const float>(), y.as<float>(), tiles, bug);
})

// Counts of 0 to 7, warps handing over by __syncwarp where there is only one.
__global__ void count(Global<const int> x, Global<int> y, int bug) {
  Arena arena;
  const Shared<int> s = arena.take<int>(8);
  if (threadIdx.x < 8) s[threadIdx.x] = 0;
  if (blockDim.x == 32) __syncwarp();
  else __syncthreads();
  const int value = x[int64_t{blockIdx.x} * blockDim.x + threadIdx.x];
  if (bug == 1) s[value] += 1;
  else atomicAdd(&s[value], 1);
  if (blockDim.x == 32 && bug != 2) __syncwarp();
  if (blockDim.x != 32 || bug == 3) __syncthreads();
  if (threadIdx.x < 8) atomicAdd(&y[threadIdx.x], static_cast<int>(s[threadIdx.x]));
}
BIND(count, +[](uint64_t seed, int64_t threads, Array x, Array y, int64_t bug) {
  Launcher{seed}(count, x.size / threads, threads, arena_bytes<int>(8), x.as<const int>(), y.as<int>(), bug);
})

// The order in which blocks and threads ran, between two barriers each; and that indices are CUDA's.
__global__ void order(Global<int> turn, Global<int> seen) {
  for (int round = 0; round < 2; ++round) {
    const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x, threads = blockDim.x * blockDim.y * blockDim.z;
    const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    seen[(block * 2 + round) * threads + thread] = atomicAdd(&turn[0], 1);
    __syncthreads();
  }
}
BIND(order, +[](uint64_t seed, Array turn, Array seen) { Launcher{seed}(order, {2, 3, 2}, {5, 3, 2}, 0, turn.as<int>(), seen.as<int>()); })

// d (16 x 8) = a (16 x K) b (K x 8): fragments by ldmatrix, b's transposed; or by plain loads for floats.
template <class T, int K>
__global__ void multiply(Global<const uint16_t> a, Global<const uint16_t> b, Global<float> d) {
  Arena arena;
  const Shared<T> s = arena.take<T>(16 * K), t = arena.take<T>(K * 8);
  const int lane = threadIdx.x;
  for (int i = lane; i < 16 * K; i += 32) as<uint16_t>(s)[i] = a[i];
  for (int i = lane; i < 8 * K; i += 32) as<uint16_t>(t)[i] = b[i];
  __syncwarp();
  uint32_t left[K / 4], right[K / 8];
  float sum[4] = {};
  load_matrices<K / 4>(left, s + lane % 16 * K + lane / 16 % (K / 8) * 8);
  load_matrices_transposed<K / 8>(right, t + lane % K * 8);
  mma<T>(sum, left, right);
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}
__global__ void multiply_tf32(Global<const float> a, Global<const float> b, Global<float> d) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  const uint32_t left[4] = {to_tf32(a[g * 8 + t]), to_tf32(a[(g + 8) * 8 + t]), to_tf32(a[g * 8 + t + 4]), to_tf32(a[(g + 8) * 8 + t + 4])};
  const uint32_t right[2] = {to_tf32(b[t * 8 + g]), to_tf32(b[(t + 4) * 8 + g])};
  float sum[4] = {};
  mma_tf32(sum, left, right);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + t * 2 + i % 2] = sum[i];
}
template <class T, int K>
static void launch_multiply(uint64_t seed, Array a, Array b, Array d) {
  Launcher{seed}(multiply<T, K>, 1, 32, arena_bytes<T>(16 * K) + arena_bytes<T>(8 * K), a.as<const uint16_t>(), b.as<const uint16_t>(), d.as<float>());
}
BIND(multiply_bf16_16, launch_multiply<bf16, 16>)
BIND(multiply_bf16_8, launch_multiply<bf16, 8>)
BIND(multiply_f16_16, launch_multiply<f16, 16>)
BIND(multiply_f16_8, launch_multiply<f16, 8>)
BIND(multiply_tf32, +[](uint64_t seed, Array a, Array b, Array d) {
  Launcher{seed}(multiply_tf32, 1, 32, 0, a.as<const float>(), b.as<const float>(), d.as<float>());
})

// Storage types there and back.
template <class T>
__global__ void convert(Global<const float> x, Global<T> y, Global<float> z) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  y[i] = from_float<T>(x[i]);
  float low, high;
  split<T>(pair<T>(x[i], -x[i]), low, high);
  z[i] = low == -high || x[i] != x[i] ? to_float(y[i]) : 0;
}
template <class T>
static void launch_convert(Array x, Array y, Array z) {
  Launcher{0}(convert<T>, x.size / 32, 32, 0, x.as<const float>(), y.as<T>(), z.as<float>());
}
BIND(convert_bf16, launch_convert<bf16>)
BIND(convert_f16, launch_convert<f16>)

// Widths and directions of shuffles, votes.
__global__ void exchange(Global<int> y, int by, int width) {
  const int lane = threadIdx.x;
  y[lane] = __shfl_sync(~0u, lane, by, width);
  y[32 + lane] = __shfl_up_sync(~0u, lane, by, width);
  y[64 + lane] = __shfl_down_sync(~0u, lane, by, width);
  y[96 + lane] = __shfl_xor_sync(~0u, lane, by, width);
  y[128 + lane] = static_cast<int>(__ballot_sync(~0u, lane % width == by));
  y[160 + lane] = __any_sync(~0u, lane == by) + 2 * __all_sync(~0u, lane < 32 - by) + 4 * __syncthreads_count(lane < by);
}
BIND(exchange, +[](uint64_t seed, Array y, int64_t by, int64_t width) { Launcher{seed}(exchange, 1, 32, 0, y.as<int>(), by, width); })

// Two pairs of warps that hand over through named barriers.
__global__ void hand_over(Global<int> y, int bug) {
  Arena arena;
  const Shared<int> s = arena.take<int>(128);
  const int i = threadIdx.x, half = i / 64;
  s[i] = i;
  if (bug != 1) barrier(1 + half, 64);
  y[i] = s[half * 64 + (i + 32) % 64];
}
BIND(hand_over, +[](uint64_t seed, Array y, int64_t bug) { Launcher{seed}(hand_over, 1, 128, arena_bytes<int>(128), y.as<int>(), bug); })

__global__ void misaligned(Global<const float> x, Global<float> y) { store(y + 4 * threadIdx.x, load<4>(x + 4 * threadIdx.x + 1)); }
BIND(misaligned, +[](Array x, Array y) { Launcher{0}(misaligned, 1, 1, 0, x.as<const float>(), y.as<float>()); })

__global__ void nothing(Global<float>) {}
BIND(shared_memory, +[](int64_t architecture, int64_t bytes, Array x) { Launcher{0, static_cast<int>(architecture)}(nothing, 1, 1, bytes, x.as<float>()); })
