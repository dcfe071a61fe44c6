// One step of a Llama-like decoder on CPU: some layers for some tokens, the LM head, and greedy loops over both.
// Built by build.py, called through ctypes by engine.py. Values are rounded to the model's dtype where its Hugging Face
// modules round them. No allocation of weights, no global state but per-thread scratch memory.
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>
#if defined(_OPENMP)
#include <omp.h>
#endif
#include "products.h"

extern "C" {
struct Layer {
  const void *query, *key, *value, *output, *gate, *up, *down;
  const float *query_bias, *key_bias, *value_bias, *output_bias, *gate_bias, *up_bias, *down_bias;
  const float *attention_norm, *mlp_norm, *query_norm, *key_norm;
  int64_t window;
};
struct Model {
  int64_t layers, hidden, heads, kv_heads, head_dim, feed_forward, vocabulary, rotary_dim;
  int64_t is_bf16, norm_adds_one, activation;
  float norm_epsilon, attention_scale, embedding_scale;
  const float *cosines, *sines;
  const void *embedding, *head;
  const float *head_bias, *final_norm;
  const Layer* layer;
};
struct CacheView {
  void **keys, **values;
  int64_t capacity;
  void **prefix_keys, **prefix_values;
  int64_t prefix_capacity, prefix_length;
};
}

namespace {

struct Pass {
  int64_t rows, width;
  const int64_t* first_positions;
  int64_t batch(int64_t row) const { return row / width; }
  int64_t position(int64_t row) const { return first_positions[row / width] + row % width; }
};

struct Scratch {
  std::vector<char> bytes;
  size_t used = 0;
  void start(size_t need) {
    if (bytes.size() < need + 64) bytes.resize(need + 64);
    used = (64 - (uintptr_t)bytes.data() % 64) % 64;
  }
  template <typename T>
  T* take(int64_t count) {
    T* p = (T*)(bytes.data() + used);
    used += (count * sizeof(T) + 63) / 64 * 64;
    return p;
  }
};
thread_local Scratch layer_scratch, head_scratch, loop_scratch, score_scratch;

struct Team {
  int64_t index, size;
  void wait() const {
#if defined(_OPENMP)
    if (size > 1) {
#pragma omp barrier
    }
#endif
  }
  void share(int64_t count, int64_t grain, int64_t& first, int64_t& last) const {
    int64_t pieces = (count + grain - 1) / grain;
    first = std::min(count, pieces * index / size * grain);
    last = std::min(count, pieces * (index + 1) / size * grain);
  }
};

template <typename Body>
void with_team(int64_t threads, const Body& body) {
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    body(Team{omp_get_thread_num(), omp_get_num_threads()});
    return;
  }
#endif
  body(Team{0, 1});
}

