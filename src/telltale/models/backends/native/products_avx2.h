// product() for processors with AVX2 and without AVX-512. They have sixteen registers of eight lanes, so the sixteen lanes of
// vectors.h take two of them, and blocks of such sums do not fit. Here an output has one register of sums. Sixteen neighbours of
// a row of weights go into it in two steps: in float the first eight, then the others; in bfloat16, of which one register holds
// all sixteen, the eight even ones, then the odd ones. A shift makes floats of the even ones and a mask of the odd ones, so
// weights are widened where they are multiplied, as fast as floats are. The input lies in the same order (see arrange()). A rest
// of a row is filled up with zeros, and at the end stands sum() of the lanes.
#pragma once
#include <immintrin.h>
#include "model.h"

typedef float unaligned8 __attribute__((vector_size(32), aligned(4), may_alias));

// In this form of the instruction the sums stay where they are; GCC chooses others and then runs out of registers.
static inline f8 multiply_add(f8 sum, f8 a, f8 b) {
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
  return sum;
}

// What sixteen neighbours are for multiply_add().
struct Chunk {
  f8 first, second;
};

// What both dtypes have in common; input is in the order of the weights' halves.
struct TwoSteps {
  typedef float input;
  typedef f8 sums;
  typedef Chunk chunk;
  static constexpr int64_t lanes = 16;
  static constexpr bool widens_keys = false;
  static inline chunk fetch(const float* p) { return {load8(p), load8(p + 8)}; }
  static inline f8 accumulate(f8 sum, chunk w, chunk x) {
    return multiply_add(multiply_add(sum, w.first, x.first), w.second, x.second);
  }
};

struct Float32 : TwoSteps {
  typedef float element;
  static constexpr bool natural = true;  // the order of its input
  static constexpr int needs = 0;        // registers beside those of a product
  template <int Half>
  static inline f8 half(const float* p) { return load8(p + 8 * Half); }
  static inline chunk fetch_part(const float* p, int64_t count) {
    float padded[16] = {};
    memcpy(padded, p, count * sizeof(float));
    return fetch(padded);
  }
  static void arrange(const float* x, int64_t depth, float* out) { memcpy(out, x, depth * sizeof(float)); }
  static inline float rounded(float x) { return x; }
  static inline f4 rounded(f4 x) { return x; }
  static inline f16 rounded(f16 x) { return x; }
};

struct BFloat16 : TwoSteps {
  typedef bf16 element;
  static constexpr bool natural = false;
  static constexpr int needs = 1;  // the mask
  using TwoSteps::fetch;
  template <int Half>
  static inline f8 half(const bf16* p) {
    if constexpr (Half == 0) return (f8)_mm256_slli_epi32(_mm256_loadu_si256((const __m256i*)p), 16);
    // From memory again: GCC would keep what the other half was made of, and has no register for it.
    f8 odd;
    asm("vandps %1, %2, %0" : "=x"(odd) : "m"(*(const unaligned8*)p), "x"((f8)_mm256_set1_epi32((int)0xffff0000u)));
    return odd;
  }
  static inline chunk fetch(const bf16* p) { return {half<0>(p), half<1>(p)}; }
  static inline chunk fetch_part(const bf16* p, int64_t count) {
    bf16 padded[16] = {};
    memcpy(padded, p, count * sizeof(bf16));
    return fetch(padded);
  }
  // A rest of the input, which lies in its natural order.
  static inline chunk fetch_part(const float* p, int64_t count) {
    float padded[16] = {};
    memcpy(padded, p, count * sizeof(float));
    return halves(padded);
  }
  // Input as products take it: of each sixteen neighbours the even ones, then the odd ones, and a rest as it is.
  static void arrange(const float* x, int64_t depth, float* out) {
    int64_t k = 0;
    for (; k + lanes <= depth; k += lanes) {
      const chunk both = halves(x + k);
      store8(out + k, both.first);
      store8(out + k + 8, both.second);
    }
    memcpy(out + k, x + k, (depth - k) * sizeof(float));
  }
  static inline float rounded(float x) { return round_bf16(x); }
  static inline f4 rounded(f4 x) { return round_bf16(x); }
  static inline f16 rounded(f16 x) { return round_bf16(x); }

