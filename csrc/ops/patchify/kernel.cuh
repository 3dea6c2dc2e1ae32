// Elements between an image of any strides and contiguous rows, or columns, of patches.
//
// A block moves a tile: the patches of a few rows of patches of one sample, or of a part of one row, through shared memory, where the tile
// lies as in the image. So both sides are accessed in their own order, by up to 16 bytes at a time, and elements change places in shared memory.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <numeric>
#include <stdexcept>

#include "common/device.cuh"
#include "ops/patchify/op.h"

namespace fastdiff::patchify {

inline constexpr int kThreads = 256;
inline constexpr int kTile = 16 << 10;    // bytes: eight blocks of it on a multiprocessor keep 128 KiB under way
inline constexpr int kShared = 48 << 10;  // what a block gets without asking
// Elements of a patch, at most (ops/patchify/__init__.py refuses more): a tile of one patch and its table of places then fit.
inline constexpr int64_t kLargestPatch = kShared / 6;

// A run is what a patch has of one line of the image: its pixels, and their channels where those are innermost in the image.
struct Plan {
  int64_t stride[4], step;  // of the image: batch, channel, first and second axis; within a line
  int64_t tokens;           // of a sample
  int width;                // elements of a token
  int channels, patch[3];
  bool merged, channels_last, columns;  // the image's runs hold channels; order "pqc"; a sample is (elements, tokens)
  int rows, run, pitch;                 // lines of a patch, elements of its run, elements from line to line in shared memory
  int patches, grid, pieces;            // in a row of patches; rows of them along the second axis; of a sample
  int part, group;                      // patches of a row, and rows, that a tile has at most; part = patches if group > 1
  int image_wide, tokens_wide;          // elements of one access
};

inline Plan plan_of(const Shape& s, int size, const void* image, const void* tokens) {
  Plan p{};
  const int64_t volume = s.patch[0] * s.patch[1] * s.patch[2], most = INT32_MAX / 2;
  if (volume * s.channels > kLargestPatch || s.grid[0] * s.grid[1] > most || s.grid[2] > most)
    throw std::runtime_error("patchify: a patch has too many elements, or a sample too many patches, for the CUDA kernel");
  p.stride[0] = s.stride[0], p.stride[1] = s.stride[1], p.stride[2] = s.stride[2], p.stride[3] = s.stride[3];
  p.tokens = s.grid[0] * s.grid[1] * s.grid[2];
  p.width = static_cast<int>(volume * s.channels), p.channels = static_cast<int>(s.channels);
  for (int a = 0; a < 3; ++a) p.patch[a] = static_cast<int>(s.patch[a]);
  p.channels_last = s.channels_last, p.columns = s.columns;
  p.merged = s.channels > 1 && s.stride[1] == 1 && s.stride[4] == s.channels;
  p.step = p.merged ? 1 : s.stride[4];
  p.run = p.patch[2] * (p.merged ? p.channels : 1), p.rows = p.width / p.run;
  p.patches = static_cast<int>(s.grid[2]), p.grid = static_cast<int>(s.grid[1]), p.pieces = static_cast<int>(s.grid[0] * s.grid[1]);
  const int wanted = std::max(1, kTile / (p.width * size));
  // Columns of a tile are whole sectors of 32 bytes where a tile of so many patches fits.
  const int sector = 32 / size;
  int part = wanted / sector * sector;
  if (part == 0 && p.columns && sector * p.width * size <= kShared / 2) part = sector;
  for (int half = sector / 2; part == 0; half /= 2) part = wanted / half * half;
  p.part = std::min(p.patches, part);
  p.group = p.part < p.patches ? 1 : std::min(p.pieces, std::max(1, wanted / p.patches));

  // The widest access that divides every address it will be made at.
  const auto divides = [size](const void* array, std::initializer_list<int64_t> multiples) {
    int64_t wide = std::gcd(int64_t{16}, static_cast<int64_t>(reinterpret_cast<uintptr_t>(array) % 16));
    for (int64_t m : multiples) wide = std::gcd(wide, m * size);
    return static_cast<int>(std::max<int64_t>(wide / size, 1));
  };
  const auto moved = [](int64_t count, int64_t stride) { return count > 1 ? stride : 0; };
  const int64_t line = int64_t{p.patches} * p.run, from_part = p.part < p.patches ? int64_t{p.part} * p.run : 0;
  p.image_wide = p.step != 1 ? 1 : divides(image, {moved(s.batch, s.stride[0]), p.merged ? 0 : moved(s.channels, s.stride[1]),
                                                   moved(s.grid[0] * s.patch[0], s.stride[2]), moved(s.grid[1] * s.patch[1], s.stride[3]), line,
                                                   from_part});
  p.tokens_wide = !p.columns ? divides(tokens, {p.width}) : divides(tokens, {p.tokens, p.group > 1 ? int64_t{p.group} * p.patches : p.patches,
                                                                             p.part < p.patches ? p.part : 0});
  p.pitch = p.part * p.run;
  return p;
}

// Where element i of a tile lies: pieces of 16 bytes change places within 128 bytes, by numbers that come from the address above them. Elements
// that are a fixed step apart, as tokens ask for them, then meet in four-fold bank conflicts at most where there were up to twenty-fold ones
// (test_memory_is_used_well counts them).
template <class T>
__device__ inline int placed(int i) {
  constexpr unsigned piece = 16 / sizeof(T), line = 8 * piece;
  const unsigned u = static_cast<unsigned>(i);
  return static_cast<int>(u ^ (u / line ^ u / (8 * line)) % 8 * piece);
}

// Elements of shared memory: whole 128 bytes.
template <class T>
__host__ __device__ inline int tile_size(const Plan& p) {
  constexpr int whole = 128 / sizeof(T);
  return (p.group * p.rows * p.pitch + whole - 1) / whole * whole;
}

struct Tile {
  int first, patches, rows;  // row of patches that it begins with, patches of each of its rows, rows of patches
};

// Lines of the image <-> the tile.
template <class T, int wide, bool ToTokens>
__device__ void image_side(const Plan& p, const Tile& t, Global<T> image, Shared<T> tile) {
  const int line = t.patches * p.run / wide, count = t.rows * p.rows * line;
#pragma unroll 4
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int row = i / line, x = i % line * wide, piece = t.first + row / p.rows;
    int rest = row % p.rows;
    const int i1 = rest % p.patch[1];
    rest /= p.patch[1];
    const int i0 = rest % p.patch[0], c = rest / p.patch[0], g1 = piece % p.grid, g0 = piece / p.grid;
    const auto at = image + (c * p.stride[1] + (int64_t{g0} * p.patch[0] + i0) * p.stride[2] + (int64_t{g1} * p.patch[1] + i1) * p.stride[3] + x * p.step);
    if constexpr (ToTokens) store(tile + placed<T>(row * p.pitch + x), load<wide>(at));
    else store(at, load<wide>(tile + placed<T>(row * p.pitch + x)));
  }
}

