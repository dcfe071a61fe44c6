// Attention of one query head of one token over the cache: scores, softmax, mixture of values.
// Every sum runs over the slots in an order that depends on their number alone: not on the pass, nor on how many of them
// stand in the shared prefix of a fork.
#pragma once
#include "model.h"
#include "products.h"

namespace {

// Keys or values of one kv head: positions below prefix_length in the shared prefix of a fork, the others in the row's own.
template <typename E>
struct Slots {
  const E *prefix, *own;
  int64_t prefix_length;
};

template <typename E>
Slots<E> slots(const Model& model, const CacheView& cache, void** own, void** prefix, int64_t layer, int64_t batch, int64_t head) {
  const int64_t length = cache.shared(batch), origin = length ? cache.prefix_rows[batch] : 0;
  return {length ? (const E*)prefix[layer] + (origin * model.kv_heads + head) * cache.prefix_capacity * model.head_dim : nullptr,
          (const E*)own[layer] + (cache.own(batch) * model.kv_heads + head) * cache.capacity * model.head_dim, length};
}

// Call body(address of the first slot, index of it, number of slots) for each contiguous piece of positions first..last.
template <typename E, typename Body>
inline void each_piece(const Slots<E>& slots, int64_t size, int64_t first, int64_t last, const Body& body) {
  const int64_t cut = slots.prefix_length;
  if (first < cut) body(slots.prefix + first * size, (int64_t)0, std::min(cut, last + 1) - first);
  const int64_t start = std::max(first, cut);
  if (start <= last) body(slots.own + (start - cut) * size, start - first, last + 1 - start);
}

// scores[t] = scale * query . key t. Chunks: head_dim in chunks of P::lanes, or 0 for a head_dim without an own kernel.
template <typename P, int Chunks>
void score(const typename P::element* query, const typename P::element* key, int64_t size, int64_t number, float scale,
           float* scores) {
  typedef typename P::element E;
  typename P::chunk held[Chunks ? Chunks : 1];
#pragma GCC unroll 8
  for (int c = 0; c < Chunks; c++) held[c] = P::fetch(query + c * P::lanes);
  auto dot = [&](const E* k) {
    f16 total = {};
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
    f4 four = sum4(dot(key), dot(key + size), dot(key + 2 * size), dot(key + 3 * size)) * scale;
    memcpy(scores + t, &four, sizeof four);
  }
  for (; t < number; t++, key += size) scores[t] = sum(dot(key)) * scale;
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

// mixed = norm * sum_t weights[t] value t. Four interleaved chains over t. Chunks: head_dim / 16, or 0 for any other.
template <typename P, int Chunks>
void mix(const Slots<typename P::element>& values, int64_t size, int64_t first, int64_t last, const float* weights, float norm,
         typename P::element* mixed) {
  typedef typename P::element E;
  constexpr int wide = Chunks == 0 ? 1 : Chunks <= 4 ? Chunks : 4;
  for (int64_t i = 0; i < size; i += 16 * wide) {
    const int64_t lanes = std::min<int64_t>(16, size - i);
    f16 sums[4][wide];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++)
#pragma GCC unroll 4
      for (int c = 0; c < wide; c++) sums[j][c] = f16{};
    each_piece(values, size, first, last, [&](const E* value, int64_t index, int64_t number) {
      value += i;
      const float* weight = weights + index;
      auto fetch = [&](const E* p) { return Chunks > 0 || lanes == 16 ? load(p) : load_part(p, lanes); };
      // A slot that is not one of a whole group of four: its chain is known only at run time, the other three add zero.
      auto alone = [&](int64_t t) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
          const float own = (index + t) % 4 == j ? weight[t] : 0.0f;
#pragma GCC unroll 4
          for (int c = 0; c < wide; c++) sums[j][c] += fetch(value + t * size + 16 * c) * own;
        }
      };
      int64_t t = 0;
      for (; t < number && (index + t) % 4; t++) alone(t);
      for (; t + 4 <= number; t += 4) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
#pragma GCC unroll 4
          for (int c = 0; c < wide; c++) sums[j][c] += fetch(value + (t + j) * size + 16 * c) * weight[t + j];
      }
      for (; t < number; t++) alone(t);
    });
#pragma GCC unroll 4
    for (int c = 0; c < wide; c++) {
      f16 result = ((sums[0][c] + sums[1][c]) + (sums[2][c] + sums[3][c])) * norm;
      if (Chunks > 0 || lanes == 16) store(mixed + i + 16 * c, result);
      else store_part(mixed + i, result, lanes);
    }
  }
}

// Attention of one query head over positions first..last, into `mixed` (head_dim). With `block`, the weights of positions
// since..last go there.
template <typename P>
void attend(const Model& model, const typename P::element* query, const Slots<typename P::element>& keys,
            const Slots<typename P::element>& values, int64_t first, int64_t last, typename P::element* mixed, float* block,
            int64_t since) {
  typedef typename P::element E;
  const int64_t size = model.head_dim, count = last - first + 1;
  score_scratch.start((count + 16) * sizeof(float), 1);
  float* scores = score_scratch.take<float>(count + 16);
  each_piece(keys, size, first, last, [&](const E* key, int64_t index, int64_t number) {
    const float scale = model.attention_scale;
    float* out = scores + index;
    const int64_t chunks = size % P::lanes ? 0 : size / P::lanes;
    switch (chunks) {
      case 1: return score<P, 1>(query, key, size, number, scale, out);
      case 2: return score<P, 2>(query, key, size, number, scale, out);
      case 4: return score<P, 4>(query, key, size, number, scale, out);
      case 8: return score<P, 8>(query, key, size, number, scale, out);
      default: return score<P, 0>(query, key, size, number, scale, out);
    }
  });
  const float norm = soften(scores, count);
  if (block)
    for (int64_t t = std::max(first, since); t <= last; t++) block[t - since] = scores[t - first] * norm;
  switch (size % 16 ? 0 : size / 16) {
    case 1: return mix<P, 1>(values, size, first, last, scores, norm, mixed);
    case 2: return mix<P, 2>(values, size, first, last, scores, norm, mixed);
    case 4:
    case 8:
    case 16: return mix<P, 4>(values, size, first, last, scores, norm, mixed);
    default: return mix<P, 0>(values, size, first, last, scores, norm, mixed);
  }
}

}  // namespace
