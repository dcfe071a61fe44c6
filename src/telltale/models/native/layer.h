// One Llama-like layer for all rows of a pass. Values are rounded to the model's dtype where its Hugging Face modules
// round them; between those places they are float32.
#pragma once
#include <cmath>
#include "attention.h"
#include "model.h"
#include "products.h"

namespace {

// RMSNorm of one row: x / rms(x), rounded, times the weight, rounded (Llama); Gemma multiplies by 1 + weight first.
template <typename P, typename Out>
void rms_norm(const Model& model, const float* x, const void* weights, int64_t size, Out* y) {
  const auto* weight = (const typename P::element*)weights;
  f16 squares = {};
  int64_t i = 0;
  for (; i + 16 <= size; i += 16) squares += load(x + i) * load(x + i);
  if (i < size) squares += load_part(x + i, size - i) * load_part(x + i, size - i);
  float scale = 1.0f / sqrtf(sum(squares) / (float)size + model.norm_epsilon);
  auto one = [&](f16 value, f16 w) {
    return model.norm_adds_one ? P::rounded(value * scale * (w + 1.0f)) : P::rounded(P::rounded(value * scale) * w);
  };
  for (i = 0; i + 16 <= size; i += 16) store(y + i, one(load(x + i), load(weight + i)));
  if (i < size) store_part(y + i, one(load_part(x + i, size - i), load_part(weight + i, size - i)), size - i);
}

// Rotary embedding of one head in place: halves of the first rotary_dim turned by the position's angles.
template <typename P>
void rotate(const Model& model, float* head, int64_t position) {
  const int64_t half = model.rotary_dim / 2;
  const float* cosines = model.cosines + position * model.rotary_dim;
  const float* sines = model.sines + position * model.rotary_dim;
  for (int64_t i = 0; i < half; i += 16) {
    const int64_t lanes = std::min<int64_t>(16, half - i);
    auto part = [&](const float* p) { return lanes == 16 ? load(p + i) : load_part(p + i, lanes); };
    f16 a = part(head), b = part(head + half);
    f16 turned_a = P::rounded(P::rounded(a * part(cosines)) + P::rounded(-b * part(sines)));
    f16 turned_b = P::rounded(P::rounded(b * part(cosines + half)) + P::rounded(a * part(sines + half)));
    if (lanes == 16) {
      store(head + i, turned_a);
      store(head + half + i, turned_b);
    } else {
      store_part(head + i, turned_a, lanes);
      store_part(head + half + i, turned_b, lanes);
    }
  }
}

// x += y, rounded.
template <typename P>
void add_rounded(float* x, const float* y, int64_t count) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) store(x + i, P::rounded(load(x + i) + load(y + i)));
  for (; i < count; i++) x[i] = P::rounded(x[i] + y[i]);
}

// SiLU (0) or the tanh form of GELU (1).
inline f16 activate(int64_t kind, f16 x) {
  if (kind == 0) return x / (exp16(-x) + 1.0f);
  f16 z = (x + x * x * x * 0.044715f) * 0.7978845608028654f;
  f16 tanh = 1.0f - 2.0f / (exp16(z * 2.0f) + 1.0f);
  return x * 0.5f * (tanh + 1.0f);
}

// inner = activation(gate) * up for outputs first..last-1 of one row.
template <typename P>
void gated(int64_t kind, const float* gate, const float* up, int64_t first, int64_t last, typename P::element* inner) {
  int64_t i = first;
  for (; i + 16 <= last; i += 16) store(inner + i, P::rounded(activate(kind, load(gate + i))) * load(up + i));
  if (i < last)
    store_part(inner + i, P::rounded(activate(kind, load_part(gate + i, last - i))) * load_part(up + i, last - i), last - i);
}

// Working memory of a layer, one row of each per token. E-typed buffers are what a product or the attention reads.
template <typename E>
struct Buffers {
  float *queries, *keys, *values, *projected, *gate, *up;
  E *normed, *turned, *mixed, *inner;

  Buffers(const Model& model, int64_t rows, Scratch& scratch) {
    const int64_t query_size = model.heads * model.head_dim, kv_size = model.kv_heads * model.head_dim;
    const int64_t floats = query_size + 2 * kv_size + model.hidden + 2 * model.feed_forward;
    const int64_t elements = model.hidden + 2 * query_size + model.feed_forward;
    scratch.start(rows * (floats * sizeof(float) + elements * sizeof(E)), 10);
    queries = scratch.take<float>(rows * query_size);
    keys = scratch.take<float>(rows * kv_size);
    values = scratch.take<float>(rows * kv_size);
    projected = scratch.take<float>(rows * model.hidden);
    gate = scratch.take<float>(rows * model.feed_forward);
    up = scratch.take<float>(rows * model.feed_forward);
    normed = scratch.take<E>(rows * model.hidden);
    turned = scratch.take<E>(rows * query_size);
    mixed = scratch.take<E>(rows * query_size);
    inner = scratch.take<E>(rows * model.feed_forward);
  }
};