// RMSNorm of one row: x / rms(x), rounded, times the weight, rounded (Llama); Gemma multiplies by 1 + weight first.
template <typename P, typename Out>
void rms_norm(const Model& model, const float* x, const float* weight, int64_t size, Out* y) {
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

template <typename E>
void copy_head(const float* from, E* to, int64_t size) {
  int64_t i = 0;
  for (; i + 16 <= size; i += 16) store(to + i, load(from + i));
  if (i < size) store_part(to + i, load_part(from + i, size - i), size - i);
}

// Storage of one kv head: positions below prefix_length in the shared prefix of a fork, the others in the row's own.
template <typename E>
struct Slots {
  const E *prefix, *own;
  int64_t prefix_length;
};

template <typename E>
Slots<E> slots(const Model& model, const CacheView& cache, void** own, void** prefix, int64_t layer, int64_t batch, int64_t head) {
  return {cache.prefix_length ? (const E*)prefix[layer] + head * cache.prefix_capacity * model.head_dim : nullptr,
          (const E*)own[layer] + (batch * model.kv_heads + head) * cache.capacity * model.head_dim, cache.prefix_length};
}

// Call body(address of the first slot, index of it, number of slots) for each contiguous piece of positions first..last.
template <typename E, typename Body>
inline void each_piece(const Slots<E>& slots, int64_t size, int64_t first, int64_t last, const Body& body) {
  const int64_t cut = slots.prefix_length;
  if (first < cut) body(slots.prefix + first * size, (int64_t)0, std::min(cut, last + 1) - first);
  const int64_t start = std::max(first, cut);
  if (start <= last) body(slots.own + (start - cut) * size, start - first, last + 1 - start);
}

template <typename E>
inline f16 dot(const float* query, const E* key, int64_t size) {
  f16 total = {};
  int64_t i = 0;
  for (; i + 16 <= size; i += 16) total += load(query + i) * load(key + i);
  if (i < size) total += load_part(query + i, size - i) * load_part(key + i, size - i);
  return total;
}

// Attention of one query head over positions first..last, into `mixed` (head_dim).
template <typename P>
void attend(const Model& model, const float* query, const Slots<typename P::element>& keys,
            const Slots<typename P::element>& values, int64_t first, int64_t last, float* mixed) {
  typedef typename P::element E;
  const int64_t size = model.head_dim, count = last - first + 1;
  score_scratch.start((count + 16) * sizeof(float));
  float* scores = score_scratch.take<float>(count + 16);
  each_piece(keys, size, first, last, [&](const E* key, int64_t index, int64_t number) {
    int64_t t = 0;
    for (; t + 4 <= number; t += 4, key += 4 * size) {
      f4 four = sum4(dot(query, key, size), dot(query, key + size, size), dot(query, key + 2 * size, size),
                     dot(query, key + 3 * size, size)) *
                model.attention_scale;
      memcpy(scores + index + t, &four, sizeof four);
    }
    for (; t < number; t++, key += size) scores[index + t] = sum(dot(query, key, size)) * model.attention_scale;
  });
  f16 tops = splat(scores[0]);
  int64_t t = 0;
  for (; t + 16 <= count; t += 16) tops = load(scores + t) > tops ? load(scores + t) : tops;
  float top = largest(tops);
  for (; t < count; t++) top = scores[t] > top ? scores[t] : top;
  for (t = count; t < count + 15; t++) scores[t] = top - 1000.0f;
  f16 total = {};
  for (t = 0; t < count; t += 16) {
    f16 p = exp16(load(scores + t) - top);
    if (t + 16 > count) {
      float part[16];
      store(part, p);
      for (int64_t i = count - t; i < 16; i++) part[i] = 0.0f;
      p = load(part);
    }
    store(scores + t, p);
    total += p;
  }
  const float norm = 1.0f / sum(total);
  for (int64_t i = 0; i < size; i += 16) {
    const int64_t lanes = std::min<int64_t>(16, size - i);
    f16 sums[4] = {};
    each_piece(values, size, first, last, [&](const E* value, int64_t index, int64_t number) {
      value += i;
      const float* weight = scores + index;
      int64_t t = 0;
      if (lanes == 16)
        for (; t + 4 <= number; t += 4, value += 4 * size) {
          sums[0] += load(value) * weight[t];
          sums[1] += load(value + size) * weight[t + 1];
          sums[2] += load(value + 2 * size) * weight[t + 2];
          sums[3] += load(value + 3 * size) * weight[t + 3];
        }
      for (; t < number; t++, value += size) sums[0] += (lanes == 16 ? load(value) : load_part(value, lanes)) * weight[t];
    });
    f16 result = P::rounded(((sums[0] + sums[1]) + (sums[2] + sums[3])) * norm);
    if (lanes == 16) store(mixed + i, result);
    else store_part(mixed + i, result, lanes);
  }
}

f16 activate(int64_t kind, f16 x) {
  if (kind == 0) return x / (exp16(-x) + 1.0f);
  f16 z = (x + x * x * x * 0.044715f) * 0.7978845608028654f;
  f16 tanh = 1.0f - 2.0f / (exp16(z * 2.0f) + 1.0f);
  return x * 0.5f * (tanh + 1.0f);
}

struct Buffers {
  float *queries, *keys, *values, *projected, *gate, *up;
  void *normed, *mixed, *inner;
  float* mixed_float;
};

template <typename P>
void layer_step(const Model& model, const CacheView& cache, const Pass& pass, int64_t index, float* x, const Buffers& buffer,
                const Team& team) {
  typedef typename P::element E;
  const Layer& layer = model.layer[index];
  const int64_t hidden = model.hidden, size = model.head_dim, rows = pass.rows;
  const int64_t query_size = model.heads * size, kv_size = model.kv_heads * size;
  E *normed = (E*)buffer.normed, *mixed = (E*)buffer.mixed, *inner = (E*)buffer.inner;
  int64_t first, last;

  team.share(rows, 1, first, last);
  for (int64_t r = first; r < last; r++) rms_norm<P>(model, x + r * hidden, layer.attention_norm, hidden, normed + r * hidden);
  team.wait();
  team.share(query_size, 8, first, last);
  product<P>(layer.query, layer.query_bias, normed, rows, hidden, first, last, buffer.queries, query_size);
  team.share(kv_size, 8, first, last);
  product<P>(layer.key, layer.key_bias, normed, rows, hidden, first, last, buffer.keys, kv_size);
  product<P>(layer.value, layer.value_bias, normed, rows, hidden, first, last, buffer.values, kv_size);
  team.wait();

  team.share(rows * model.kv_heads, 1, first, last);
  for (int64_t item = first; item < last; item++) {
    const int64_t r = item / model.kv_heads, head = item % model.kv_heads, position = pass.position(r);
    float *key = buffer.keys + r * kv_size + head * size, *value = buffer.values + r * kv_size + head * size;
    if (layer.key_norm) rms_norm<P>(model, key, layer.key_norm, size, key);
    rotate<P>(model, key, position);
    const int64_t slot = ((pass.batch(r) * model.kv_heads + head) * cache.capacity + position - cache.prefix_length) * size;
    copy_head(key, (E*)cache.keys[index] + slot, size);
    copy_head(value, (E*)cache.values[index] + slot, size);
  }
  team.wait();
  team.share(rows * model.heads, 1, first, last);
  for (int64_t item = first; item < last; item++) {
    const int64_t r = item / model.heads, head = item % model.heads, position = pass.position(r);
    const int64_t kv_head = head / (model.heads / model.kv_heads);
    float* query = buffer.queries + r * query_size + head * size;
    if (layer.query_norm) rms_norm<P>(model, query, layer.query_norm, size, query);
    rotate<P>(model, query, position);
    const int64_t oldest = layer.window > 0 ? std::max<int64_t>(0, position - layer.window + 1) : 0;
    float* out = buffer.mixed_float + r * query_size + head * size;
    attend<P>(model, query, slots<E>(model, cache, cache.keys, cache.prefix_keys, index, pass.batch(r), kv_head),
              slots<E>(model, cache, cache.values, cache.prefix_values, index, pass.batch(r), kv_head), oldest, position, out);
    copy_head(out, mixed + r * query_size + head * size, size);
  }
  team.wait();
  team.share(hidden, 8, first, last);
  product<P>(layer.output, layer.output_bias, mixed, rows, query_size, first, last, buffer.projected, hidden);
  team.wait();
  team.share(rows, 1, first, last);
  for (int64_t r = first; r < last; r++) {
    add_rounded<P>(x + r * hidden, buffer.projected + r * hidden, hidden);
    rms_norm<P>(model, x + r * hidden, layer.mlp_norm, hidden, normed + r * hidden);
  }
  team.wait();
  const int64_t wide = model.feed_forward;
  team.share(wide, 16, first, last);
  product<P>(layer.gate, layer.gate_bias, normed, rows, hidden, first, last, buffer.gate, wide);
  product<P>(layer.up, layer.up_bias, normed, rows, hidden, first, last, buffer.up, wide);
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t i = first; i < last; i += 16) {
      const int64_t at = r * wide + i, lanes = std::min<int64_t>(16, last - i);
      f16 g = lanes == 16 ? load(buffer.gate + at) : load_part(buffer.gate + at, lanes);
      f16 u = lanes == 16 ? load(buffer.up + at) : load_part(buffer.up + at, lanes);
      f16 product_of_both = P::rounded(activate(model.activation, g)) * u;
      if (lanes == 16) store(inner + at, product_of_both);
      else store_part(inner + at, product_of_both, lanes);
    }
  }
  team.wait();
  team.share(hidden, 8, first, last);
  product<P>(layer.down, layer.down_bias, inner, rows, wide, first, last, buffer.projected, hidden);
  for (int64_t r = 0; r < rows; r++) add_rounded<P>(x + r * hidden + first, buffer.projected + r * hidden + first, last - first);
  team.wait();
}

