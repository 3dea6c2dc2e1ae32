// mma.sync and ldmatrix on the fragments of 32 lanes: csrc/common/mma.cuh says who holds what.
#pragma once

namespace fastdiff {
namespace emulation {

// d (16 x 8) += a (16 x K) b (K x 8). Coordinates of register i of a lane: a_at(lane, i, element), and so on; `value` unpacks an element.
template <int K, int per_register, int na, int nb, class Value>
void multiply(const char* operation, float (&d)[4], const uint32_t (&a)[na], const uint32_t (&b)[nb], const Value& value) {
  struct Offer { float* d; const uint32_t *a, *b; } mine{d, a, b};
  meet_warp(operation, 0xffffffff, mine, [&](Offer* (&all)[32]) {
    float A[16][K], B[K][8];
    for (int l = 0; l < 32; ++l) {
      const int g = l / 4, t = l % 4;
      for (int e = 0; e < per_register; ++e) {
        for (int i = 0; i < na; ++i) A[g + i % 2 * 8][i / 2 * 4 * per_register + t * per_register + e] = value(all[l]->a[i], e);
        for (int i = 0; i < nb; ++i) B[i * 4 * per_register + t * per_register + e][g] = value(all[l]->b[i], e);
      }
    }
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i)
        for (int k = 0; k < K; ++k) all[l]->d[i] += A[l / 4 + i / 2 * 8][k] * B[k][l % 4 * 2 + i % 2];
  });
}

template <int n, class T>
void load_matrices(const char* operation, uint32_t (&r)[n], const Checked<T, true>& row, bool transposed) {
  static_assert(sizeof(T) == 2 && (n == 1 || n == 2 || n == 4));
  Block& b = *Block::now;
  const T* at = nullptr;
  if (b.lane() < 8 * n) {
    at = row.check(0, 8);
    b.access(at, 16, false);
  }
  struct Offer { uint32_t* r; const T* row; } mine{r, at};
  meet_warp(operation, 0xffffffff, mine, [&](Offer* (&all)[32]) {
    const auto element = [&](int matrix, int row, int column) {
      uint16_t bits;
      std::memcpy(&bits, transposed ? all[8 * matrix + column]->row + row : all[8 * matrix + row]->row + column, 2);
      return uint32_t{bits};
    };
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < n; ++i) all[l]->r[i] = element(i, l / 4, l % 4 * 2) | element(i, l / 4, l % 4 * 2 + 1) << 16;
  });
}

}  // namespace emulation

template <class T, int na, int nb>
void mma(float (&d)[4], const uint32_t (&a)[na], const uint32_t (&b)[nb]) {
  static_assert(na == 2 * nb && (nb == 1 || nb == 2));
  emulation::multiply<8 * nb, 2>("mma", d, a, b, [](uint32_t x, int e) { return to_float(T{static_cast<uint16_t>(x >> 16 * e)}); });
}

inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::multiply<8, 1>("mma_tf32", d, a, b, [](uint32_t x, int) { return from_bits(x & 0xffffe000); });  // the unit reads 19 bits
}

template <int n, class T>
void load_matrices(uint32_t (&r)[n], const Shared<T>& row) { emulation::load_matrices<n>("load_matrices", r, row, false); }
template <int n, class T>
void load_matrices_transposed(uint32_t (&r)[n], const Shared<T>& row) { emulation::load_matrices<n>("load_matrices_transposed", r, row, true); }

}  // namespace fastdiff
