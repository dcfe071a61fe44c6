// y[m][n] = sum_k x[m][k] w[n][k] + bias[n]: weights row-major in place, read from memory once for all rows of the pass.
// Each (m, n) has its own chain of partial sums over k, so the result is the same bits for any number of rows or threads.
#pragma once
#include "vectors.h"

// One partial product of a lane group: how a weight chunk meets an input chunk.
struct Float32 {
  typedef float element;
  typedef f16 chunk;
  static constexpr int64_t lanes = 16;
  static inline chunk fetch(const float* p) { return load(p); }
  static inline chunk fetch_part(const float* p, int64_t count) { return load_part(p, count); }
  static inline f16 accumulate(f16 sum, chunk w, chunk x) { return sum + w * x; }
  static inline float rounded(float x) { return x; }
  static inline f4 rounded(f4 x) { return x; }
  static inline f16 rounded(f16 x) { return x; }
};

#if defined(__AVX512BF16__)
struct BFloat16 {
  typedef bf16 element;
  typedef __m512i chunk;
  static constexpr int64_t lanes = 32;
  static inline chunk fetch(const bf16* p) { return _mm512_loadu_si512(p); }
  static inline chunk fetch_part(const bf16* p, int64_t count) {
    bf16 padded[32] = {};
    memcpy(padded, p, count * sizeof(bf16));
    return _mm512_loadu_si512(padded);
  }
  static inline f16 accumulate(f16 sum, chunk w, chunk x) {
    return (f16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
  }
  static inline float rounded(float x) { return round_bf16(x); }
  static inline f4 rounded(f4 x) { return round_bf16(x); }
  static inline f16 rounded(f16 x) { return round_bf16(x); }
};
#else
struct BFloat16 {
  typedef bf16 element;
  typedef f16 chunk;
  static constexpr int64_t lanes = 16;
  static inline chunk fetch(const bf16* p) { return load(p); }
  static inline chunk fetch_part(const bf16* p, int64_t count) { return load_part(p, count); }
  static inline f16 accumulate(f16 sum, chunk w, chunk x) { return sum + w * x; }
  static inline float rounded(float x) { return round_bf16(x); }
  static inline f4 rounded(f4 x) { return round_bf16(x); }
  static inline f16 rounded(f16 x) { return round_bf16(x); }
};
#endif

template <typename P, int N, int M>
static inline void block(const typename P::element* w, const typename P::element* x, int64_t depth,
                         const typename P::element* bias, float* y, int64_t y_stride) {
  // Every loop over sums is unrolled: an index that the compiler cannot see would keep the sums in memory.
  f16 sums[N][M];
#pragma GCC unroll 8
  for (int n = 0; n < N; n++) {
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) sums[n][m] = f16{};
  }
  int64_t k = 0;
  for (; k + P::lanes <= depth; k += P::lanes) {
    typename P::chunk chunks[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      chunks[n] = P::fetch(w + n * depth + k);
      // The hardware does not foresee the rows of the next blocks: one line of each per chunk, two blocks ahead. (A single
      // input row leaves the prefetcher enough time, and the extra loads would cost.)
      if constexpr (M > 1) __builtin_prefetch(w + (n + 2 * N) * depth + k);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      typename P::chunk input = P::fetch(x + m * depth + k);
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) sums[n][m] = P::accumulate(sums[n][m], chunks[n], input);
    }
  }
  if (k < depth) {
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      typename P::chunk input = P::fetch_part(x + m * depth + k, depth - k);
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) sums[n][m] = P::accumulate(sums[n][m], P::fetch_part(w + n * depth + k, depth - k), input);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) {
    if constexpr (N % 4 == 0) {
#pragma GCC unroll 2
      for (int n = 0; n < N; n += 4) {
        f4 result = sum4(sums[n][m], sums[n + 1][m], sums[n + 2][m], sums[n + 3][m]);
        if (bias) result += load4(bias + n);
        result = P::rounded(result);
        memcpy(y + m * y_stride + n, &result, sizeof result);
      }
    } else {
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) {
        float result = sum(sums[n][m]);
        y[m * y_stride + n] = P::rounded(bias ? result + to_float(bias[n]) : result);
      }
    }
  }
}

template <typename P, int N>
static inline void block_of_rows(int64_t rows, const typename P::element* w, const typename P::element* x, int64_t depth,
                                 const typename P::element* bias, float* y, int64_t y_stride) {
  switch (rows) {
    case 1: return block<P, N, 1>(w, x, depth, bias, y, y_stride);
    case 2: return block<P, N, 2>(w, x, depth, bias, y, y_stride);
    case 3: return block<P, N, 3>(w, x, depth, bias, y, y_stride);
    case 4: return block<P, N, 4>(w, x, depth, bias, y, y_stride);
    case 5: return block<P, N, 5>(w, x, depth, bias, y, y_stride);
    default: return block<P, N, 6>(w, x, depth, bias, y, y_stride);
  }
}

// Outputs first..last-1 of all rows; x is (rows, depth) and contiguous.
template <typename P>
static void product(const void* weights, const void* biases, const typename P::element* x, int64_t rows, int64_t depth,
                    int64_t first, int64_t last, float* y, int64_t y_stride) {
  const auto *w = (const typename P::element*)weights, *bias = (const typename P::element*)biases;
  const int64_t groups = (rows + 5) / 6;
  int64_t n = first;
  auto all_rows = [&](auto width) {
    constexpr int N = decltype(width)::value;
    int64_t done = 0;
    for (int64_t group = 0; group < groups; group++) {
      int64_t count = (rows - done + (groups - group) - 1) / (groups - group);
      block_of_rows<P, N>(count, w + n * depth, x + done * depth, depth, bias ? bias + n : nullptr, y + done * y_stride + n,
                          y_stride);
      done += count;
    }
    n += N;
  };
  if (rows <= 3)
    while (n + 8 <= last) all_rows(std::integral_constant<int, 8>{});
  while (n + 4 <= last) all_rows(std::integral_constant<int, 4>{});
  while (n < last) all_rows(std::integral_constant<int, 1>{});
}
