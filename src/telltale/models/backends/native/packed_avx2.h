// The matrices in 8 bits of packed.h for processors with AVX2 and without AVX-512. Four rows lie together, group by group, and of
// the 32 values of a group the eight that fill a register are four bytes apart: byte 4 i + j is lane i of step j of four. So one
// instruction takes a step out of memory, as the top bytes of eight integers that begin three bytes before step 0. The steps are
// those of two chunks in products_avx2.h, in bfloat16 the even columns of sixteen, then the odd ones.
#pragma once
#include "products_avx2.h"

namespace {

constexpr int64_t packed_lead = 64;   // bytes before the first value of a matrix that may be read
constexpr int64_t step_ahead = 3072;  // bytes

// The numbers of a step: `value` is 2^24 times the value, a scale comes times `factor`. Their product is exact in float.
template <typename P>
struct Dequantized;

template <>
struct Dequantized<Float32> {
  static constexpr float factor = 0x1p-24f;
  static constexpr int64_t most_rows = group_rows;  // beyond which the long form takes less time
  static inline f8 number(f8 value, f8 scale) { return value * scale; }
};

// The nearest bfloat16, ties to even: x + 2^16 x keeps of x, a number of 18 bits, the first 8 behind the 16 of 2^16 x.
template <>
struct Dequantized<BFloat16> {
  static constexpr float factor = 0x1p-8f;
  static constexpr int64_t most_rows = 1;
  static inline f8 number(f8 value, f8 scale) {
    const f8 high = value * scale;
    f8 sum = high * (1.0f + 0x1p-16f);
    asm("" : "+x"(sum));  // else the compiler makes one instruction of both, which does not round between
    return sum - high;
  }
};

// One step of a row, as the top bytes of eight integers.
template <typename P>
inline f8 step_of(const int8_t* values, float scale, int64_t step) {
  const __m256i bytes = _mm256_loadu_si256((const __m256i*)(values + step - 3));
  const __m256i integers = _mm256_and_si256(bytes, _mm256_set1_epi32((int)0xff000000u));
  return Dequantized<P>::number((f8)_mm256_cvtepi32_ps(integers), f8{} + scale);
}

// Outputs of N of four weight rows, of which the first `count` are kept, for M rows: block() of products_avx2.h, whose order of
// additions it has.
template <typename P, int N, int M>
[[gnu::noinline]] void packed_block(PackedRows w, int64_t count, const float* x, int64_t depth, const typename P::element* bias,
                                    float* y, int64_t y_stride) {
  f8 sums[N][M];
#pragma GCC unroll 4
  for (int n = 0; n < N; n++)
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) sums[n][m] = f8{};
  auto step = [&](int64_t j, auto fetch) {
    f8 weights[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) weights[n] = step_of<P>(w.values + n * group_size, w.scales[n], j);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      f8 input = fetch(m);
      asm("" : "+x"(input));
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) sums[n][m] = multiply_add(sums[n][m], weights[n], input);
    }
  };
  int64_t k = 0;
  auto next = [&] { k += group_size, w.values += packed_rows * group_size, w.scales += packed_rows; };
  for (; k + group_size <= depth; next()) {
    __builtin_prefetch(w.values + step_ahead);
    __builtin_prefetch(w.values + step_ahead + 64);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) step(j, [&](int m) { return load8(x + m * depth + k + 8 * j); });
  }
  for (int j = 0; k < depth; k += P::lanes, j += 2) {
    auto part = [&](int m) {
      const float* input = x + m * depth + k;
      return k + P::lanes <= depth ? P::fetch(input) : P::fetch_part(input, depth - k);
    };
    step(j, [&](int m) { return part(m).first; });
    step(j + 1, [&](int m) { return part(m).second; });
  }
