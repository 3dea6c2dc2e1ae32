#include <type_traits>

#include "ops/dct/split.h"

namespace fastdiff::dct::FASTDIFF_ISA {
namespace {

// The factor of element 0 beside the others, which the sums of split.h leave out.
constexpr float kFirst = 0x1.6a09e6p-1f;
constexpr float kPi = 0x1.921fb6p+1f;
// Planes of more elements do not fit the second level's cache, and are not fetched ahead.
constexpr int64_t kFar = 1 << 16;

// The first n elements, at most kLanes.
template <class T>
inline f32 load_part(const T* x, int n) { return n == kLanes ? load(x) : load_n(x, n); }

int64_t longest(const Problem& p) { return padded(p.h > p.w ? p.h : p.w); }
int64_t strips(const Problem& p) { return vectors(p.w); }
int64_t blocks(const Problem& p) { return vectors(p.h); }

// The image: strips of kLanes columns, each a vector for every row, up to whole blocks of kLanes rows.
int64_t tall(const Problem& p) { return padded(p.h) * kLanes; }
int64_t plane_floats(const Problem& p) { return p.columns ? tall(p) * strips(p) : 0; }
int64_t image(const Problem& p) { return (p.eps ? 2 : 1) * plane_floats(p); }
// Three lines of vectors, one per element of a row or column, and the two that split.h works with.
int64_t scratch(const Problem& p) { return 5 * longest(p) * kLanes; }

// line[j] = column j of the `rows` rows of tiles of kLanes columns: row r of tile t at row(r) + t * step. Zeros in rows beyond.
template <class F>
inline void gather(int64_t columns, int64_t rows, const F& row, int64_t step, float scale, float* line) {
  f32 v[kLanes];
  for (int64_t j = 0; j < columns; j += kLanes, line += kLanes * kLanes) {
    const int64_t at = j / kLanes * step;
    if (rows >= kLanes && columns - j >= kLanes) {
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) v[r] = load(row(r) + at);
    } else {
      const int n = static_cast<int>(least(kLanes, columns - j));
      for (int r = 0; r < kLanes; ++r) v[r] = r >= rows ? f32{} : load_part(row(r) + at, n);
    }
    transpose(v);
#pragma GCC unroll 16
    for (int e = 0; e < kLanes; ++e) store(line + e * kLanes, v[e] * scale);
  }
}

// The way back, to rows a distance of `stride` apart.
template <class T>
inline void scatter(int64_t columns, int64_t rows, const float* line, float scale, T* y, int64_t stride, int64_t step) {
  f32 v[kLanes];
  for (int64_t j = 0; j < columns; j += kLanes, line += kLanes * kLanes, y += step) {
#pragma GCC unroll 16
    for (int e = 0; e < kLanes; ++e) v[e] = load(line + e * kLanes);
    transpose(v);
    if (rows >= kLanes && columns - j >= kLanes) {
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) store(y + r * stride, v[r] * scale);
    } else {
      const int n = static_cast<int>(least(kLanes, columns - j));
      for (int r = 0; r < least(kLanes, rows); ++r) {
        if (n == kLanes) store(y + r * stride, v[r] * scale);
        else store_n(y + r * stride, v[r] * scale, n);
      }
    }
  }
}

// Inlined by name: GCC takes a function that only fetches for one without effect, and leaves its calls out.
template <bool written, class T>
[[gnu::always_inline]] inline void fetch_lines(const T* x, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(x + i, written, 2);
}

float norm(const Problem& p) { return __builtin_sqrtf(2.0f / p.w) * (p.columns ? __builtin_sqrtf(2.0f / p.h) : 1.0f); }

// pi i / n for kLanes i from `first` on.
inline f32 frequencies(int64_t first, int64_t n) {
  constexpr u32 lane = lanes([](int l) { return l; });
  return (__builtin_convertvector(lane, f32) + static_cast<float>(first)) * (kPi / n);
}

template <class T>
struct Plane {
  const Problem& p;
  int64_t plane;
  float *image, *a, *b, *c, *work;

  Plane(const Problem& p, int64_t plane, float* image, float* scratch) : p(p), plane(plane), image(image) {
    const int64_t line = longest(p) * kLanes;
    a = scratch, b = a + line, c = b + line, work = c + line;
  }

  int64_t first() const { return plane * p.h * p.w; }
  int64_t rows() const { return p.columns ? p.h : least(p.h, p.rows - plane * p.h); }
  const T* input(const void* x) const { return x ? static_cast<const T*>(x) + first() : nullptr; }
  T* output() const { return static_cast<T*>(p.y) + first(); }
  float* strip(float* z, int64_t s) const { return z + s * tall(p); }

  // How many lanes of strip s are the plane's; and whether memory has the strip as a transform does.
  int width(int64_t s) const { return static_cast<int>(least(kLanes, p.w - s * kLanes)); }
  bool direct(int64_t s) const { return std::is_same_v<T, float> && width(s) == kLanes; }

