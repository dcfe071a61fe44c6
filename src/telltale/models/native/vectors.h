// Sixteen-lane vectors in GCC/Clang vector extensions: the same source serves AVX-512, AVX2 and NEON.
// Every reduction has one fixed order, so a result never depends on what else is computed beside it.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX512BF16__)
#include <immintrin.h>
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

static inline f16 load(const float* p) {
  f16 v;
  memcpy(&v, p, sizeof v);
  return v;
}

static inline void store(float* p, f16 v) { memcpy(p, &v, sizeof v); }

static inline float to_float(bf16 x) {
  uint32_t bits = (uint32_t)x << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}

// Round to nearest even, as PyTorch does; NaN stays NaN.
static inline bf16 to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return 0x7fc0;
  return (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline float round_bf16(float x) { return to_float(to_bf16(x)); }

static inline f16 load(const bf16* p) {
  h16 h;
  memcpy(&h, p, sizeof h);
  return (f16)(__builtin_convertvector(h, u16) << 16);
}

template <typename Float, typename Bits>
static inline Float round_vector(Float x) {
  Bits bits = (Bits)x;
  Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
  Bits number = (Bits)(x == x);
  return (Float)((rounded & number) | (bits & ~number));
}

static inline f16 round_bf16(f16 x) { return round_vector<f16, u16>(x); }
static inline f4 round_bf16(f4 x) { return round_vector<f4, u4>(x); }

static inline void store(bf16* p, f16 v) {
  h16 h = __builtin_convertvector((u16)round_bf16(v) >> 16, h16);
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

static inline f4 fold4(f16 v) {
  f8 halves = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  return __builtin_shufflevector(halves, halves, 0, 1, 2, 3) + __builtin_shufflevector(halves, halves, 4, 5, 6, 7);
}

static inline float sum(f16 v) {
  f4 q = fold4(v);
  return (q[0] + q[2]) + (q[1] + q[3]);
}

// Four sums at once, each in the order of sum().
static inline f4 sum4(f16 a, f16 b, f16 c, f16 d) {
  f4 p = fold4(a), q = fold4(b), r = fold4(c), s = fold4(d);
  f4 pq_low = __builtin_shufflevector(p, q, 0, 4, 1, 5), pq_high = __builtin_shufflevector(p, q, 2, 6, 3, 7);
  f4 rs_low = __builtin_shufflevector(r, s, 0, 4, 1, 5), rs_high = __builtin_shufflevector(r, s, 2, 6, 3, 7);
  f4 pq = pq_low + pq_high, rs = rs_low + rs_high;
  return __builtin_shufflevector(pq, rs, 0, 1, 4, 5) + __builtin_shufflevector(pq, rs, 2, 3, 6, 7);
}

static inline float largest(f16 v) {
  float m = v[0];
  for (int i = 1; i < 16; i++) m = v[i] > m ? v[i] : m;
  return m;
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
