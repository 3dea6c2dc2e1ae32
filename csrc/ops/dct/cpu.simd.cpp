#include "ops/dct/split.h"

namespace fastdiff::dct::FASTDIFF_ISA {
namespace {

// The factor of element 0 beside the others, which the sums of split.h leave out.
constexpr float kFirst = 0x1.6a09e6p-1f;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

int64_t longest(const Problem& p) { return padded(p.h > p.w ? p.h : p.w); }

// A plane as Z: blocks of kLanes rows, each w vectors, one per column.
int64_t plane_floats(const Problem& p) { return padded(p.h) * p.w; }

// Z, a second one for what is added to it between the transforms, a line of vectors, and the two that split.h works with.
int64_t planes(const Problem& p) { return p.kind == Kind::gain && (p.eps || p.noise) ? 2 : 1; }
int64_t scratch(const Problem& p) { return planes(p) * plane_floats(p) + 3 * longest(p) * kLanes; }

template <class T>
inline f32 load_up_to(const T* x, int n) {
  return n == kLanes ? load(x) : load_n(x, n);
}

// v[e] = column e of `rows` rows of n elements from row(0), row(1), ..., with zeros beyond.
template <class F>
inline void load_columns(const F& row, int64_t rows, int n, f32 (&v)[kLanes]) {
  for (int r = 0; r < kLanes; ++r) v[r] = r < rows ? load_up_to(row(r), n) : f32{};
  transpose(v);
}

// f(block, its rows, first column, its columns)
template <class F>
inline void for_blocks(int64_t rows, int64_t w, const F& f) {
  for (int64_t i = 0; i < rows; i += kLanes)
    for (int64_t j = 0; j < w; j += kLanes) f(i / kLanes, least(kLanes, rows - i), j, static_cast<int>(least(kLanes, w - j)));
}

template <class T>
struct Plane {
  const Problem& p;
  int64_t rows;
  float *line, *work;

  float* at(float* z, int64_t block, int64_t j) const { return z + (block * p.w + j) * kLanes; }

  // Columns [j, j + n) of x, transformed along h, as vectors in `line`.
  void transform_columns(const T* x, int64_t j, int n) const {
    const float* from = line;
    int64_t step = kLanes;
    if constexpr (sizeof(T) == 4)
      if (n == kLanes && p.kind != Kind::inverse) from = x + j, step = p.w;
    if (from == line)
      for (int64_t i = 0; i < rows; ++i) store(line + i * kLanes, load_up_to(x + i * p.w + j, n));
    if (p.kind == Kind::inverse) {
      store(line, load(line) * kFirst);
      back(p.along_h, 0, from, step, line, kLanes, work);
    } else {
      two(p.along_h, 0, from, step, line, kLanes, work);
      store(line, load(line) * kFirst);
    }
  }

  void enter(const T* x, float* z) const {
    f32 v[kLanes];
    if (!p.columns) {
      for_blocks(rows, p.w, [&](int64_t block, int64_t count, int64_t j, int n) {
        load_columns([&](int r) { return x + (block * kLanes + r) * p.w + j; }, count, n, v);
        for (int e = 0; e < n; ++e) store(at(z, block, j + e), v[e]);
      });
      return;
    }
    for (int64_t j = 0; j < p.w; j += kLanes) {
      const int n = static_cast<int>(least(kLanes, p.w - j));
      transform_columns(x, j, n);
      for_blocks(rows, 1, [&](int64_t block, int64_t count, int64_t, int) {
        load_columns([&](int r) { return line + (block * kLanes + r) * kLanes; }, count, kLanes, v);
        for (int e = 0; e < n; ++e) store(at(z, block, j + e), v[e]);
      });
    }
  }

  // Along w.
  void forward(float* z) const {
    two(p.along_w, 0, z, kLanes, z, kLanes, work);
    store(z, load(z) * kFirst);
  }
  void inverse(float* z) const {
    store(z, load(z) * kFirst);
    back(p.along_w, 0, z, kLanes, z, kLanes, work);
  }

  // f(column, vector) for every column of the block's rows of gains or noise, row i of the plane at row(i).
  template <class R, class F>
  void by_columns(int64_t block, const R& row, const F& f) const {
    f32 v[kLanes];
    for (int64_t j = 0; j < p.w; j += kLanes) {
      const int n = static_cast<int>(least(kLanes, p.w - j));
      load_columns([&](int r) { return row(block * kLanes + r) + j; }, least(kLanes, rows - block * kLanes), n, v);
      for (int e = 0; e < n; ++e) f(j + e, v[e]);
    }
  }

  // Rows of the result from Z.
  void leave(float* z, float scale, T* y) const {
    f32 v[kLanes];
    for_blocks(rows, p.w, [&](int64_t block, int64_t count, int64_t j, int n) {
      for (int e = 0; e < kLanes; ++e) v[e] = e < n ? load(at(z, block, j + e)) * scale : f32{};
      transpose(v);
      T* out = y + block * kLanes * p.w + j;
      for (int r = 0; r < count; ++r)
        if (n == kLanes) store(out + r * p.w, v[r]);
        else store_n(out + r * p.w, v[r], n);
    });
  }