  void enter(const T* x, float* z, int64_t begin, int64_t end) const {
    for (int64_t s = begin; s < end; ++s) {
      float* to = strip(z, s);
      const T* from = x + s * kLanes;
      if (direct(s)) {
        two(p.along_h, 0, reinterpret_cast<const float*>(from), p.w, to, kLanes, work);
      } else {
        for (int64_t i = 0; i < p.h; ++i) store(a + i * kLanes, load_part(from + i * p.w, width(s)));
        two(p.along_h, 0, a, kLanes, to, kLanes, work);
      }
      store(to, load(to) * kFirst);
      for (int64_t i = p.h; i < padded(p.h); ++i) store(to + i * kLanes, f32{});
    }
  }

  void leave(int64_t begin, int64_t end) const {
    const T* noise = p.kind == Kind::blur ? input(p.noise) : nullptr;
    for (int64_t s = begin; s < end; ++s) {
      float* from = strip(image, s);
      T* to = output() + s * kLanes;
      store(from, load(from) * kFirst);
      if (direct(s) && !noise) {
        back(p.along_h, 0, from, kLanes, reinterpret_cast<float*>(to), p.w, work);
        continue;
      }
      back(p.along_h, 0, from, kLanes, a, kLanes, work);
      const int n = width(s);
      for (int64_t i = 0; i < p.h; ++i) {
        f32 v = load(a + i * kLanes);
        if (noise) v += load_part(noise + i * p.w + s * kLanes, n) * p.sigma[plane / p.channels];
        store_n(to + i * p.w, v, n, false);
      }
    }
  }

  // The rows of block n to lines, from x or from where columns have been transformed to.
  void take(const T* x, float* z, int64_t n, float* line) const {
    if (p.columns && p.kind != Kind::inverse)
      return gather(padded(p.w), kLanes, [=, from = z + n * kLanes * kLanes](int r) { return from + r * kLanes; }, tall(p), 1.0f, line);
    gather(p.w, rows() - n * kLanes, [=, this, from = x + n * kLanes * p.w](int r) { return from + r * p.w; }, kLanes, 1.0f, line);
  }

  void give(int64_t n, const float* line, float scale) const {
    if (p.columns && p.kind != Kind::forward)
      return scatter(padded(p.w), kLanes, line, scale, image + n * kLanes * kLanes, kLanes, tall(p));
    scatter(p.w, rows() - n * kLanes, line, scale, output() + n * kLanes * p.w, p.w, kLanes);
  }

  // While the rows of block n are transformed, memory fetches those of the next plane and what they will be added to or stored in.
  [[gnu::always_inline]] void fetch(int64_t n) const {
    if (p.h * p.w > kFar) return;
    const int64_t first = n * kLanes * p.w, count = least(p.h * p.w - first, kLanes * p.w), next = first + p.h * p.w;
    if (plane + 1 < p.planes) {
      fetch_lines<false>(input(p.x) + next, count);
      if (p.eps) fetch_lines<false>(input(p.eps) + next, count);
    }
    if (p.noise) fetch_lines<false>(input(p.noise) + first, count);
    fetch_lines<true>(output() + first, count);
  }

  void forward(const float* x, float* y) const {
    two(p.along_w, 0, x, kLanes, y, kLanes, work);
    store(y, load(y) * kFirst);
  }
  void inverse(float* x, float* y) const {
    store(x, load(x) * kFirst);
    back(p.along_w, 0, x, kLanes, y, kLanes, work);
  }

  // The gains of block n as lines, times norm^2.
  const float* gains(const Gain& gain, int64_t n, float* line) const {
    if (gain.arranged) return gain.arranged + n * kLanes * padded(p.w);
    const float scale = norm(p) * norm(p);
    if (p.columns) gather(p.w, p.h - n * kLanes, [=, this](int r) { return gain.data + gain.begins[plane] + (n * kLanes + r) * p.w; }, kLanes, scale, line);
    else gather(p.w, rows() - n * kLanes, [=, this](int r) { return gain.data + gain.begins[plane * p.h + n * kLanes + r]; }, kLanes, scale, line);
    return line;
  }

  // The rows of block n of eps, transformed, to a.
  void beside(int64_t n) const {
    take(input(p.eps), image + plane_floats(p), n, c);
    forward(c, a);
  }

  void product(int64_t n) const {
    for (int64_t j = 0; j < p.w; ++j) store(a + j * kLanes, load(a + j * kLanes) * load(b + j * kLanes));
    scatter(p.w, rows() - n * kLanes, a, norm(p) * norm(p), p.product + first() + n * kLanes * p.w, p.w, kLanes);
  }

