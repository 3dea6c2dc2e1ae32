#include "ops/merge_attention/op.h"

#include "common/vec.h"

namespace fastdiff::merge_attention::FASTDIFF_ISA {
namespace {

using namespace fastdiff::FASTDIFF_ISA;

constexpr float kInf = __builtin_inff();

template <class T>
const T* row(const Side& s, int64_t H, int64_t M, int64_t i) {
  return static_cast<const T*>(s.out) + i / (H * M) * s.b + i / M % H * s.h + i % M * s.m;
}

template <class T>
void merge_rows(const Side& left, const Side& right, int64_t H, int64_t M, int64_t E, T* out, float* lse, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const float a = left.lse[i], b = right.lse[i];
    const float larger = a > b || a != a ? a : b, top = larger == -kInf ? 0.0f : larger;
    const float wa = __builtin_expf(a - top), wb = __builtin_expf(b - top), total = wa + wb;
    const float norm = total == 0.0f ? 0.0f : 1.0f / total, na = wa * norm, nb = wb * norm;
    const T *x = row<T>(left, H, M, i), *y = row<T>(right, H, M, i);
    T* o = out + i * E;
    int64_t j = 0;
    for (; j + kLanes <= E; j += kLanes) store(o + j, load(x + j) * na + load(y + j) * nb);
    if (const int n = static_cast<int>(E - j)) store_n(o + j, load_n(x + j, n) * na + load_n(y + j, n) * nb, n);
    lse[i] = total == 0.0f ? -kInf : top + __builtin_logf(total);
  }
}

void merge(Type type, const Side& left, const Side& right, int64_t H, int64_t M, int64_t E, void* out, float* lse, int64_t begin, int64_t end) {
  switch (type) {
    case Type::f32: return merge_rows(left, right, H, M, E, static_cast<float*>(out), lse, begin, end);
    case Type::bf16: return merge_rows(left, right, H, M, E, static_cast<bf16*>(out), lse, begin, end);
    case Type::f16: return merge_rows(left, right, H, M, E, static_cast<f16*>(out), lse, begin, end);
  }
}

}  // namespace

const Kernels kernels{merge};

}  // namespace fastdiff::merge_attention::FASTDIFF_ISA
