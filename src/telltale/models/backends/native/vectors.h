// Sixteen-lane vectors in GCC/Clang vector extensions: the same source serves AVX-512, AVX2 and NEON.
// Every reduction has one fixed order, so a result never depends on what else is computed beside it.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define TELLTALE_AVX2 1
#endif

typedef float f16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef uint32_t u16 __attribute__((vector_size(64)));
typedef float f8 __attribute__((vector_size(32)));
typedef float f4 __attribute__((vector_size(16)));
typedef uint32_t u4 __attribute__((vector_size(16)));
typedef uint16_t h16 __attribute__((vector_size(32)));
typedef uint16_t bf16;

static inline f16 splat(float x) { return f16{} + x; }

#if defined(TELLTALE_AVX2)
static inline f8 load8(const float* p) { return (f8)_mm256_loadu_ps(p); }

static inline f8 load8(const bf16* p) {
  return (f8)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}

static inline void store8(float* p, f8 v) { _mm256_storeu_ps(p, (__m256)v); }

// In halves: GCC copies a vector of two registers by quarters, through memory.
static inline f16 joined(f8 low, f8 high) {
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

static inline f16 load(const float* p) { return joined(load8(p), load8(p + 8)); }

static inline void store(float* p, f16 v) {
  store8(p, __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7));
  store8(p + 8, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
}
#else
static inline f16 load(const float* p) {
  f16 v;
  memcpy(&v, p, sizeof v);
  return v;
}

static inline void store(float* p, f16 v) { memcpy(p, &v, sizeof v); }
#endif

static inline float to_float(bf16 x) {
  uint32_t bits = (uint32_t)x << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}

#if defined(TELLTALE_AVX2)
static inline f16 load(const bf16* p) { return joined(load8(p), load8(p + 8)); }
#else
static inline f16 load(const bf16* p) {
  h16 h;
  memcpy(&h, p, sizeof h);
#if defined(__AVX512F__)
  return (f16)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);  // GCC makes five instructions of the generic form
#else
  return (f16)(__builtin_convertvector(h, u16) << 16);
#endif
}
#endif

static inline f16 load(const int8_t* p) {
  typedef int8_t b16 __attribute__((vector_size(16)));
  b16 b;
  memcpy(&b, p, sizeof b);
#if defined(__AVX512F__)
  return (f16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)b));
#else
  return __builtin_convertvector(b, f16);
#endif
}

// Round to nearest even, as PyTorch does; NaN stays NaN.
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
static inline h16 narrow(f16 x) { return (h16)_mm512_cvtneps_pbh((__m512)x); }
static inline f4 round_bf16(f4 x) {
  return (f4)_mm_slli_epi32(_mm_cvtepu16_epi32((__m128i)_mm_cvtneps_pbh((__m128)x)), 16);
}
#else
template <typename Float, typename Bits>
static inline Float round_vector(Float x) {
  Bits bits = (Bits)x;
  Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
  Bits number = (Bits)(x == x);
  return (Float)((rounded & number) | (bits & ~number));
}
static inline h16 narrow(f16 x) { return __builtin_convertvector((u16)round_vector<f16, u16>(x) >> 16, h16); }
static inline f4 round_bf16(f4 x) { return round_vector<f4, u4>(x); }
#endif

#if defined(TELLTALE_AVX2)
static inline f16 round_bf16(f16 x) { return round_vector<f16, u16>(x); }
#else
static inline f16 round_bf16(f16 x) { return (f16)(__builtin_convertvector(narrow(x), u16) << 16); }
#endif
static inline float round_bf16(float x) { return round_bf16(f4{x, 0.0f, 0.0f, 0.0f})[0]; }

static inline void store(bf16* p, f16 v) {
  h16 h = narrow(v);
  memcpy(p, &h, sizeof h);
}

template <typename T>
static inline f16 load_part(const T* p, int64_t count) {
  T padded[16] = {};
  memcpy(padded, p, count * sizeof(T));
  return load(padded);
}

template <typename T>
static inline void store_part(T* p, f16 v, int64_t count) {
  T padded[16];
  store(padded, v);
  memcpy(p, padded, count * sizeof(T));
}

