// The three parts of attention for one query over contiguous slots: scores, softmax, mixture of values.
// Every sum runs over the slots in an order that depends on their number alone: not on the pass, nor on how the slots are cut
// into pieces.
#pragma once
#include "model.h"
#include "products.h"

namespace {

// What a later tile needs, fetched while this one is worked on: `pace` bytes for each slot, none if 0.
struct Ahead {
  const char* from;
  int64_t pace;
  // The part that belongs to slots t..t+3.
  void fetch(int64_t t) const {
    for (int64_t byte = t * pace; byte < (t + 4) * pace; byte += 64) __builtin_prefetch(from + byte, 0, 2);
  }
};

// scores[t] = scale * query . key t. Chunks: head_dim in chunks of P::lanes, or 0 for a head_dim without an own kernel. Key:
// the element that keys are stored as, or float once they are widened.
template <typename P, typename Key, int Chunks>
void score(const typename P::input* query, const Key* key, int64_t size, int64_t number, float scale, float* scores,
           const Ahead& ahead) {
  typename P::chunk held[Chunks ? Chunks : 1];
#pragma GCC unroll 8
  for (int c = 0; c < Chunks; c++) held[c] = P::fetch(query + c * P::lanes);
  auto dot = [&](const Key* k) {
    typename P::sums total = {};
    if constexpr (Chunks > 0) {
#pragma GCC unroll 8
      for (int c = 0; c < Chunks; c++) total = P::accumulate(total, P::fetch(k + c * P::lanes), held[c]);
    } else {
      int64_t i = 0;
      for (; i + P::lanes <= size; i += P::lanes) total = P::accumulate(total, P::fetch(k + i), P::fetch(query + i));
      if (i < size) total = P::accumulate(total, P::fetch_part(k + i, size - i), P::fetch_part(query + i, size - i));
    }
    return total;
  };
  int64_t t = 0;
  for (; t + 4 <= number; t += 4, key += 4 * size) {
    ahead.fetch(t);
    f4 four = sum4(dot(key), dot(key + size), dot(key + 2 * size), dot(key + 3 * size)) * scale;
    memcpy(scores + t, &four, sizeof four);
  }
  for (; t < number; t++, key += size) scores[t] = sum(dot(key)) * scale;
}

template <typename P, typename Key>
void score_slots(const typename P::input* query, const Key* keys, int64_t size, int64_t number, float scale, float* scores,
                 const Ahead& ahead) {
  switch (size % P::lanes ? 0 : size / P::lanes) {
    case 1: return score<P, Key, 1>(query, keys, size, number, scale, scores, ahead);
    case 2: return score<P, Key, 2>(query, keys, size, number, scale, scores, ahead);
    case 4: return score<P, Key, 4>(query, keys, size, number, scale, scores, ahead);
    case 8: return score<P, Key, 8>(query, keys, size, number, scale, scores, ahead);
    default: return score<P, Key, 0>(query, keys, size, number, scale, scores, ahead);
  }
}

// scores -> exp(scores - max) in place, zeros up to a multiple of 16; returns 1 / their sum.
inline float soften(float* scores, int64_t count) {
  f16 tops = splat(scores[0]);
  int64_t t = 0;
  for (; t + 16 <= count; t += 16) tops = load(scores + t) > tops ? load(scores + t) : tops;
  float top = largest(tops);
  for (; t < count; t++) top = scores[t] > top ? scores[t] : top;
  f16 total = {};
  for (t = 0; t + 16 <= count; t += 16) {
    f16 p = exp16(load(scores + t) - top);
    store(scores + t, p);
    total += p;
  }
  if (t < count) {
    f16 p = exp16(load_part(scores + t, count - t) - top);
    store(scores + t, load_part((const float*)&p, count - t));
    total += load(scores + t);
  }
  return 1.0f / sum(total);
}

// scores -> cap * tanh(scores / cap) in place.
inline void soft_cap(float* scores, int64_t count, float cap) {
  int64_t t = 0;
  for (; t + 16 <= count; t += 16) store(scores + t, tanh16(load(scores + t) / cap) * cap);
  if (t < count) store_part(scores + t, tanh16(load_part(scores + t, count - t) / cap) * cap, count - t);
}

// Floats of one chain of a mixture: head_dim in whole vectors.
inline int64_t chain_size(int64_t size) { return (size + 15) / 16 * 16; }

#if defined(TELLTALE_AVX2)

constexpr int64_t mixed_together = 64;  // slots whose values the nearest cache holds

// chains[i % 4] += weights[i] * value i, for the `number` slots from the query's slot `index` on: four interleaved chains, one at a
// time, for there are registers for one. Chunks: head_dim / 16, or 0 for any other.
template <typename Value, int Chunks>
void mix(const Value* values, int64_t size, int64_t index, int64_t number, const float* weights, float* chains,
         const Ahead& ahead) {
  constexpr int wide = Chunks == 0 ? 1 : Chunks <= 4 ? 2 * Chunks : 8;
  const int64_t stride = chain_size(size);
  for (int64_t start = 0; start < number; start += mixed_together) {
    const int64_t stop = std::min(number, start + mixed_together);
    for (int64_t t = start; t < stop; t += 4) ahead.fetch(t);
    for (int j = 0; j < 4; j++) {
      const int64_t own = start + (j + 4 - (index + start) % 4) % 4;
      for (int64_t i = 0; i < size; i += Chunks == 0 ? 16 : 8 * wide) {
        float* chain = chains + j * stride + i;
        if constexpr (Chunks == 0) {
          const int64_t lanes = std::min<int64_t>(16, size - i);
          f16 sums = load(chain);
          for (int64_t t = own; t < stop; t += 4) sums += load_part(values + t * size + i, lanes) * weights[t];
          store(chain, sums);
        } else {
          f8 sums[wide];
#pragma GCC unroll 8
          for (int c = 0; c < wide; c++) sums[c] = load8(chain + 8 * c);
          for (int64_t t = own; t < stop; t += 4) {
            const f8 weight = f8{} + weights[t];
#pragma GCC unroll 8
            for (int c = 0; c < wide; c++) sums[c] = multiply_add(sums[c], load8(values + t * size + i + 8 * c), weight);
          }
#pragma GCC unroll 8
          for (int c = 0; c < wide; c++) store8(chain + 8 * c, sums[c]);
        }
      }
    }
  }
}

#else

// chains[i % 4] += weights[i] * value i, for the `number` slots from the query's slot `index` on: four interleaved chains.
// Chunks: head_dim / 16, or 0 for any other.
template <typename Value, int Chunks>
void mix(const Value* values, int64_t size, int64_t index, int64_t number, const float* weights, float* chains,
         const Ahead& ahead) {
  constexpr int wide = Chunks == 0 ? 1 : Chunks <= 4 ? Chunks : 4;
  const int64_t stride = chain_size(size);
  for (int64_t i = 0; i < size; i += 16 * wide) {
    const int64_t lanes = std::min<int64_t>(16, size - i);
    const Value* value = values + i;
    auto fetch = [&](const Value* p) { return Chunks > 0 || lanes == 16 ? load(p) : load_part(p, lanes); };
    f16 sums[4][wide];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++)
#pragma GCC unroll 4
      for (int c = 0; c < wide; c++) sums[j][c] = load(chains + j * stride + i + 16 * c);
    // A slot that is not one of a whole group of four: its chain is known only at run time, the other three add zero.
    auto alone = [&](int64_t t) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        const float own = (index + t) % 4 == j ? weights[t] : 0.0f;
#pragma GCC unroll 4
        for (int c = 0; c < wide; c++) sums[j][c] += fetch(value + t * size + 16 * c) * own;
      }
    };
    int64_t t = 0;
    for (; t < number && (index + t) % 4; t++) alone(t);
    for (; t + 4 <= number; t += 4) {
      if (i == 0) ahead.fetch(t);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++)
