// One layer of an attention and an MLP for all rows of a pass. Values are rounded to the model's dtype where its Hugging Face modules
// round them; between those places they are float32.
#pragma once
#include <cmath>
#include "attention.h"
#include "model.h"
#include "packed.h"
#include "sharing.h"

namespace {

// The model's norm of one row: x / rms(x), of x less its mean where the norm centres, times the weight, plus the bias.
// Llama rounds before the weight as well; Gemma multiplies by 1 + weight.
template <typename P, typename Out>
void norm(const Model& model, const float* x, const void* weights, const void* biases, int64_t size, Out* y) {
  const auto *weight = (const typename P::element*)weights, *bias = (const typename P::element*)biases;
  float mean = 0.0f;
  int64_t i = 0;
  if (model.norm_centres) {
    f16 total = {};
    for (; i + 16 <= size; i += 16) total += load(x + i);
    if (i < size) total += load_part(x + i, size - i);
    mean = sum(total) / (float)size;
  }
  f16 squares = {};
  for (i = 0; i + 16 <= size; i += 16) squares += (load(x + i) - mean) * (load(x + i) - mean);
  if (i < size) {
    const f16 rest = load_part(x + i, size - i) - mean, own = load_part((const float*)&rest, size - i);
    squares += own * own;
  }
  float scale = 1.0f / sqrtf(sum(squares) / (float)size + model.norm_epsilon);
  auto one = [&](f16 value, f16 w, f16 b) {
    value = (value - mean) * scale;
    if (model.norm_adds_one) return P::rounded(value * (w + 1.0f) + b);
    return P::rounded((model.norm_rounds ? P::rounded(value) : value) * w + b);
  };
  for (i = 0; i + 16 <= size; i += 16) store(y + i, one(load(x + i), load(weight + i), bias ? load(bias + i) : f16{}));
  if (i < size) {
    const f16 b = bias ? load_part(bias + i, size - i) : f16{};
    store_part(y + i, one(load_part(x + i, size - i), load_part(weight + i, size - i), b), size - i);
  }
}

// norm() if there is a weight, else a copy.
template <typename P, typename Out>
void norm_or_copy(const Model& model, const float* x, const void* weights, const void* biases, int64_t size, Out* y) {
  if (weights) norm<P>(model, x, weights, biases, size, y);
  else convert(x, y, size);
}

// Neighbours of the first rotary_dim of one head turned by the position's angles, in place; the sines bear their signs.
template <typename P>
void rotate_pairs(const float* cosines, const float* sines, int64_t size, float* head) {
  for (int64_t i = 0; i < size; i += 16) {
    const int64_t lanes = std::min<int64_t>(16, size - i);
    auto part = [&](const float* p) { return lanes == 16 ? load(p + i) : load_part(p + i, lanes); };
    const f16 x = part(head), other = __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    const f16 turned = P::rounded(P::rounded(x * part(cosines)) + P::rounded(other * part(sines)));
    if (lanes == 16) store(head + i, turned);
    else store_part(head + i, turned, lanes);
  }
}

// Rotary embedding of one head in place: halves of the first rotary_dim turned by the position's angles.
template <typename P>
void rotate(const Model& model, const Layer& layer, float* head, int64_t position) {
  if (!layer.cosines) return;
  const int64_t half = model.rotary_dim / 2;
  const float* cosines = layer.cosines + position * model.rotary_dim;
  const float* sines = layer.sines + position * model.rotary_dim;
  if (model.interleaved) return rotate_pairs<P>(cosines, sines, model.rotary_dim, head);
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

// x *= scale, rounded.
template <typename P>
void scale_rounded(float* x, float scale, int64_t count) {
  if (scale != 1.0f)
    for (int64_t i = 0; i < count; i++) x[i] = P::rounded(x[i] * scale);
}

// x += y, rounded.
template <typename P>
void add_rounded(float* x, const float* y, int64_t count) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) store(x + i, P::rounded(load(x + i) + load(y + i)));
  for (; i < count; i++) x[i] = P::rounded(x[i] + y[i]);
}

// SiLU (0), the tanh form of GELU (1), GELU (2), ReLU (3) or its square (4).
inline f16 activate(int64_t kind, f16 x) {
  if (kind == 0) return x / (exp16(-x) + 1.0f);
  if (kind == 2) {
    f16 erf;
    for (int lane = 0; lane < 16; lane++) erf[lane] = erff(x[lane] * 0.70710678118654752f);
    return x * 0.5f * (erf + 1.0f);
  }
  if (kind >= 3) {
    const f16 above = larger(x, f16{});
    return kind == 3 ? above : above * above;
  }
  f16 z = (x + x * x * x * 0.044715f) * 0.7978845608028654f;
  f16 tanh = 1.0f - 2.0f / (exp16(z * 2.0f) + 1.0f);
  return x * 0.5f * (tanh + 1.0f);
}

