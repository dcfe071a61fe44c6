// y[m][n] = sum_k x[m][k] w[n][k] + bias[n]: weights row-major in place, read from memory once for all rows of the pass.
// Each (m, n) has its own chain of partial sums over k, so the result is the same bits for any number of rows or threads.
#pragma once
#include "vectors.h"

constexpr int64_t group_rows = 6;  // input rows whose sums fit in the registers beside the weight rows of a block

// How far apart the weight rows of a block are, at most `most`. An odd number: with an even one, rows of a length that is a power
// of two would crowd into a few sets of the cache.
inline int64_t spread(int64_t most) { return most > 8 && most % 2 == 0 ? most - 1 : most; }

#if defined(TELLTALE_AVX2)
#include "products_avx2.h"
#else

// One partial product of a lane group: how a weight chunk meets an input chunk. Inputs are stored as what the product takes.
// widened(): weights of 8 bits, scaled and rounded to the model's dtype.
// `widens_keys`: keys can be met as float copies too.
struct Float32 {
  typedef float element;
  typedef float input;
  typedef f16 sums;
  typedef f16 chunk;
  static constexpr int64_t lanes = 16;
  static constexpr bool widens_keys = false;
  static inline chunk fetch(const float* p) { return load(p); }
  static inline chunk fetch_part(const float* p, int64_t count) { return load_part(p, count); }
  static inline chunk widened(const int8_t* p, float scale) { return load(p) * scale; }
  static inline f16 accumulate(f16 sum, chunk w, chunk x) { return sum + w * x; }
  static inline float rounded(float x) { return x; }
  static inline f4 rounded(f4 x) { return x; }
  static inline f16 rounded(f16 x) { return x; }
};

#if defined(__AVX512BF16__)
struct BFloat16 {
  typedef bf16 element;
  typedef bf16 input;
  typedef f16 sums;
  typedef __m512i chunk;
  static constexpr int64_t lanes = 32;
  static constexpr bool widens_keys = false;
  static inline chunk fetch(const bf16* p) { return _mm512_loadu_si512(p); }
  static inline chunk fetch_part(const bf16* p, int64_t count) {
    bf16 padded[32] = {};
    memcpy(padded, p, count * sizeof(bf16));
    return _mm512_loadu_si512(padded);
  }
  static inline chunk widened(const int8_t* p, float scale) {
    return (chunk)_mm512_cvtne2ps_pbh((__m512)(load(p + 16) * scale), (__m512)(load(p) * scale));
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
  typedef float input;
  typedef f16 sums;
  typedef f16 chunk;
  static constexpr int64_t lanes = 16;
  static constexpr bool widens_keys = true;
  template <typename T>
  static inline chunk fetch(const T* p) { return load(p); }
  template <typename T>
  static inline chunk fetch_part(const T* p, int64_t count) { return load_part(p, count); }
  static inline chunk widened(const int8_t* p, float scale) { return round_bf16(load(p) * scale); }
  static inline f16 accumulate(f16 sum, chunk w, chunk x) { return sum + w * x; }
  static inline float rounded(float x) { return round_bf16(x); }
  static inline f4 rounded(f4 x) { return round_bf16(x); }
  static inline f16 rounded(f16 x) { return round_bf16(x); }
};
#endif

// Floats in the order and the type in which products and scores take their input.
template <typename P>
inline void arrange(const float* x, int64_t depth, typename P::input* out) {
  convert(x, out, depth);
}

// N outputs of M rows, `apart` outputs from each other; a function of its own so that its sums have all registers. `ahead`: of
// Ahead weight rows, equally far apart, the lines are fetched that a later block reads.
template <typename P, int N, int M, int Ahead>
[[gnu::noinline]] static void block(const typename P::element* w, int64_t apart, const typename P::element* ahead,
                                    const typename P::input* x, int64_t depth, const typename P::element* bias, float* y,
                                    int64_t y_stride) {
  const int64_t stride = apart * depth;
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
      chunks[n] = P::fetch(w + n * stride + k);
      if (n < Ahead) __builtin_prefetch(ahead + n * stride + k);
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
      for (int n = 0; n < N; n++) sums[n][m] = P::accumulate(sums[n][m], P::fetch_part(w + n * stride + k, depth - k), input);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) {
    if constexpr (N % 4 == 0) {
#pragma GCC unroll 2
      for (int n = 0; n < N; n += 4) {
        f4 result = sum4(sums[n][m], sums[n + 1][m], sums[n + 2][m], sums[n + 3][m]);
        const int64_t out = m * y_stride + n * apart;
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
          if (bias) result[i] += to_float(bias[(n + i) * apart]);
        result = P::rounded(result);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) y[out + i * apart] = result[i];
      }
    } else {
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) {
        float result = sum(sums[n][m]);
        y[m * y_stride + n * apart] = P::rounded(bias ? result + to_float(bias[n * apart]) : result);
      }
    }
  }
}

constexpr int64_t lone_ahead = 1024;  // bytes

// One reader of memory is served faster when it reads from several places in turn, so the rows of a block are spread over all that
// this member of the team reads: N streams, each in the order of its addresses. Groups of input rows share the fetching ahead: all
// of it in the first group would make the memory wait for the others.
template <typename P, int N, int Groups>
static void blocks(int64_t& first, int64_t last, const typename P::element* w, const typename P::element* bias,
                   const typename P::input* x, int64_t rows, int64_t depth, float* y, int64_t y_stride) {
  constexpr int share = (N + Groups - 1) / Groups;
  const int64_t groups = (rows + group_rows - 1) / group_rows, apart = spread((last - first) / N);
  for (const int64_t stop = first + apart; first < stop; first++) {
    int64_t done = 0;
    for (int64_t group = 0; group < groups; group++) {
      const int64_t count = (rows - done + (groups - group) - 1) / (groups - group);
      auto run = [&](auto number) {
        const int64_t near = rows == 1 ? lone_ahead / (int64_t)sizeof(*w) : 2 * depth;
        block<P, N, decltype(number)::value, share>(
            w + first * depth, apart, w + (first + group * share * apart) * depth + near, x + done * depth, depth,
            bias ? bias + first : nullptr, y + done * y_stride + first, y_stride);
      };
      switch (count) {
        case 1: run(std::integral_constant<int, 1>{}); break;
        case 2: run(std::integral_constant<int, 2>{}); break;
        case 3: run(std::integral_constant<int, 3>{}); break;
        case 4: run(std::integral_constant<int, 4>{}); break;
        case 5: run(std::integral_constant<int, 5>{}); break;
        default: run(std::integral_constant<int, 6>{}); break;
      }
      done += count;
    }
  }
  first += (N - 1) * apart;
}

// Outputs first..last-1 of all rows; x is (rows, depth) and contiguous.
template <typename P>
static void product(const void* weights, const void* biases, const typename P::input* x, int64_t rows, int64_t depth,
                    int64_t first, int64_t last, float* y, int64_t y_stride) {
  const auto *w = (const typename P::element*)weights, *bias = (const typename P::element*)biases;
  int64_t n = first;
  if (rows <= 3) blocks<P, 8, 1>(n, last, w, bias, x, rows, depth, y, y_stride);
  if (rows <= group_rows) blocks<P, 4, 1>(n, last, w, bias, x, rows, depth, y, y_stride);
  else if (rows <= 2 * group_rows) blocks<P, 4, 2>(n, last, w, bias, x, rows, depth, y, y_stride);
  else blocks<P, 4, 4>(n, last, w, bias, x, rows, depth, y, y_stride);
  blocks<P, 1, 1>(n, last, w, bias, x, rows, depth, y, y_stride);
}

#endif
