#include "ops/dct/split.h"

namespace fastdiff::dct::FASTDIFF_ISA {
namespace {

// The factor of element 0 beside the others, which the sums of split.h leave out.
constexpr float kFirst = 0x1.6a09e6p-1f;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

int64_t longest(const Problem& p) { return padded(p.h > p.w ? p.h : p.w); }

// A plane as Z: blocks of kLanes rows, each w vectors, one per column.
int64_t plane_floats(const Problem& p) { return padded(p.h) * p.w; }

// A plane as rows of float, read and written from end to end: processors do not foresee accesses that are a row apart, and there they
// stay in cache. One vector more than the row's, so that elements of a column do not fall onto the same cache sets.
int64_t row_floats(const Problem& p) { return padded(p.w) + kLanes; }

// Z, a second one for what is added to it between the transforms, rows, a line of vectors, and the two that split.h works with.
int64_t planes(const Problem& p) { return p.kind == Kind::gain && (p.eps || p.noise) ? 2 : 1; }
int64_t scratch(const Problem& p) { return planes(p) * plane_floats(p) + p.h * row_floats(p) + 3 * longest(p) * kLanes; }

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

template <class T>
struct Plane {
  const Problem& p;
  int64_t rows;
  float *image, *line, *work;

  float* at(float* z, int64_t block, int64_t j) const { return z + (block * p.w + j) * kLanes; }
  float* row(int64_t i) const { return image + i * row_floats(p); }

  // Z from x, transformed along h where columns are.
  void enter(const T* x, float* z) const {
    f32 v[kLanes];
    const float first = p.columns && p.kind == Kind::inverse ? kFirst : 1.0f;
    for (int64_t i = 0; i < rows; ++i) pack_rows(1, p.w, x + i * p.w, 0, i == 0 ? first : 1.0f, row(i));
    for (int64_t j = 0; j < p.w; j += kLanes) {
      const float* from = image + j;
      int64_t step = row_floats(p);
      if (p.columns) {
        if (p.kind == Kind::inverse) {
          back(p.along_h, 0, from, step, line, kLanes, work);
        } else {
          two(p.along_h, 0, from, step, line, kLanes, work);
          store(line, load(line) * kFirst);
        }
        from = line, step = kLanes;
      }
      for (int64_t i = 0; i < rows; i += kLanes) {
        load_columns([&](int r) { return from + (i + r) * step; }, least(kLanes, rows - i), kLanes, v);
        for (int e = 0; e < least(kLanes, p.w - j); ++e) store(at(z, i / kLanes, j + e), v[e]);
      }
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

  // Rows from Z, after the inverse transform along h where `columns`.
  void leave(float* z, bool columns) const {
    f32 v[kLanes];
    for (int64_t j = 0; j < p.w; j += kLanes) {
      float* to = columns ? line : image + j;
      const int64_t step = columns ? kLanes : row_floats(p);
      for (int64_t i = 0; i < rows; i += kLanes) {
        for (int e = 0; e < kLanes; ++e) v[e] = j + e < p.w ? load(at(z, i / kLanes, j + e)) : f32{};
        transpose(v);
        for (int r = 0; r < least(kLanes, rows - i); ++r) store(to + (i + r) * step, v[r]);
      }
      if (columns) {
        store(line, load(line) * kFirst);
        back(p.along_h, 0, line, kLanes, image + j, row_floats(p), work);
      }
    }
  }

  // y = scale rows + sigma noise
  void write(float scale, const T* noise, float sigma, T* y) const {
    for (int64_t i = 0; i < rows; ++i)
      for_vectors(p.w, [&](int64_t j, const auto& get, const auto& put, int) {
        const f32 result = load(row(i) + j) * scale;
        put(y + i * p.w + j, noise ? result + get(noise + i * p.w + j) * sigma : result);
      });
  }
};

template <class T>
void run_typed(const Problem& p, int64_t plane, float* scratch) {
  const int64_t first = plane * p.h * p.w;
  const T* x = static_cast<const T*>(p.x) + first;
  T* y = static_cast<T*>(p.y) + first;
  float *z = scratch, *other = z + plane_floats(p), *image = z + planes(p) * plane_floats(p), *line = image + p.h * row_floats(p);
  const Plane<T> part{p, p.columns ? p.h : least(p.h, p.rows - plane * p.h), image, line, line + longest(p) * kLanes};
  const int64_t blocks = (part.rows + kLanes - 1) / kLanes;
  const float norm = __builtin_sqrtf(2.0f / p.w) * (p.columns ? __builtin_sqrtf(2.0f / p.h) : 1.0f);
  part.enter(x, z);
  if (p.kind == Kind::forward || p.kind == Kind::inverse) {
    for (int64_t b = 0; b < blocks; ++b)
      if (p.kind == Kind::forward) part.forward(part.at(z, b, 0));
      else part.inverse(part.at(z, b, 0));
    part.leave(z, false);
    return part.write(norm, nullptr, 0.0f, y);
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
        part.by_columns(b, gains(p.gain_noise), [&](int64_t j, f32 gain) {
          store(block + j * kLanes, load(block + j * kLanes) + load(second + j * kLanes) * gain);
        });
      }
    }
    part.inverse(block);
  }
  part.leave(z, p.columns);
  part.write(1.0f, p.kind == Kind::separable ? noise : nullptr, p.sigma ? p.sigma[sample] : 0.0f, y);
}

void run(const Problem& p, int64_t plane, float* scratch) {
  typed(p.type, [&]<class T>() { run_typed<T>(p, plane, scratch); });
}

}  // namespace

const Kernels kernels{scratch, run};

}  // namespace fastdiff::dct::FASTDIFF_ISA