// inner = activation(gate) * up for outputs first..last-1 of one row; without gates, activation(up).
template <typename P>
void gated(int64_t kind, const float* gate, const float* up, int64_t first, int64_t last, typename P::input* inner) {
  auto one = [&](f16 g, f16 u) { return P::rounded(P::rounded(activate(kind, g)) * u); };
  int64_t i = first;
  if (!gate) {
    for (; i + 16 <= last; i += 16) store(inner + i, P::rounded(activate(kind, load(up + i))));
    if (i < last) store_part(inner + i, P::rounded(activate(kind, load_part(up + i, last - i))), last - i);
    return;
  }
  for (; i + 16 <= last; i += 16) store(inner + i, one(load(gate + i), load(up + i)));
  if (i < last) store_part(inner + i, one(load_part(gate + i, last - i), load_part(up + i, last - i)), last - i);
}

// Working memory of a pass, one row of each per token. Input-typed buffers are what a product or the attention reads.
template <typename P>
struct Buffers {
  typedef typename P::input I;
  float *queries, *keys, *values, *projected, *gate, *up;
  I *normed, *turned, *mixed, *inner;
  I* packed;  // the input of a product as tiles take it
  Groups groups;

  Buffers(const Model& model, const CacheView& cache, const Pass& pass, Scratch& scratch)
      : groups(cache, pass, start(model, pass, scratch)) {
    const int64_t rows = pass.rows;
    const int64_t query_size = model.heads * model.head_dim, kv_size = model.kv_heads * model.head_dim;
    queries = scratch.take<float>(rows * query_size);
    keys = scratch.take<float>(rows * kv_size);
    values = scratch.take<float>(rows * kv_size);
    projected = scratch.take<float>(rows * model.hidden);
    gate = scratch.take<float>(rows * model.feed_forward);
    up = scratch.take<float>(rows * model.feed_forward);
    normed = scratch.take<I>(rows * model.hidden);
    turned = scratch.take<I>(rows * query_size);
    mixed = scratch.take<I>(rows * query_size);
    inner = scratch.take<I>(rows * model.feed_forward);
    packed = scratch.take<I>(packed_size(model, pass));
  }

  static int64_t packed_size(const Model& model, const Pass& pass) {
    const int64_t deepest = std::max({model.hidden, model.heads * model.head_dim, model.feed_forward});
    return model.tiles ? packed_input_size(pass.rows, deepest) : 0;
  }

  static Scratch& start(const Model& model, const Pass& pass, Scratch& scratch) {
    const int64_t rows = pass.rows, query_size = model.heads * model.head_dim, kv_size = model.kv_heads * model.head_dim;
    const int64_t floats = query_size + 2 * kv_size + model.hidden + 2 * model.feed_forward;
    const int64_t inputs = model.hidden + 2 * query_size + model.feed_forward;
    const int64_t bytes = rows * (floats * sizeof(float) + inputs * sizeof(I)) + packed_size(model, pass) * sizeof(I);
    scratch.start(bytes + Groups::bytes(rows), 13);
    return scratch;
  }
};

// A head's weights in a norm of queries or keys, null if there are none.
template <typename P>
const void* own_weights(const Model& model, const void* weights, int64_t head) {
  return weights ? (const typename P::element*)weights + head * model.norm_stride : nullptr;
}

// Keys and values of the pass into the cache.
template <typename P>
void remember(const Model& model, const CacheView& cache, const Pass& pass, int64_t index, const Buffers<P>& buffer,
              const Team& team) {
  typedef typename P::element E;
  const Layer& layer = model.layer[index];
  const int64_t size = model.head_dim;
  int64_t first, last;
  team.share(pass.rows * model.kv_heads, 1, first, last);
  for (int64_t item = first; item < last; item++) {
    const int64_t r = item / model.kv_heads, head = item % model.kv_heads, position = pass.position(r);
    float *key = buffer.keys + item * size, *value = buffer.values + item * size;
    if (layer.key_norm && !model.norms_whole)
      norm<P>(model, key, own_weights<P>(model, layer.key_norm, head), own_weights<P>(model, layer.key_norm_bias, head), size, key);
    rotate<P>(model, layer, key, position);
    const int64_t batch = pass.batch(r);
    const int64_t slot = (cache.own_slots(model, batch, head) + position - cache.shared(batch)) * size;
    convert(key, (E*)cache.keys[index] + slot, size);
    convert(value, (E*)cache.values[index] + slot, size);
  }
}