// The tile <-> tokens. places: of a token's elements in a patch of the tile.
template <class T, int wide, bool ToTokens, bool Columns>
__device__ void token_side(const Plan& p, const Tile& t, Global<T> tokens, Shared<T> tile, Shared<uint16_t> places) {
  const int patches = t.patches * t.rows, run = (Columns ? patches : p.width) / wide, count = (Columns ? p.width : patches) * run;
#pragma unroll 2
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int d = Columns ? i / run : i % run * wide, n = Columns ? i % run * wide : i / run;
    const auto at = tokens + (Columns ? d * p.tokens + n : int64_t{i} * wide);
    int row = n / t.patches, in_row = n % t.patches;
    Pack<T, wide> x;
    if constexpr (!ToTokens) x = load<wide>(at);
    const Pack<uint16_t, Columns ? 1 : wide> place = load<Columns ? 1 : wide>(places + d);
#pragma unroll
    for (int e = 0; e < wide; ++e) {
      const int in = placed<T>(row * p.rows * p.pitch + in_row * p.run + place[Columns ? 0 : e]);
      if constexpr (ToTokens) x[e] = tile[in];
      else tile[in] = x[e];
      if (Columns && ++in_row == t.patches) in_row = 0, ++row;
    }
    if constexpr (ToTokens) store(at, x);
  }
}

