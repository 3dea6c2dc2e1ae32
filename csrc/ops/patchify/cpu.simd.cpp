#include "ops/patchify/op.h"

#include "common/vec.h"

namespace fastdiff::patchify::FASTDIFF_ISA {
namespace {

using namespace fastdiff::FASTDIFF_ISA;

// One image row of a piece against the tokens it runs through. `image` points at the row's first element (channel 0), `tokens` at the row's
// place in the piece's first token; consecutive patches are `width` elements apart there.
template <class T>
struct Row {
  T* image;
  T* tokens;
  int64_t patches, q, channels;
  int64_t channel_stride, pixel_stride, width;
  int64_t token_channel, token_pixel;  // strides of channel and pixel within a token
};

template <class T, bool ToTokens>
inline void move(T* image, T* token) {
  if constexpr (ToTokens) *token = *image;
  else *image = *token;
}

template <class T, bool ToTokens>
inline void move_run(T* image, T* token, int64_t n) {
  if constexpr (ToTokens) std::memcpy(token, image, n * sizeof(T));
  else std::memcpy(image, token, n * sizeof(T));
}

template <class T, bool ToTokens>
void strided(const Row<T>& r) {
  for (int64_t g = 0; g < r.patches; ++g)
    for (int64_t j = 0; j < r.q; ++j)
      for (int64_t c = 0; c < r.channels; ++c)
        move<T, ToTokens>(r.image + c * r.channel_stride + (g * r.q + j) * r.pixel_stride,
                          r.tokens + g * r.width + c * r.token_channel + j * r.token_pixel);
}

// Runs of n elements that are contiguous on both sides; n is a constant so that a run is a few vector moves and no call.
template <class T, bool ToTokens, int n>
void runs(const Row<T>& r, int64_t repeats, int64_t image_step, int64_t token_step, int64_t image_patch) {
  for (int64_t c = 0; c < repeats; ++c) {
    T* image = r.image + c * image_step;
    T* token = r.tokens + c * token_step;
    for (int64_t g = 0; g < r.patches; ++g) move_run<T, ToTokens>(image + g * image_patch, token + g * r.width, n);
  }
}

template <class T, bool ToTokens>
void runs(const Row<T>& r, int64_t n, int64_t repeats, int64_t image_step, int64_t token_step, int64_t image_patch) {
  switch (n) {
    case 2: return runs<T, ToTokens, 2>(r, repeats, image_step, token_step, image_patch);
    case 4: return runs<T, ToTokens, 4>(r, repeats, image_step, token_step, image_patch);
    case 8: return runs<T, ToTokens, 8>(r, repeats, image_step, token_step, image_patch);
    case 12: return runs<T, ToTokens, 12>(r, repeats, image_step, token_step, image_patch);
    case 16: return runs<T, ToTokens, 16>(r, repeats, image_step, token_step, image_patch);
    case 24: return runs<T, ToTokens, 24>(r, repeats, image_step, token_step, image_patch);
    case 32: return runs<T, ToTokens, 32>(r, repeats, image_step, token_step, image_patch);
    case 48: return runs<T, ToTokens, 48>(r, repeats, image_step, token_step, image_patch);
  }
  for (int64_t c = 0; c < repeats; ++c)
    for (int64_t g = 0; g < r.patches; ++g)
      move_run<T, ToTokens>(r.image + c * image_step + g * image_patch, r.tokens + c * token_step + g * r.width, n);
}

// Planes of pixels <-> pixels of C channels, L pixels at a time. Which source vector and lane an output lane takes is known at
// compile time; sources join one by one, so an output vector costs C - 1 two-source shuffles.
template <class T, int C, bool Interleave, int L>
struct Shuffle {
  typedef T Vec __attribute__((vector_size(L * sizeof(T))));

  struct Masks { T lane[C][C - 1][L]; };
  static constexpr Masks make() {
    Masks m{};
    for (int out = 0; out < C; ++out)
      for (int step = 0; step < C - 1; ++step)
        for (int l = 0; l < L; ++l) {
          const int element = Interleave ? out * L + l : l * C + out;
          const int source = Interleave ? element % C : element / L, lane = Interleave ? element / C : element % L;
          m.lane[out][step][l] = source == step + 1 ? L + lane : step == 0 ? lane : l;
        }
    return m;
  }
  static constexpr Masks masks = make();

