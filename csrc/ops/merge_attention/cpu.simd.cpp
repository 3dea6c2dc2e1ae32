#include "ops/merge_attention/op.h"

#include "common/vec.h"

namespace fastdiff::merge_attention::FASTDIFF_ISA {
namespace {

using namespace fastdiff::FASTDIFF_ISA;

constexpr float kInf = __builtin_inff();

template <class T>
const T* row(const View& x, const Sizes& n, int64_t i) {
  return static_cast<const T*>(x.data) + i / (n.H * n.M) * x.b + i / n.M % n.H * x.h + i % n.M * x.s;
}

// What each side weighs in one row, both 0 where neither has a key, and the log-sum-exp of the union.
struct Weights {
  float a, b, lse;
  Weights(float lse_a, float lse_b) {
    const float larger = lse_a > lse_b || lse_a != lse_a ? lse_a : lse_b, top = larger == -kInf ? 0.0f : larger;
    const float ea = __builtin_expf(lse_a - top), eb = __builtin_expf(lse_b - top), total = ea + eb;
    const float norm = total == 0.0f ? 0.0f : 1.0f / total;
    a = ea * norm, b = eb * norm;
    lse = total == 0.0f ? -kInf : top + __builtin_logf(total);
  }
};

void merge(const Sizes& n, const Side& a, const Side& b, const Result& merged, int64_t begin, int64_t end) {
  typed(n.type, [&]<class T>() {
    for (int64_t i = begin; i < end; ++i) {
      const Weights w(a.lse[i], b.lse[i]);
      const T *x = row<T>(a.out, n, i), *y = row<T>(b.out, n, i);
      T* out = static_cast<T*>(merged.out) + i * n.E;
      for_vectors(n.E, [&](int64_t j, const auto& get, const auto& put, int) { put(out + j, get(x + j) * w.a + get(y + j) * w.b); });
      merged.lse[i] = w.lse;
    }
  });
}

// With g = sum_e dout (a - b): da = w_a dout, dlse_a = w_a (w_b g + dlse), and b's with -g.
void backward(const Sizes& n, const View& dout, const float* dlse, const Side& a, const Side& b, const Result& da, const Result& db,
              int64_t begin, int64_t end) {
  typed(n.type, [&]<class T>() {
    for (int64_t i = begin; i < end; ++i) {
      const Weights w(a.lse[i], b.lse[i]);
      const T *dy = row<T>(dout, n, i), *x = row<T>(a.out, n, i), *y = row<T>(b.out, n, i);
      T *dx = static_cast<T*>(da.out) + i * n.E, *dz = static_cast<T*>(db.out) + i * n.E;
      f32 sum = {};
      for_vectors(n.E, [&](int64_t j, const auto& get, const auto& put, int) {
        const f32 g = get(dy + j);
        put(dx + j, g * w.a);
        put(dz + j, g * w.b);
        sum += g * (get(x + j) - get(y + j));
      });
      const float g = reduce_add(sum), rest = dlse ? dlse[i] : 0.0f;
      da.lse[i] = w.a * (w.b * g + rest);
      db.lse[i] = w.b * (rest - w.a * g);
    }
  });
}

}  // namespace

const Kernels kernels{merge, backward};

}  // namespace fastdiff::merge_attention::FASTDIFF_ISA