template <class T, bool ToTokens>
__device__ void image_side(const Plan& p, const Tile& t, Global<T> image, Shared<T> tile) {
  constexpr int most = 16 / sizeof(T);
  if (p.image_wide == most) return image_side<T, most, ToTokens>(p, t, image, tile);
  if (p.image_wide == most / 2) return image_side<T, most / 2, ToTokens>(p, t, image, tile);
  image_side<T, 1, ToTokens>(p, t, image, tile);
}

template <class T, bool ToTokens, bool Columns>
__device__ void token_side(const Plan& p, const Tile& t, Global<T> tokens, Shared<T> tile, Shared<uint16_t> places) {
  constexpr int most = 16 / sizeof(T);
  if (p.tokens_wide == most) return token_side<T, most, ToTokens, Columns>(p, t, tokens, tile, places);
  if (p.tokens_wide == most / 2) return token_side<T, most / 2, ToTokens, Columns>(p, t, tokens, tile, places);
  token_side<T, 1, ToTokens, Columns>(p, t, tokens, tile, places);
}

// Blocks: samples x groups of rows of patches x parts of a row, parts innermost.
template <class T, bool ToTokens, bool Columns>
__global__ void __launch_bounds__(kThreads) move(Plan p, Global<T> image, Global<T> tokens) {
  Arena arena;
  const Shared<uint16_t> places = arena.take<uint16_t>(p.width);
  const Shared<T> tile = arena.take<T>(tile_size<T>(p));
  for (int d = threadIdx.x; d < p.width; d += kThreads) {
    int rest = d, c = 0;
    if (p.channels_last) c = rest % p.channels, rest /= p.channels;
    const int i2 = rest % p.patch[2];
    rest /= p.patch[2];
    const int line = rest % (p.patch[0] * p.patch[1]);
    if (!p.channels_last) c = rest / (p.patch[0] * p.patch[1]);
    places[d] = p.merged ? line * p.pitch + i2 * p.channels + c : (c * p.patch[0] * p.patch[1] + line) * p.pitch + i2;
  }
  const unsigned parts = (p.patches + p.part - 1) / p.part, groups = (p.pieces + p.group - 1) / p.group;
  const int part = static_cast<int>(blockIdx.x % parts) * p.part, first = static_cast<int>(blockIdx.x / parts % groups) * p.group;
  const int64_t b = blockIdx.x / parts / groups, token = int64_t{first} * p.patches + part;
  const Tile t{first, min(p.part, p.patches - part), min(p.group, p.pieces - first)};
  image += b * p.stride[0] + int64_t{part} * p.run * p.step;
  tokens += b * p.tokens * p.width + (Columns ? token : token * p.width);
  if constexpr (ToTokens) image_side<T, true>(p, t, image, tile);
  __syncthreads();
  token_side<T, ToTokens, Columns>(p, t, tokens, tile, places);
  if constexpr (!ToTokens) {
    __syncthreads();
    image_side<T, false>(p, t, image, tile);
  }
}

template <class T, bool ToTokens>
void run(const Launcher& launch, const Shape& s, const Plan& p, Global<T> image, Global<T> tokens) {
  const int64_t blocks = s.batch * ((p.pieces + p.group - 1) / p.group) * ((p.patches + p.part - 1) / p.part);
  if (blocks > INT32_MAX) throw std::runtime_error("patchify: too many patches for one launch");
  const size_t shared = arena_bytes<uint16_t>(p.width) + arena_bytes<T>(tile_size<T>(p));
  const auto kernel = p.columns ? move<T, ToTokens, true> : move<T, ToTokens, false>;
  launch(kernel, static_cast<unsigned>(blocks), kThreads, shared, p, image, tokens);
}

}  // namespace fastdiff::patchify
