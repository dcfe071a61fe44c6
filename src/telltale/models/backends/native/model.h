// What the native side knows of a model, its cache and one pass; scratch memory; a team of threads.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>
#if defined(_OPENMP)
#include <omp.h>
#endif

// The structures that step.py fills, field by field. Vectors are in the model's dtype, like the matrices; tables in float.
extern "C" {
struct Matrix {
  const void *weights, *bias;  // no weights: the family has no such matrix
  const int8_t* values;        // the same in 8 bits, and its scales in half precision (see packed.h); null if there is none
  const uint16_t* scales;
  int64_t intact;  // whether both hold the same numbers
};
struct Layer {
  Matrix query, key, value, output, gate, up, down;
  // Before the attention and the MLP, behind them, and of queries and keys. Null where the family has none.
  const void *attention_norm, *attention_post_norm, *mlp_norm, *mlp_post_norm, *query_norm, *key_norm;
  const void *attention_norm_bias, *attention_post_norm_bias, *mlp_norm_bias, *mlp_post_norm_bias, *query_norm_bias, *key_norm_bias;
  const float *cosines, *sines;  // (positions, rotary_dim); null where the layer does not turn
  int64_t window;
};
struct Model {
  int64_t layers, hidden, heads, kv_heads, head_dim, feed_forward, vocabulary, rotary_dim;
  int64_t is_bf16, tiles, activation;  // tiles: products by the processor's matrix tiles (see tiles.h)
  int64_t norm_centres, norm_adds_one, norm_rounds;  // minus the mean; times 1 + weight; rounded before the weight as well
  int64_t norms_whole, norm_stride;  // query and key norms: over all heads at once; from one head's weights to the next's
  int64_t parallel, interleaved;     // the MLP reads what the attention reads; neighbours turn, not halves
  float norm_epsilon, attention_scale, attention_cap, embedding_scale, residual_scale, logit_scale, logit_cap;
  Matrix head;
  const void *embedding, *final_norm, *final_norm_bias;
  Layer* layer;
};
struct CacheView {
  void **keys, **values;
  int64_t capacity;
  void **prefix_keys, **prefix_values;
  int64_t prefix_capacity;
  const int64_t *prefix_lengths, *prefix_rows;  // for each row, null if the cache is no fork
  const int64_t* own_rows;                      // where each row stands in keys and values, null if in order
  int64_t shared(int64_t batch) const { return prefix_lengths ? prefix_lengths[batch] : 0; }
  int64_t own(int64_t batch) const { return own_rows ? own_rows[batch] : batch; }
  // Number of the first slot of a kv head, counted from the start of a layer.
  int64_t own_slots(const Model& model, int64_t batch, int64_t head) const {
    return (own(batch) * model.kv_heads + head) * capacity;
  }
  int64_t shared_slots(const Model& model, int64_t batch, int64_t head) const {
    return (prefix_rows[batch] * model.kv_heads + head) * prefix_capacity;
  }
};
// Where the attention of a pass on positions since[batch].. of its own rows goes: (layers from first_layer on, rows, heads,
// span), zero where nothing is written.
struct Blocks {
  float* out;
  const int64_t* since;
  int64_t first_layer, span;
  float* of(int64_t layer, int64_t items, int64_t item) const { return out + ((layer - first_layer) * items + item) * span; }
};
}

namespace {

// The tokens of a pass: `rows` in all, `width` for each row of the batch, at consecutive positions.
struct Pass {
  int64_t rows, width;
  const int64_t* first_positions;
  const Blocks* blocks = nullptr;
  int64_t batch(int64_t row) const { return row / width; }
  int64_t position(int64_t row) const { return first_positions[row / width] + row % width; }
};

struct Scratch {
  std::vector<char> bytes;
  size_t used = 0;
  // `need`: bytes of all the takes that follow; each may lose 63 to alignment, as may the start.
  void start(size_t need, size_t takes) {
    need += 64 * (takes + 1);
    if (bytes.size() < need) bytes.resize(need);
    used = (64 - (uintptr_t)bytes.data() % 64) % 64;
  }
  template <typename T>
  T* take(int64_t count) {
    T* p = (T*)(bytes.data() + used);
    used += (count * sizeof(T) + 63) / 64 * 64;
    return p;
  }
};
thread_local Scratch layer_scratch, head_scratch, loop_scratch, score_scratch, product_scratch, arranged_scratch, panel_scratch;

struct Team {
  int64_t index, size;
  void wait() const {
#if defined(_OPENMP)
    if (size > 1) {
#pragma omp barrier
    }
#endif
  }
  // This member's part first..last-1 of `count` items, cut at multiples of `grain`.
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

}  // namespace