 private:
  static inline chunk halves(const float* p) {
    const f8 low = load8(p), high = load8(p + 8);
    return {__builtin_shufflevector(low, high, 0, 2, 4, 6, 8, 10, 12, 14),
            __builtin_shufflevector(low, high, 1, 3, 5, 7, 9, 11, 13, 15)};
  }
};

template <typename P>
inline void arrange(const float* x, int64_t depth, float* out) {
  P::arrange(x, depth, out);
}

// The part from..to-1 of the depth, in whole chunks but for the last part. What a part has summed up is kept for the next.
struct Part {
  int64_t from, to, depth;
  float* kept;
  bool begins() const { return from == 0; }
  bool ends() const { return to == depth; }
};

// N outputs of M rows, `apart` outputs from each other; a function of its own so that its sums have all registers. So many bytes
// `ahead` the lines are fetched that a later block reads, to the nearest cache or (Near = false) to the next.
template <typename P, int N, int M, bool Near>
[[gnu::noinline]] static void block(const typename P::element* w, int64_t apart, int64_t ahead, const float* x, const Part& part,
                                    const typename P::element* bias, float* y, int64_t y_stride) {
  const int64_t depth = part.depth, stride = apart * depth;
  f8 sums[N][M];
#pragma GCC unroll 8
  for (int n = 0; n < N; n++)
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) sums[n][m] = part.begins() ? f8{} : load8(part.kept + (n * M + m) * 8);
  int64_t k = part.from;
  auto step = [&](auto half) {
    constexpr int H = decltype(half)::value;
    auto weights = [&](int n) { return P::template half<H>(w + n * stride + k); };
    auto input = [&](int m) {
      f8 loaded = load8(x + m * depth + k + 8 * H);
      asm("" : "+x"(loaded));  // else GCC loads it for each of the N again
      return loaded;
    };
    if constexpr (M == 1) {  // no weight is needed twice
      const f8 own = input(0);
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) sums[n][0] = multiply_add(sums[n][0], weights(n), own);
    } else {
      f8 held[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) held[n] = weights(n);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        const f8 own = input(m);
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) sums[n][m] = multiply_add(sums[n][m], held[n], own);
      }
    }
  };
  for (; k + P::lanes <= part.to; k += P::lanes) {
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) __builtin_prefetch((const char*)(w + n * stride + k) + ahead, 0, Near ? 3 : 2);
    step(std::integral_constant<int, 0>{});
    step(std::integral_constant<int, 1>{});
  }
  if (k < part.to) {
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      const Chunk weights = P::fetch_part(w + n * stride + k, part.to - k);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++)
        sums[n][m] = P::accumulate(sums[n][m], weights, P::fetch_part(x + m * depth + k, part.to - k));
    }
  }
  if (!part.ends()) {
#pragma GCC unroll 8
    for (int n = 0; n < N; n++)
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) store8(part.kept + (n * M + m) * 8, sums[n][m]);
    return;
  }
#pragma GCC unroll 4
  for (int i = 0; i < N * M; i += 4) {
    auto own = [&](int place) { return place < N * M ? sums[place % N][place / N] : f8{}; };
    f4 result = sum4(own(i), own(i + 1), own(i + 2), own(i + 3));
    if (bias)
      for (int j = 0; j < 4; j++) result[j] += to_float(bias[(i + j) % N * apart]);
    result = P::rounded(result);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++)
      if (i + j < N * M) y[(i + j) / N * y_stride + (i + j) % N * apart] = result[j];
  }
}

constexpr int64_t lone_ahead = 512, near_ahead = 1024;  // bytes
constexpr int64_t part_depth = 768;                     // elements of a group's rows that the nearest cache holds
constexpr int64_t panel_rows = 16;                      // weight rows of one place that the next cache holds

// Calls run(number) with 1..group_rows as a constant.
template <typename Run>
inline void with_rows(int64_t rows, const Run& run) {
  switch (rows) {
    case 1: return run(std::integral_constant<int, 1>{});
    case 2: return run(std::integral_constant<int, 2>{});
    case 3: return run(std::integral_constant<int, 3>{});
    case 4: return run(std::integral_constant<int, 4>{});
    case 5: return run(std::integral_constant<int, 5>{});
    default: return run(std::integral_constant<int, 6>{});
  }
}