  // The blur's factor of the rows of block n; zeros beyond them.
  f32 blur_h(int64_t n) const {
    const float* rows = p.blur_h + plane / p.channels * p.h + n * kLanes;
    return load_part(rows, static_cast<int>(least(kLanes, p.h - n * kLanes)));
  }

  // In parts of 64 columns, so that no chain of additions is long.
  void sums(int64_t n) const {
    const float* columns = p.blur_w + plane / p.channels * p.w;
    const float step = kPi / p.w;
    f32 all{}, blurred{}, squared{};
    for (int64_t begin = 0; begin < p.w; begin += 64) {
      f32 part[3]{};
      for (int64_t j = begin; j < least(p.w, begin + 64); ++j) {
        const f32 u = load(a + j * kLanes) * load(b + j * kLanes), decayed = u * columns[j];
        part[0] += u;
        part[1] += decayed;
        part[2] += decayed * (j * step * (j * step));
      }
      all += part[0], blurred += part[1], squared += part[2];
    }
    const f32 rows = blur_h(n) * (norm(p) * norm(p)), frequency = frequencies(n * kLanes, p.h);
    float* to = p.sums + (plane * blocks(p) + n) * 3;
    to[0] = reduce_add(all) * (norm(p) * norm(p));
    to[1] = reduce_add(rows * blurred);
    to[2] = reduce_add(rows * (squared + frequency * frequency * blurred));
  }

  void mix(int64_t n) const {
    const float* gain = gains(p.gain, n, c);
    for (int64_t j = 0; j < p.w; ++j) store(b + j * kLanes, load(b + j * kLanes) * load(gain + j * kLanes));
    const auto add = [&](const Gain& of) {
      const float* gain = gains(of, n, c);
      for (int64_t j = 0; j < p.w; ++j) store(b + j * kLanes, load(b + j * kLanes) + load(a + j * kLanes) * load(gain + j * kLanes));
    };
    if (p.eps && !p.product) {
      beside(n);
      add(p.gain_eps);
    }
    if (const T* noise = input(p.noise)) {
      gather(p.w, rows() - n * kLanes, [=, this](int r) { return noise + (n * kLanes + r) * p.w; }, kLanes, 1.0f / norm(p), a);
      add(p.gain_noise);
    }
  }

  void blur(int64_t n) const {
    const int64_t sample = plane / p.channels;
    const float *columns = p.blur_w + sample * p.w, factor = (p.signal ? p.signal[sample] : 1.0f) * (norm(p) * norm(p)), floor = p.floor * factor;
    const f32 rows = blur_h(n) * factor;
    for (int64_t j = 0; j < p.w; ++j) store(b + j * kLanes, load(b + j * kLanes) * (rows * columns[j] + floor));
  }

  void block(int64_t n) const {
    fetch(n);
    take(input(p.x), image, n, a);
    if (p.kind == Kind::inverse) {
      inverse(a, b);
      return give(n, b, norm(p));
    }
    forward(a, b);
    if (p.kind == Kind::forward) return give(n, b, norm(p));
    if (p.product || p.sums) {
      beside(n);
      p.product ? product(n) : sums(n);
    }
    p.kind == Kind::blur ? blur(n) : mix(n);
    inverse(b, a);
    give(n, a, 1.0f);
  }
};

template <class T>
void run_typed(const Problem& p, int64_t plane, Phase phase, int64_t begin, int64_t end, float* image, float* scratch) {
  const Plane<T> part(p, plane, image, scratch);
  if (phase == Phase::enter) {
    part.enter(part.input(p.x), image, begin, end);
    if (p.eps) part.enter(part.input(p.eps), image + plane_floats(p), begin, end);
  } else if (phase == Phase::leave) {
    part.leave(begin, end);
  } else {
    for (int64_t n = begin; n < end; ++n) part.block(n);
  }
}

void arrange(const Problem& p, const float* gain, float* arranged) {
  for (int64_t i = 0; i < p.h; i += kLanes, gain += kLanes * p.w, arranged += kLanes * padded(p.w))
    gather(p.w, p.h - i, [=, &p](int r) { return gain + r * p.w; }, kLanes, norm(p) * norm(p), arranged);
}

void decay(int64_t samples, const float* width, int64_t n, float factor, float* to) {
  for (; samples > 0; --samples, ++width, to += n) {
    const float time = *width * *width / -2;
    for_vectors(n, [&](int64_t i, const auto&, const auto& put, int) {
      const f32 frequency = frequencies(i, n);
      put(to + i, exp(frequency * frequency * time) * factor);
    });
  }
}

void run(const Problem& p, int64_t plane, Phase phase, int64_t begin, int64_t end, float* image, float* scratch) {
  typed(p.type, [&]<class T>() { run_typed<T>(p, plane, phase, begin, end, image, scratch); });
}

}  // namespace

const Kernels kernels{strips, blocks, image, scratch, arrange, decay, run};

}  // namespace fastdiff::dct::FASTDIFF_ISA