// The attention of each (token, query head) into buffer.mixed. A thread's unit of work is some readers of one kv head.
template <typename P>
void look(const Model& model, const CacheView& cache, const Pass& pass, int64_t index, const Buffers<P>& buffer,
          const Team& team) {
  typedef typename P::element E;
  const Layer& layer = model.layer[index];
  const int64_t size = model.head_dim, heads = model.heads, per_kv_head = heads / model.kv_heads;
  const int64_t most = std::max<int64_t>(1, std::min(most_readers, pass.rows * heads / team.size));
  const Groups& groups = buffer.groups;
  const Blocks* blocks = pass.blocks && index >= pass.blocks->first_layer ? pass.blocks : nullptr;
  auto units_of = [&](int64_t group) {
    return ((groups.starts[group + 1] - groups.starts[group]) * per_kv_head + most - 1) / most;
  };
  int64_t unit = 0;  // dealt out in turn: later tokens see more
  auto serve = [&](int64_t group, int64_t kv_head, int64_t start) {
    const int64_t end = (groups.starts[group + 1] - groups.starts[group]) * per_kv_head;
    const int64_t count = std::min(most, end - start);
    Reader<P> readers[most_readers];
    const int64_t batch = pass.batch(groups.tokens[groups.starts[group]]);
    const int64_t shared = cache.shared(batch) ? cache.shared_slots(model, batch, kv_head) * size : -1;
    for (int64_t i = 0; i < count; i++) {
      const int64_t r = groups.tokens[groups.starts[group] + (start + i) / per_kv_head];
      const int64_t item = r * heads + kv_head * per_kv_head + (start + i) % per_kv_head;
      const int64_t position = pass.position(r), batch = pass.batch(r);
      float* query = buffer.queries + item * size;
      const int64_t head = item % heads;
      if (layer.query_norm && !model.norms_whole)
        norm<P>(model, query, own_weights<P>(model, layer.query_norm, head), own_weights<P>(model, layer.query_norm_bias, head),
                size, query);
      rotate<P>(model, layer, query, position);
      arrange<P>(query, size, buffer.turned + item * size);
      Reader<P>& reader = readers[i];
      reader.query = buffer.turned + item * size, reader.mixed = buffer.mixed + item * size;
      reader.own_keys = (const E*)cache.keys[index] + cache.own_slots(model, batch, kv_head) * size;
      reader.own_values = (const E*)cache.values[index] + cache.own_slots(model, batch, kv_head) * size;
      reader.first = layer.window > 0 ? std::max<int64_t>(0, position - layer.window + 1) : 0;
      reader.last = position, reader.cut = cache.shared(batch);
      reader.block = blocks ? blocks->of(index, pass.rows * heads, item) : nullptr;
      reader.since = blocks ? blocks->since[batch] : 0;
    }
    attend<P>(model, shared < 0 ? nullptr : (const E*)cache.prefix_keys[index] + shared,
              shared < 0 ? nullptr : (const E*)cache.prefix_values[index] + shared, readers, count);
  };
  for (int64_t group = 0; group < groups.count; group++)
    for (int64_t kv_head = 0; kv_head < model.kv_heads; kv_head++)
      for (int64_t part = 0; part < units_of(group); part++, unit++)
        if (unit % team.size == team.index) serve(group, kv_head, part * most);
}

// The products of one pass that read the same input, until this thread makes the next ones. `grain`: outputs that one member of the
// team has at least.
template <typename P>
struct Products {
  const typename P::input* input;
  int64_t rows, depth;
  const typename P::input* packed;  // the input as tiles take it; null: without them
  int64_t grain;

  // `packed`: room for packed_input_size() elements.
  Products(bool tiles, const typename P::input* input, int64_t rows, int64_t depth, typename P::input* packed, const Team& team)
      : input(input), rows(rows), depth(depth), packed(nullptr), grain(8) {
#if defined(TELLTALE_AVX2)
    if constexpr (!P::natural) {
      arranged_scratch.start(rows * depth * sizeof(float), 1);
      float* own = arranged_scratch.take<float>(rows * depth);
      for (int64_t r = 0; r < rows; r++) arrange<P>(input + r * depth, depth, own + r * depth);
      this->input = own;
    }
#endif
#if defined(TELLTALE_TILES)
    if constexpr (std::is_same<P, BFloat16>::value)
      if (tiles && fits_tiles(depth)) {
        if (rows > 1) {
          pack_input(input, rows, depth, packed, team);
          team.wait();
        }
        this->packed = packed, grain = tile_side;
      }
#endif
  }