  static void run(const T* const* in, T* const* out) {
    Vec v[C];
    for (int c = 0; c < C; ++c) v[c] = load_as<Vec>(in[c]);
    for (int o = 0; o < C; ++o) {
      Vec r = v[0];
      for (int step = 0; step < C - 1; ++step) r = __builtin_shuffle(r, v[step + 1], load_as<Vec>(masks.lane[o][step]));
      std::memcpy(out[o], &r, sizeof r);
    }
  }
};

// A row whose patches are whole vectors of L pixels wide.
template <class T, bool ToTokens, int C, int L>
void by_vectors(const Row<T>& r) {
  for (int64_t g = 0; g < r.patches; ++g)
    for (int64_t j = 0; j < r.q; j += L) {
      T *planes[C], *block[C];
      for (int c = 0; c < C; ++c) planes[c] = r.image + c * r.channel_stride + g * r.q + j, block[c] = r.tokens + g * r.width + j * C + c * L;
      if constexpr (ToTokens) Shuffle<T, C, true, L>::run(planes, block);
      else Shuffle<T, C, false, L>::run(block, planes);
    }
}

// Any row, through a buffer of interleaved pixels in L1, whole patches at a time: shuffles on one side, runs of q * C on the other.
template <class T, bool ToTokens, int C>
void by_buffer(const Row<T>& r) {
  constexpr int kBuffer = 4096, kCount = 4 * kLanes / sizeof(T);
  T buffer[kBuffer];
  const int64_t run = r.q * C, batch = kBuffer / run;
  for (int64_t g = 0; g < r.patches; g += batch) {
    const int64_t patches = g + batch < r.patches ? batch : r.patches - g, pixels = patches * r.q;
    T* image = r.image + g * r.q;
    Row<T> pass{buffer, r.tokens + g * r.width, patches, run, 1, 0, 1, r.width, 0, 1};
    if constexpr (!ToTokens) runs<T, false>(pass, run, 1, 0, 0, run);
    int64_t x = 0;
    for (; x + kCount <= pixels; x += kCount) {
      T *planes[C], *block[C];
      for (int c = 0; c < C; ++c) planes[c] = image + c * r.channel_stride + x, block[c] = buffer + x * C + c * kCount;
      if constexpr (ToTokens) Shuffle<T, C, true, kCount>::run(planes, block);
      else Shuffle<T, C, false, kCount>::run(block, planes);
    }
    for (; x < pixels; ++x)
      for (int c = 0; c < C; ++c) move<T, ToTokens>(image + c * r.channel_stride + x, buffer + x * C + c);
    if constexpr (ToTokens) runs<T, true>(pass, run, 1, 0, 0, run);
  }
}

template <class T, bool ToTokens, int C>
void interleave(const Row<T>& r) {
  constexpr int kLeast = 16 / sizeof(T);  // vectors of less than 16 bytes lose to the buffer
  if (kLanes >= 16 && r.q % (4 * kLeast) == 0) return by_vectors<T, ToTokens, C, 4 * kLeast>(r);
  if (kLanes >= 8 && r.q % (2 * kLeast) == 0) return by_vectors<T, ToTokens, C, 2 * kLeast>(r);
  if (r.q % kLeast == 0) return by_vectors<T, ToTokens, C, kLeast>(r);
  by_buffer<T, ToTokens, C>(r);
}

// Columns of tokens: a row of each of the image's planes is dealt out to q places, neighbours of which are `token_pixel` apart.
template <class T, bool ToTokens, int q>
void deal(const Row<T>& r) {
  constexpr int kCount = 4 * kLanes / sizeof(T);
  for (int64_t c = 0; c < r.channels; ++c) {
    T *image = r.image + c * r.channel_stride, *tokens = r.tokens + c * r.token_channel;
    int64_t g = 0;
    for (; g + kCount <= r.patches; g += kCount) {
      T *places[q], *block[q];
      for (int j = 0; j < q; ++j) places[j] = tokens + j * r.token_pixel + g, block[j] = image + g * q + j * kCount;
      if constexpr (ToTokens) Shuffle<T, q, false, kCount>::run(block, places);
      else Shuffle<T, q, true, kCount>::run(places, block);
    }
    for (; g < r.patches; ++g)
      for (int j = 0; j < q; ++j) move<T, ToTokens>(image + g * q + j, tokens + j * r.token_pixel + g);
  }
}

template <class T, bool ToTokens>
void column(const Row<T>& r) {
  if (r.pixel_stride == 1) switch (r.q) {
    case 2: return deal<T, ToTokens, 2>(r);
    case 3: return deal<T, ToTokens, 3>(r);
    case 4: return deal<T, ToTokens, 4>(r);
    case 8: return deal<T, ToTokens, 8>(r);
  }
  for (int64_t c = 0; c < r.channels; ++c)
    for (int64_t j = 0; j < r.q; ++j)
      for (int64_t g = 0; g < r.patches; ++g)
        move<T, ToTokens>(r.image + c * r.channel_stride + (g * r.q + j) * r.pixel_stride,
                          r.tokens + c * r.token_channel + j * r.token_pixel + g);
}

template <class T, bool ToTokens>
void row(const Row<T>& r) {
  const bool pixels = r.pixel_stride == 1, pixels_in_token = r.token_pixel == 1;
  if (pixels && pixels_in_token) return runs<T, ToTokens>(r, r.q, r.channels, r.channel_stride, r.token_channel, r.q);
  if (r.channel_stride == 1 && r.pixel_stride == r.channels && r.token_channel == 1)
    return runs<T, ToTokens>(r, r.q * r.channels, 1, 0, 0, r.q * r.channels);
  if (pixels && r.q * r.channels <= 512) {
    if (r.channels == 2) return interleave<T, ToTokens, 2>(r);
    if (r.channels == 3) return interleave<T, ToTokens, 3>(r);
    if (r.channels == 4) return interleave<T, ToTokens, 4>(r);
  }
  strided<T, ToTokens>(r);
}

template <class T, bool ToTokens>
void rows(const Shape& s, T* image, T* tokens, int64_t begin, int64_t end) {
  const auto& p = s.patch;
  const auto& g = s.grid;
  const int64_t width = p[0] * p[1] * p[2] * s.channels;
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t g1 = piece % g[1], g0 = piece / g[1] % g[0], b = piece / (g[1] * g[0]);
    for (int64_t i0 = 0; i0 < p[0]; ++i0)
      for (int64_t i1 = 0; i1 < p[1]; ++i1) {
        const int64_t line = i0 * p[1] + i1;
        // A row touches a part of every token of its piece: processors foresee the image's rows, but not that. The next piece's tokens are
        // fetched meanwhile, a slice with every row.
        if (piece + 1 < end && !s.columns) {
          const int64_t slice = g[2] * p[2] * s.channels;
          const T* next = tokens + (piece + 1) * g[2] * width + line * slice;
          for (int64_t j = 0; j < slice; j += 64 / int64_t{sizeof(T)}) __builtin_prefetch(next + j, ToTokens, 2);
        }
        Row<T> r{image + b * s.stride[0] + (g0 * p[0] + i0) * s.stride[2] + (g1 * p[1] + i1) * s.stride[3],
                 tokens + piece * g[2] * width + line * p[2] * (s.channels_last ? s.channels : 1),
                 g[2], p[2], s.channels, s.stride[1], s.stride[4], width,
                 s.channels_last ? 1 : p[0] * p[1] * p[2], s.channels_last ? s.channels : 1};
        if (s.columns) {
          const int64_t count = g[0] * g[1] * g[2];
          r.tokens = tokens + b * count * width + line * p[2] * r.token_pixel * count + (piece - b * g[0] * g[1]) * g[2];
          r.token_channel *= count, r.token_pixel *= count;
          column<T, ToTokens>(r);
        } else {
          row<T, ToTokens>(r);
        }
      }
  }
}

void to_tokens(const Shape& s, int element_size, const void* image, void* tokens, int64_t begin, int64_t end) {
  if (element_size == 4) rows<uint32_t, true>(s, (uint32_t*)image, (uint32_t*)tokens, begin, end);
  else rows<uint16_t, true>(s, (uint16_t*)image, (uint16_t*)tokens, begin, end);
}

void to_image(const Shape& s, int element_size, const void* tokens, void* image, int64_t begin, int64_t end) {
  if (element_size == 4) rows<uint32_t, false>(s, (uint32_t*)image, (uint32_t*)tokens, begin, end);
  else rows<uint16_t, false>(s, (uint16_t*)image, (uint16_t*)tokens, begin, end);
}

}  // namespace

const Kernels kernels{to_tokens, to_image};

}  // namespace fastdiff::patchify::FASTDIFF_ISA