  // Rows of the result from Z, after the inverse transform along h; with noise, sigma times it is added.
  void leave_columns(float* z, const T* noise, float sigma, T* y) const {
    f32 v[kLanes];
    for (int64_t j = 0; j < p.w; j += kLanes) {
      const int n = static_cast<int>(least(kLanes, p.w - j));
      for_blocks(rows, 1, [&](int64_t block, int64_t, int64_t, int) {
        for (int e = 0; e < kLanes; ++e) v[e] = e < n ? load(at(z, block, j + e)) : f32{};
        transpose(v);
        for (int r = 0; r < kLanes; ++r) store(line + (block * kLanes + r) * kLanes, v[r]);
      });
      store(line, load(line) * kFirst);
      if constexpr (sizeof(T) == 4)
        if (n == kLanes && !noise) {
          back(p.along_h, 0, line, kLanes, y + j, p.w, work);
          continue;
        }
      back(p.along_h, 0, line, kLanes, line, kLanes, work);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t place = i * p.w + j;
        const f32 result = load(line + i * kLanes);
        const f32 sum = noise ? result + load_up_to(noise + place, n) * sigma : result;
        if (n == kLanes) store(y + place, sum);
        else store_n(y + place, sum, n);
      }
    }
  }
};

template <class T>
void run_typed(const Problem& p, int64_t plane, float* scratch) {
  const int64_t first = plane * p.h * p.w;
  const T* x = static_cast<const T*>(p.x) + first;
  T* y = static_cast<T*>(p.y) + first;
  float *z = scratch, *other = z + plane_floats(p), *line = z + planes(p) * plane_floats(p);
  const Plane<T> part{p, p.columns ? p.h : least(p.h, p.rows - plane * p.h), line, line + longest(p) * kLanes};
  const int64_t blocks = (part.rows + kLanes - 1) / kLanes;
  const float norm = __builtin_sqrtf(2.0f / p.w) * (p.columns ? __builtin_sqrtf(2.0f / p.h) : 1.0f);
  part.enter(x, z);
  if (p.kind == Kind::forward || p.kind == Kind::inverse) {
    for (int64_t b = 0; b < blocks; ++b)
      if (p.kind == Kind::forward) part.forward(part.at(z, b, 0));
      else part.inverse(part.at(z, b, 0));
    return part.leave(z, norm, y);
  }
  if (p.eps) part.enter(static_cast<const T*>(p.eps) + first, other);
  const T* noise = p.noise ? static_cast<const T*>(p.noise) + first : nullptr;
  const int64_t sample = p.kind == Kind::separable ? plane / p.channels : 0;
  for (int64_t b = 0; b < blocks; ++b) {
    float *block = part.at(z, b, 0), *second = part.at(other, b, 0);
    part.forward(block);
    if (p.kind == Kind::separable) {
      const float *gain_w = p.gain_w + sample * p.w, base = p.base[sample];
      const f32 gain_h = load_up_to(p.gain_h + sample * p.h + b * kLanes, static_cast<int>(least(kLanes, p.h - b * kLanes)));
      for (int64_t j = 0; j < p.w; ++j) store(block + j * kLanes, load(block + j * kLanes) * ((gain_h * gain_w[j] + base) * (norm * norm)));
    } else {
      const auto gains = [&](const Gain& gain) {
        return [&](int64_t i) { return p.columns ? gain.data + gain.begins[plane] + i * p.w : gain.data + gain.begins[plane * p.h + i]; };
      };
      part.by_columns(b, gains(p.gain),
                      [&](int64_t j, f32 gain) { store(block + j * kLanes, load(block + j * kLanes) * (gain * (norm * norm))); });
      if (p.eps) {
        part.forward(second);
        part.by_columns(b, gains(p.gain_eps), [&](int64_t j, f32 gain) {
          store(block + j * kLanes, load(block + j * kLanes) + load(second + j * kLanes) * (gain * (norm * norm)));
        });
      }
      if (noise) {
        part.by_columns(b, [&](int64_t i) { return noise + i * p.w; }, [&](int64_t j, f32 v) { store(second + j * kLanes, v * norm); });
        part.by_columns(b, gains(p.gain_noise),
                        [&](int64_t j, f32 gain) { store(block + j * kLanes, load(block + j * kLanes) + load(second + j * kLanes) * gain); });
      }
    }
    part.inverse(block);
  }
  if (!p.columns) return part.leave(z, 1.0f, y);
  part.leave_columns(z, p.kind == Kind::separable ? noise : nullptr, p.sigma ? p.sigma[sample] : 0.0f, y);
}

void run(const Problem& p, int64_t plane, float* scratch) {
  typed(p.type, [&]<class T>() { run_typed<T>(p, plane, scratch); });
}

}  // namespace

const Kernels kernels{scratch, run};

}  // namespace fastdiff::dct::FASTDIFF_ISA