// Keys and values of the pass into the cache, then the attention of each (token, query head) into buffer.mixed.
template <typename P>
void attention_step(const Model& model, const CacheView& cache, const Pass& pass, int64_t index,
                    const Buffers<typename P::element>& buffer, const Team& team) {
  typedef typename P::element E;
  const Layer& layer = model.layer[index];
  const int64_t size = model.head_dim;
  int64_t first, last;
  team.share(pass.rows * model.kv_heads, 1, first, last);
  for (int64_t item = first; item < last; item++) {
    const int64_t r = item / model.kv_heads, head = item % model.kv_heads, position = pass.position(r);
    float *key = buffer.keys + item * size, *value = buffer.values + item * size;
    if (layer.key_norm) rms_norm<P>(model, key, layer.key_norm, size, key);
    rotate<P>(model, key, position);
    const int64_t batch = pass.batch(r);
    const int64_t slot = ((cache.own(batch) * model.kv_heads + head) * cache.capacity + position - cache.shared(batch)) * size;
    convert(key, (E*)cache.keys[index] + slot, size);
    convert(value, (E*)cache.values[index] + slot, size);
  }
  team.wait();
  const Blocks* blocks = pass.blocks && index >= pass.blocks->first_layer ? pass.blocks : nullptr;
  team.share(pass.rows * model.heads, 1, first, last);
  for (int64_t item = first; item < last; item++) {
    const int64_t r = item / model.heads, head = item % model.heads, position = pass.position(r);
    const int64_t kv_head = head / (model.heads / model.kv_heads);
    float* query = buffer.queries + item * size;
    if (layer.query_norm) rms_norm<P>(model, query, layer.query_norm, size, query);
    rotate<P>(model, query, position);
    convert(query, buffer.turned + item * size, size);
    const int64_t oldest = layer.window > 0 ? std::max<int64_t>(0, position - layer.window + 1) : 0;
    attend<P>(model, buffer.turned + item * size,
              slots<E>(model, cache, cache.keys, cache.prefix_keys, index, pass.batch(r), kv_head),
              slots<E>(model, cache, cache.values, cache.prefix_values, index, pass.batch(r), kv_head), oldest, position,
              buffer.mixed + item * size,
              blocks ? blocks->out + ((index - blocks->first_layer) * pass.rows * model.heads + item) * blocks->span : nullptr,
              blocks ? blocks->since[pass.batch(r)] : 0);
  }
}

// Layer `index` on x (rows, hidden) in place.
template <typename P>
void layer_step(const Model& model, const CacheView& cache, const Pass& pass, int64_t index, float* x,
                const Buffers<typename P::element>& buffer, const Team& team) {
  const Layer& layer = model.layer[index];
  const int64_t hidden = model.hidden, rows = pass.rows, wide = model.feed_forward;
  const int64_t query_size = model.heads * model.head_dim, kv_size = model.kv_heads * model.head_dim;
  int64_t first, last;

  team.share(rows, 1, first, last);
  for (int64_t r = first; r < last; r++)
    rms_norm<P>(model, x + r * hidden, layer.attention_norm, hidden, buffer.normed + r * hidden);
  team.wait();
  team.share(query_size, 8, first, last);
  product<P>(layer.query, layer.query_bias, buffer.normed, rows, hidden, first, last, buffer.queries, query_size);
  team.share(kv_size, 8, first, last);
  product<P>(layer.key, layer.key_bias, buffer.normed, rows, hidden, first, last, buffer.keys, kv_size);
  product<P>(layer.value, layer.value_bias, buffer.normed, rows, hidden, first, last, buffer.values, kv_size);
  team.wait();
  attention_step<P>(model, cache, pass, index, buffer, team);
  team.wait();
  team.share(hidden, 8, first, last);
  product<P>(layer.output, layer.output_bias, buffer.mixed, rows, query_size, first, last, buffer.projected, hidden);
  team.wait();
  team.share(rows, 1, first, last);
  for (int64_t r = first; r < last; r++) {
    add_rounded<P>(x + r * hidden, buffer.projected + r * hidden, hidden);
    rms_norm<P>(model, x + r * hidden, layer.mlp_norm, hidden, buffer.normed + r * hidden);
  }
  team.wait();
  team.share(wide, 16, first, last);
  product<P>(layer.gate, layer.gate_bias, buffer.normed, rows, hidden, first, last, buffer.gate, wide);
  product<P>(layer.up, layer.up_bias, buffer.normed, rows, hidden, first, last, buffer.up, wide);
  for (int64_t r = 0; r < rows; r++)
    gated<P>(model.activation, buffer.gate + r * wide, buffer.up + r * wide, first, last, buffer.inner + r * wide);
  team.wait();
  team.share(hidden, 8, first, last);
  product<P>(layer.down, layer.down_bias, buffer.inner, rows, wide, first, last, buffer.projected, hidden);
  for (int64_t r = 0; r < rows; r++) add_rounded<P>(x + r * hidden + first, buffer.projected + r * hidden + first, last - first);
  team.wait();
}

}  // namespace