  // Outputs first..last-1 of all rows.
  void run(const Matrix& matrix, int64_t first, int64_t last, float* y, int64_t y_stride) const {
#if defined(TELLTALE_TILES)
    if constexpr (std::is_same<P, BFloat16>::value)
      if (packed) return matrix_product_by_tiles(matrix, input, packed, rows, depth, first, last, y, y_stride);
#endif
    matrix_product<P>(matrix, input, rows, depth, first, last, y, y_stride);
  }
};

// Layer `index` on x (rows, hidden) in place.
template <typename P>
void layer_step(const Model& model, const CacheView& cache, const Pass& pass, int64_t index, float* x,
                const Buffers<P>& buffer, const Team& team) {
  const Layer& layer = model.layer[index];
  const int64_t hidden = model.hidden, rows = pass.rows, wide = model.feed_forward;
  const int64_t query_size = model.heads * model.head_dim, kv_size = model.kv_heads * model.head_dim;
  int64_t first, last;

  team.share(rows, 1, first, last);
  for (int64_t r = first; r < last; r++)
    norm_or_copy<P>(model, x + r * hidden, layer.attention_norm, layer.attention_norm_bias, hidden, buffer.normed + r * hidden);
  team.wait();
  const Products<P> of_normed(model.tiles, buffer.normed, rows, hidden, buffer.packed, team);
  team.share(query_size, of_normed.grain, first, last);
  of_normed.run(layer.query, first, last, buffer.queries, query_size);
  team.share(kv_size, of_normed.grain, first, last);
  of_normed.run(layer.key, first, last, buffer.keys, kv_size);
  of_normed.run(layer.value, first, last, buffer.values, kv_size);
  team.wait();
  if (layer.query_norm && model.norms_whole) {
    team.share(rows, 1, first, last);
    for (int64_t r = first; r < last; r++) {
      float *query = buffer.queries + r * query_size, *key = buffer.keys + r * kv_size;
      norm<P>(model, query, layer.query_norm, layer.query_norm_bias, query_size, query);
      norm<P>(model, key, layer.key_norm, layer.key_norm_bias, kv_size, key);
    }
    team.wait();
  }
  remember<P>(model, cache, pass, index, buffer, team);
  team.wait();
  look<P>(model, cache, pass, index, buffer, team);
  team.wait();
  const Products<P> of_mixed(model.tiles, buffer.mixed, rows, query_size, buffer.packed, team);
  team.share(hidden, of_mixed.grain, first, last);
  of_mixed.run(layer.output, first, last, buffer.projected, hidden);
  team.wait();
  team.share(rows, 1, first, last);
  for (int64_t r = first; r < last; r++) {
    float* projected = buffer.projected + r * hidden;
    if (layer.attention_post_norm)
      norm<P>(model, projected, layer.attention_post_norm, layer.attention_post_norm_bias, hidden, projected);
    scale_rounded<P>(projected, model.residual_scale, hidden);
    add_rounded<P>(x + r * hidden, projected, hidden);
    if (!model.parallel)
      norm_or_copy<P>(model, x + r * hidden, layer.mlp_norm, layer.mlp_norm_bias, hidden, buffer.normed + r * hidden);
  }
  team.wait();
  const Products<P> of_mlp_normed(model.tiles, buffer.normed, rows, hidden, buffer.packed, team);
  team.share(wide, 16, first, last);
  if (layer.gate.weights) of_mlp_normed.run(layer.gate, first, last, buffer.gate, wide);
  of_mlp_normed.run(layer.up, first, last, buffer.up, wide);
  for (int64_t r = 0; r < rows; r++)
    gated<P>(model.activation, layer.gate.weights ? buffer.gate + r * wide : nullptr, buffer.up + r * wide, first, last,
             buffer.inner + r * wide);
  team.wait();
  const Products<P> of_inner(model.tiles, buffer.inner, rows, wide, buffer.packed, team);
  team.share(hidden, of_inner.grain, first, last);
  of_inner.run(layer.down, first, last, buffer.projected, hidden);
  if (layer.mlp_post_norm) {
    team.wait();
    team.share(rows, 1, first, last);
    for (int64_t r = first; r < last; r++) {
      float* projected = buffer.projected + r * hidden;
      norm<P>(model, projected, layer.mlp_post_norm, layer.mlp_post_norm_bias, hidden, projected);
      scale_rounded<P>(projected, model.residual_scale, hidden);
      add_rounded<P>(x + r * hidden, projected, hidden);
    }
  } else
    for (int64_t r = 0; r < rows; r++) {
      float* projected = buffer.projected + r * hidden + first;
      scale_rounded<P>(projected, model.residual_scale, last - first);
      add_rounded<P>(x + r * hidden + first, projected, last - first);
    }
  team.wait();
}

}  // namespace