// Layers start..stop-1 on x (rows, hidden) in place.
template <typename P>
void run_layers(const Model& model, const CacheView& cache, const Pass& pass, int64_t start, int64_t stop, float* x, int64_t threads) {
  typedef typename P::element E;
  const int64_t query_size = model.heads * model.head_dim, kv_size = model.kv_heads * model.head_dim;
  const int64_t floats = 2 * query_size + 2 * kv_size + model.hidden + 2 * model.feed_forward;
  const int64_t elements = model.hidden + query_size + model.feed_forward;
  layer_scratch.start(pass.rows * (floats * sizeof(float) + elements * sizeof(E)) + 64 * 16);
  Buffers buffer;
  buffer.queries = layer_scratch.take<float>(pass.rows * query_size);
  buffer.keys = layer_scratch.take<float>(pass.rows * kv_size);
  buffer.values = layer_scratch.take<float>(pass.rows * kv_size);
  buffer.projected = layer_scratch.take<float>(pass.rows * model.hidden);
  buffer.gate = layer_scratch.take<float>(pass.rows * model.feed_forward);
  buffer.up = layer_scratch.take<float>(pass.rows * model.feed_forward);
  buffer.mixed_float = layer_scratch.take<float>(pass.rows * query_size);
  buffer.normed = layer_scratch.take<E>(pass.rows * model.hidden);
  buffer.mixed = layer_scratch.take<E>(pass.rows * query_size);
  buffer.inner = layer_scratch.take<E>(pass.rows * model.feed_forward);
  with_team(threads, [&](const Team& team) {
    for (int64_t index = start; index < stop; index++) layer_step<P>(model, cache, pass, index, x, buffer, team);
  });
}