// y = x in another element type, `count` of them.
template <typename From, typename To>
static inline void convert(const From* x, To* y, int64_t count) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) store(y + i, load(x + i));
  if (i < count) store_part(y + i, load_part(x + i, count - i), count - i);
}

static inline f4 load4(const float* p) {
  f4 v;
  memcpy(&v, p, sizeof v);
  return v;
}

static inline f4 load4(const bf16* p) { return f4{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }

static inline float to_float(float x) { return x; }

// A lane sum has two stages: each quarter of four lanes by itself, then the quarters.
static inline f4 sum_quarters(f16 v) {
  f8 halves = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  return __builtin_shufflevector(halves, halves, 0, 1, 2, 3) + __builtin_shufflevector(halves, halves, 4, 5, 6, 7);
}

// Four lane sums at once.
static inline f4 sum4(f16 a, f16 b, f16 c, f16 d) {
  f16 ab = __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
           __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  f16 cd = __builtin_shufflevector(c, d, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
           __builtin_shufflevector(c, d, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  return sum_quarters(__builtin_shufflevector(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                      __builtin_shufflevector(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31));
}

// One lane sum, its additions in the order of sum4().
static inline float sum(f16 v) { return sum4(v, v, v, v)[0]; }

// The same of eight lanes: each with the one four further on, then two, then one.
static inline f4 sum4(f8 a, f8 b, f8 c, f8 d) {
  f8 ab = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
  f8 cd = __builtin_shufflevector(c, d, 0, 1, 2, 3, 8, 9, 10, 11) + __builtin_shufflevector(c, d, 4, 5, 6, 7, 12, 13, 14, 15);
  f8 two = __builtin_shufflevector(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) + __builtin_shufflevector(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
  f8 one = __builtin_shufflevector(two, two, 0, 2, 0, 2, 4, 6, 4, 6) + __builtin_shufflevector(two, two, 1, 3, 1, 3, 5, 7, 5, 7);
  return __builtin_shufflevector(one, one, 0, 4, 1, 5);
}

static inline float sum(f8 v) { return sum4(v, v, v, v)[0]; }

static inline float largest(f16 v) {
  f16 m = v;
  f16 far = __builtin_shufflevector(m, m, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  m = far > m ? far : m;
  far = __builtin_shufflevector(m, m, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  m = far > m ? far : m;
  float top = m[0];
  for (int i = 1; i < 4; i++) top = m[i] > top ? m[i] : top;
  return top;
}

// exp to about 1 ulp: 2^n times a polynomial on [-ln2/2, ln2/2]; arguments below -87 give 2^-126 or so, never a denormal.
static inline f16 exp16(f16 x) {
  x = x < -87.0f ? splat(-87.0f) : x;
  x = x > 88.0f ? splat(88.0f) : x;
  const f16 shift = splat(12582912.0f);
  f16 n = (x * 1.44269504088896341f + shift) - shift;
  f16 r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  f16 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  i16 exponent = (__builtin_convertvector(n, i16) + 127) << 23;
  return p * (f16)exponent;
}

// tanh to a few ulp: an odd polynomial near zero, where the quotient would lose digits.
static inline f16 tanh16(f16 x) {
  f16 square = x * x;
  f16 near = x * (square * (square * (square * -0.053968254f + 0.13333334f) - 0.33333334f) + 1.0f);
  f16 far = 1.0f - 2.0f / (exp16(x * 2.0f) + 1.0f);
  return square < 0.04f ? near : far;
}

// Lowest index of the largest value; -1 if any value is NaN, or the largest is infinite.
static inline int64_t first_largest(const float* values, int64_t count) {
  f16 tops = splat(-INFINITY);
  i16 nan = {};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    f16 v = load(values + i);
    nan |= (v != v);
    tops = v > tops ? v : tops;
  }
  float top = largest(tops);
  bool bad = false;
  for (int lane = 0; lane < 16; lane++) bad |= nan[lane] != 0;
  for (; i < count; i++) {
    bad |= values[i] != values[i];
    top = values[i] > top ? values[i] : top;
  }
  if (bad || top - top != 0.0f) return -1;
  for (i = 0; i < count; i++)
    if (values[i] == top) return i;
  return -1;
}