#pragma GCC unroll 4
  for (int i = 0; i < N * M; i += 4) {
    auto own = [&](int place) { return place < N * M ? sums[place % N][place / N] : f8{}; };
    f4 result = sum4(own(i), own(i + 1), own(i + 2), own(i + 3));
    if (bias)
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) result[j] += (i + j) % N < count ? to_float(bias[(i + j) % N]) : 0.0f;
    result = P::rounded(result);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++)
      if (i + j < N * M && (i + j) % N < count) y[(i + j) / N * y_stride + (i + j) % N] = result[j];
  }
}

// Calls body(first row, four rows, their scales times the dtype's factor) for all rows from `first`, a multiple of four, to
// `last` - 1.
template <typename P, typename Body>
void each_scaled(const Matrix& matrix, int64_t depth, int64_t first, int64_t last, const Body& body) {
  const int64_t groups = groups_of(depth), count = packed_rows * groups;
  product_scratch.start((count + 16) * sizeof(float), 1);
  float* scales = product_scratch.take<float>(count + 16);
  for (int64_t n = first; n < last; n += packed_rows) {
    for (int64_t i = 0; i < count; i += 16) store(scales + i, from_half(matrix.scales + n * groups + i) * Dequantized<P>::factor);
    if (!body(n, PackedRows{matrix.values + n * groups * group_size, scales})) return;
  }
}

// product() of products_avx2.h, from the short form of the matrix where that is good and takes less time.
template <typename P>
void matrix_product(const Matrix& matrix, const float* x, int64_t rows, int64_t depth, int64_t first, int64_t last, float* y,
                    int64_t y_stride) {
  if (!matrix.intact || rows > Dequantized<P>::most_rows)
    return product<P>(matrix.weights, matrix.bias, x, rows, depth, first, last, y, y_stride);
  each_scaled<P>(matrix, depth, first, last, [&](int64_t n, PackedRows w) {
    const auto* bias = matrix.bias ? (const typename P::element*)matrix.bias + n : nullptr;
    const int64_t count = std::min(packed_rows, last - n);
    with_rows(rows, [&](auto number) {
      constexpr int M = decltype(number)::value, N = M <= 2 ? 4 : 2;  // as many sums as there are registers for
      if constexpr (M <= Dequantized<P>::most_rows)
        for (int64_t i = 0; i < count; i += N)
          packed_block<P, N, M>({w.values + i * group_size, w.scales + i}, count - i, x, depth, bias ? bias + i : nullptr, y + n + i,
                                y_stride);
    });
    return true;
  });
}

// Whether rows first..last-1 of the model's matrix are the numbers that the short form gives, to the bit.
template <typename P>
bool same_numbers(const Matrix& matrix, int64_t depth, int64_t first, int64_t last) {
  typedef typename P::element E;
  __m256i differs = _mm256_setzero_si256();
  each_scaled<P>(matrix, depth, first, last, [&](int64_t n, PackedRows w) {
    const int64_t rows = std::min(packed_rows, last - n);
    for (int64_t k = 0; k < depth; k += P::lanes) {
      const int64_t group = k / group_size, step = k % group_size / 8;
      const int8_t* values = w.values + group * packed_rows * group_size;
      __builtin_prefetch(values + packed_ahead + k % group_size * 4);
      for (int64_t i = 0; i < rows; i++) {
        const E* own = (const E*)matrix.weights + (n + i) * depth + k;
        const Chunk given = k + P::lanes <= depth ? P::fetch(own) : P::fetch_part(own, depth - k);
        auto compare = [&](int64_t j, f8 wanted) {
          const f8 made = step_of<P>(values + i * group_size, w.scales[group * packed_rows + i], j);
          differs = _mm256_or_si256(differs, _mm256_xor_si256((__m256i)made, (__m256i)wanted));
        };
        compare(step, given.first);
        compare(step + 1, given.second);
      }
    }
    return bool(_mm256_testz_si256(differs, differs));
  });
  return _mm256_testz_si256(differs, differs);
}

}  // namespace