// Lowest index of the largest value; -1 if any value is NaN.
int64_t first_largest(const float* values, int64_t count) {
  f16 top = splat(-INFINITY);
  i16 nan = {};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    f16 v = load(values + i);
    nan |= (v != v);
    top = v > top ? v : top;
  }
  float best = largest(top);
  bool bad = false;
  for (int lane = 0; lane < 16; lane++) bad |= nan[lane] != 0;
  for (; i < count; i++) {
    bad |= values[i] != values[i];
    best = values[i] > best ? values[i] : best;
  }
  if (bad) return -1;
  for (i = 0; i < count; i++)
    if (values[i] == best) return i;
  return -1;
}

// Final norm and LM head of x (rows, hidden). logits (rows, vocabulary) and tokens (rows) may each be null. Returns 0, or 1 on NaN.
template <typename P>
int64_t read_head(const Model& model, const float* x, int64_t rows, float* logits, int64_t* tokens, int64_t threads) {
  typedef typename P::element E;
  const int64_t size = model.vocabulary;
  head_scratch.start(rows * (model.hidden * sizeof(E) + (logits ? 0 : size * sizeof(float))) + 64 * 3);
  E* normed = head_scratch.take<E>(rows * model.hidden);
  float* out = logits ? logits : head_scratch.take<float>(rows * size);
  for (int64_t r = 0; r < rows; r++) rms_norm<P>(model, x + r * model.hidden, model.final_norm, model.hidden, normed + r * model.hidden);
  with_team(threads, [&](const Team& team) {
    int64_t first, last;
    team.share(size, 16, first, last);
    product<P>(model.head, model.head_bias, normed, rows, model.hidden, first, last, out, size);
  });
  int64_t bad = 0;
  if (tokens)
    for (int64_t r = 0; r < rows; r++) {
      tokens[r] = first_largest(out + r * size, size);
      bad |= tokens[r] < 0;
    }
  return bad;
}

template <typename P>
void embed(const Model& model, int64_t token, float* x) {
  const auto* row = (const typename P::element*)model.embedding + token * model.hidden;
  int64_t i = 0;
  for (; i + 16 <= model.hidden; i += 16) store(x + i, load(row + i));
  if (i < model.hidden) store_part(x + i, load_part(row + i, model.hidden - i), model.hidden - i);
  if (model.embedding_scale != 1.0f)
    for (i = 0; i < model.hidden; i++) x[i] = P::rounded(x[i] * model.embedding_scale);
}

bool stops(const int64_t* stop_tokens, int64_t count, int64_t token) {
  return std::find(stop_tokens, stop_tokens + count, token) != stop_tokens + count;
}

template <typename P>
void run(const Model& model, const CacheView& cache, const Pass& pass, int64_t start, int64_t stop, const void* in, void* out,
         int64_t threads) {
  typedef typename P::element E;
  loop_scratch.start(pass.rows * model.hidden * sizeof(float) + 64);
  float* x = loop_scratch.take<float>(pass.rows * model.hidden);
  for (int64_t r = 0; r < pass.rows; r++)
    for (int64_t i = 0; i < model.hidden; i++) {
      E value = ((const E*)in)[r * model.hidden + i];
      x[r * model.hidden + i] = std::is_same<E, float>::value ? (float)value : to_float((bf16)value);
    }
  run_layers<P>(model, cache, pass, start, stop, x, threads);
  copy_head(x, (E*)out, pass.rows * model.hidden);
}