#pragma GCC unroll 4
        for (int c = 0; c < wide; c++) sums[j][c] += fetch(value + (t + j) * size + 16 * c) * weights[t + j];
    }
    for (; t < number; t++) alone(t);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++)
#pragma GCC unroll 4
      for (int c = 0; c < wide; c++) store(chains + j * stride + i + 16 * c, sums[j][c]);
  }
}

#endif

template <typename Value>
void mix_slots(const Value* values, int64_t size, int64_t index, int64_t number, const float* weights, float* chains,
         const Ahead& ahead) {
  switch (size % 16 ? 0 : size / 16) {
    case 1: return mix<Value, 1>(values, size, index, number, weights, chains, ahead);
    case 2: return mix<Value, 2>(values, size, index, number, weights, chains, ahead);
    case 4:
    case 8:
    case 16: return mix<Value, 4>(values, size, index, number, weights, chains, ahead);
    default: return mix<Value, 0>(values, size, index, number, weights, chains, ahead);
  }
}

// mixed = norm * the four chains.
template <typename P>
void finish(const float* chains, int64_t size, float norm, typename P::input* mixed) {
  const int64_t stride = chain_size(size);
  for (int64_t i = 0; i < size; i += 16) {
    auto chain = [&](int j) { return load(chains + j * stride + i); };
    const f16 result = P::rounded(((chain(0) + chain(1)) + (chain(2) + chain(3))) * norm);
    if (i + 16 <= size) store(mixed + i, result);
    else store_part(mixed + i, result, size - i);
  }
}

}  // namespace