// Weight rows beside so many input rows: as many as there are registers for their sums, themselves, an input, and what a dtype
// needs. A lone input meets each weight once, as it comes.
template <typename P>
constexpr int beside(int rows) {
  return rows == 1 ? 8 : std::min(4, (15 - P::needs) / (rows + 1));
}

// Up to group_rows input rows. The rows of a block are spread over all that this member of the team reads: see spread().
template <typename P, int N, int M>
static void blocks(int64_t& first, int64_t last, const typename P::element* w, const typename P::element* bias, const float* x,
                   int64_t depth, float* y, int64_t y_stride) {
  const int64_t apart = spread((last - first) / N);
  for (const int64_t stop = first + apart; first < stop; first++)
    block<P, N, M, true>(w + first * depth, apart, M == 1 ? lone_ahead : near_ahead, x, {0, depth, depth, nullptr},
                         bias ? bias + first : nullptr, y + first, y_stride);
  first += (N - 1) * apart;
}

// More input rows. A panel of weight rows, from two places, stays in a cache near enough while the groups of input rows pass, each
// of which stays in the nearest cache; the first group fetches the next panel.
template <typename P>
static void panels(int64_t first, int64_t last, const typename P::element* w, const typename P::element* bias, const float* x,
                   int64_t rows, int64_t depth, float* y, int64_t y_stride) {
  const int64_t groups = (rows + group_rows - 1) / group_rows, parts = (depth + part_depth - 1) / part_depth;
  const int64_t part = ((depth + parts - 1) / parts + P::lanes - 1) / P::lanes * P::lanes;
  const int64_t kept_size = parts > 1 ? panel_rows * 2 * rows * 8 : 0;
  panel_scratch.start(kept_size * sizeof(float), 1);
  float* kept = panel_scratch.take<float>(kept_size);
  for (int64_t apart; (apart = spread((last - first) / 2)) > 0; first += 2 * apart)
    for (int64_t start = first; start < first + apart; start += panel_rows) {
      const int64_t stop = std::min(first + apart, start + panel_rows);
      for (int64_t from = 0; from < depth; from += part) {
        Part own{from, std::min(depth, from + part), depth, kept};
        for (int64_t group = 0, done = 0; group < groups; group++) {
          const int64_t count = (rows - done + (groups - group) - 1) / (groups - group);
          const int64_t ahead = group == 0 ? panel_rows * depth * (int64_t)sizeof(*w) : 0;
          with_rows(count, [&](auto number) {
            constexpr int M = decltype(number)::value;
            for (int64_t n = start; n < stop; n++, own.kept += 2 * M * 8)
              block<P, 2, M, false>(w + n * depth, apart, ahead, x + done * depth, own, bias ? bias + n : nullptr,
                                    y + done * y_stride + n, y_stride);
          });
          done += count;
        }
      }
    }
  if (first < last)
    for (int64_t done = 0; done < rows; done += group_rows)
      with_rows(std::min(group_rows, rows - done), [&](auto number) {
        int64_t n = first;
        blocks<P, 1, decltype(number)::value>(n, last, w, bias, x + done * depth, depth, y + done * y_stride, y_stride);
      });
}

// Outputs first..last-1 of all rows; x is (rows, depth), contiguous and in the order of arrange().
template <typename P>
static void product(const void* weights, const void* biases, const float* x, int64_t rows, int64_t depth, int64_t first,
                    int64_t last, float* y, int64_t y_stride) {
  const auto *w = (const typename P::element*)weights, *bias = (const typename P::element*)biases;
  if (rows > group_rows) return panels<P>(first, last, w, bias, x, rows, depth, y, y_stride);
  with_rows(rows, [&](auto number) {
    constexpr int M = decltype(number)::value;
    while (last - first >= beside<P>(M)) blocks<P, beside<P>(M), M>(first, last, w, bias, x, depth, y, y_stride);
    blocks<P, 1, M>(first, last, w, bias, x, depth, y, y_stride);
  });
}