template <typename P>
int64_t head(const Model& model, const void* in, int64_t rows, float* logits, int64_t* tokens, int64_t threads) {
  typedef typename P::element E;
  loop_scratch.start(rows * model.hidden * sizeof(float) + 64);
  float* x = loop_scratch.take<float>(rows * model.hidden);
  for (int64_t i = 0; i < rows * model.hidden; i++) {
    E value = ((const E*)in)[i];
    x[i] = std::is_same<E, float>::value ? (float)value : to_float((bf16)value);
  }
  return read_head<P>(model, x, rows, logits, tokens, threads);
}

// Up to `count` greedy steps of one row through layers 0..stop-1. With `states`, each step's state is kept there and one
// more step runs for the last token's state alone (the catch-up of a draft). Returns the number of tokens, or -1 on NaN.
template <typename P>
int64_t greedy_steps(const Model& model, const CacheView& cache, int64_t token, int64_t position, int64_t stop, int64_t count,
                     const int64_t* stop_tokens, int64_t stop_count, int64_t* tokens, void* states, int64_t threads) {
  typedef typename P::element E;
  loop_scratch.start(model.hidden * sizeof(float) + 64);
  float* x = loop_scratch.take<float>(model.hidden);
  for (int64_t step = 0;; step++) {
    const int64_t place = position + step;
    embed<P>(model, token, x);
    run_layers<P>(model, cache, Pass{1, 1, &place}, 0, stop, x, threads);
    if (states) copy_head(x, (E*)states + step * model.hidden, model.hidden);
    if (states && (step == count || (step && stops(stop_tokens, stop_count, tokens[step - 1])))) return step;
    if (read_head<P>(model, x, 1, nullptr, tokens + step, threads)) return -1;
    token = tokens[step];
    if (!states && (step + 1 == count || stops(stop_tokens, stop_count, token))) return step + 1;
  }
}

// Layers start..L-1 on the given states, or on the embeddings of the given tokens, and the greedy token after each.
template <typename P>
int64_t greedy_after(const Model& model, const CacheView& cache, const Pass& pass, const int64_t* given, const void* states,
                     int64_t start, int64_t* tokens, int64_t threads) {
  typedef typename P::element E;
  loop_scratch.start(pass.rows * model.hidden * sizeof(float) + 64);
  float* x = loop_scratch.take<float>(pass.rows * model.hidden);
  for (int64_t r = 0; r < pass.rows; r++) {
    if (given) embed<P>(model, given[r], x + r * model.hidden);
    else
      for (int64_t i = r * model.hidden; i < (r + 1) * model.hidden; i++) {
        E value = ((const E*)states)[i];
        x[i] = std::is_same<E, float>::value ? (float)value : to_float((bf16)value);
      }
  }
  run_layers<P>(model, cache, pass, start, model.layers, x, threads);
  return read_head<P>(model, x, pass.rows, nullptr, tokens, threads);
}

}  // namespace

#define BY_DTYPE(call) (model->is_bf16 ? call(BFloat16) : call(Float32))

extern "C" {

void telltale_run(const Model* model, const CacheView* cache, int64_t batch, int64_t width, const int64_t* positions,
                  int64_t start, int64_t stop, const void* in, void* out, int64_t threads) {
  Pass pass{batch * width, width, positions};
#define CALL(P) run<P>(*model, *cache, pass, start, stop, in, out, threads)
  BY_DTYPE(CALL);
#undef CALL
}

int64_t telltale_head(const Model* model, const void* in, int64_t rows, float* logits, int64_t* tokens, int64_t threads) {
#define CALL(P) head<P>(*model, in, rows, logits, tokens, threads)
  return BY_DTYPE(CALL);
#undef CALL
}

int64_t telltale_greedy_steps(const Model* model, const CacheView* cache, int64_t token, int64_t position, int64_t stop,
                              int64_t count, const int64_t* stop_tokens, int64_t stop_count, int64_t* tokens, void* states,
                              int64_t threads) {
#define CALL(P) greedy_steps<P>(*model, *cache, token, position, stop, count, stop_tokens, stop_count, tokens, states, threads)
  return BY_DTYPE(CALL);
#undef CALL
}

int64_t telltale_greedy_after(const Model* model, const CacheView* cache, int64_t batch, int64_t width, const int64_t* positions,
                              const int64_t* given, const void* states, int64_t start, int64_t* tokens, int64_t threads) {
  Pass pass{batch * width, width, positions};
#define CALL(P) greedy_after<P>(*model, *cache, pass, given, states, start, tokens, threads)
  return BY_DTYPE(CALL);
#undef CALL
}

}  // extern "C"
