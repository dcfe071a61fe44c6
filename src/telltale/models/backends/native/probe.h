// A trial of every kernel on a small random model, for build.py: run in a process of its own, where a wrong instruction harms
// nobody. A prompt must lead to the same tokens at every width of its passes, from matrices in either form.
#pragma once
#include "layer.h"

namespace {

struct Random {
  uint32_t state = 1;
  float next() { return ((state = state * 1664525u + 1013904223u) >> 8) / 16777216.0f - 0.5f; }
};

template <typename E>
std::vector<E> filled(Random& random, int64_t count) {
  std::vector<float> given(count);
  for (float& value : given) value = random.next();
  std::vector<E> out(count);
  convert(given.data(), out.data(), count);
  return out;
}

// A matrix in 8 bits, and what that is in the model's dtype.
template <typename E>
struct BothForms {
  std::vector<int8_t> values;
  std::vector<uint16_t> scales;
  std::vector<E> elements;
  Matrix matrix{};
  BothForms(Random& random, int64_t rows, int64_t depth, bool tiles) {
    const int64_t blocks = (rows + packed_rows - 1) / packed_rows, groups = groups_of(depth);
    values.resize(lead + blocks * groups * packed_rows * group_size), scales.resize(blocks * groups * packed_rows + 16);
    elements.resize(blocks * packed_rows * depth);
    for (size_t i = lead; i < values.size(); i++) {
      const int64_t at = (int64_t)(i - lead), column = at / (packed_rows * group_size) % groups * group_size + at % group_size;
      values[i] = column < depth ? (int8_t)(random.next() * 255.0f) : 0;
    }
    for (uint16_t& scale : scales) scale = (uint16_t)(0x1c00 + (int)(random.next() * 512.0f));  // about 1 / 255
    matrix.weights = elements.data(), matrix.values = values.data() + lead, matrix.scales = scales.data();
    std::vector<float> wide(groups * packed_rows + 16);
    each_packed(matrix, depth, 0, rows, wide.data(), [&](int64_t n, PackedRows w) {
      widen(w, depth, elements.data() + n * depth);
      return true;
    });
    if (tiles) arrange(rows / tile_side, groups);
#if defined(TELLTALE_AVX2)
    interleave();
#endif
  }

#if defined(TELLTALE_AVX2)
  static constexpr int64_t lead = packed_lead;

  // Values of a group as packed_avx2.h takes them.
  void interleave() {
    const auto old = values;
    for (size_t i = lead; i < values.size(); i++) {
      const int64_t byte = (int64_t)(i - lead) % group_size, lane = byte / 4, step = byte % 4;
      const bool pairs = sizeof(E) == sizeof(bf16);
      values[i] = old[i - byte + (pairs ? step / 2 * 16 + lane * 2 + step % 2 : step * 8 + lane)];
    }
  }
#else
  static constexpr int64_t lead = 0;
#endif

  // Sixteen rows together, as tiles take them.
  void arrange(int64_t blocks, int64_t groups) {
    const auto old_values = values;
    const auto old_scales = scales;
    for (int64_t block = 0; block < blocks; block++)
      for (int64_t group = 0; group < groups; group++)
        for (int64_t row = 0; row < tile_side; row++) {
          const int64_t to = (block * groups + group) * tile_side;
          const int64_t from = ((block * tile_side + row) / packed_rows * groups + group) * packed_rows + row % packed_rows;
          for (int64_t k = 0; k < group_size; k++)
            values[to * group_size + (k / 2 * tile_side + row) * 2 + k % 2] = old_values[from * group_size + k] ^ -128;
          scales[to + row / 2 % 4 * 4 + row / 8 * 2 + row % 2] = old_scales[from];
        }
  }
};

// The greedy tokens after each of `length` prompt tokens, `width` of them in a pass.
// Plain: the arithmetic of Llama; else norms that centre, behind the sublayers as well, caps, neighbours that turn, no gate.
// Tiles: by matrix tiles, with sizes that they take.
template <typename P, typename After>
bool probe(int64_t is_bf16, bool plain, bool tiles, const After& after) {
  typedef typename P::element E;
  const int64_t hidden = tiles ? 96 : 72, heads = 4, kv_heads = 2, size = tiles ? 24 : 20, inner = tiles ? 544 : 808;
  const int64_t vocabulary = 67, length = 26;
  Random random;
  auto make = [&](int64_t count) { return filled<E>(random, count); };
  auto both = [&](int64_t rows, int64_t depth) { return BothForms<E>(random, rows, depth, tiles); };
  const auto query = both(heads * size, hidden), key = both(kv_heads * size, hidden), value = both(kv_heads * size, hidden);
  const auto output = both(hidden, heads * size), gate = both(inner, hidden), up = both(inner, hidden);
  const auto down = both(hidden, inner), embedding = both(vocabulary, hidden);
  auto bias = make(inner), norm = make(inner);
  auto cosines = filled<float>(random, length * size), sines = filled<float>(random, length * size);
  Layer layer{};
  layer.query = query.matrix, layer.key = key.matrix, layer.value = value.matrix, layer.output = output.matrix;
  layer.gate = gate.matrix, layer.up = up.matrix, layer.down = down.matrix;
  layer.query.bias = layer.key.bias = layer.up.bias = bias.data();
  layer.attention_norm = layer.mlp_norm = layer.query_norm = layer.key_norm = norm.data();
  layer.window = 17, layer.cosines = cosines.data(), layer.sines = sines.data();
  Model model{};
  model.layers = 1, model.hidden = hidden, model.heads = heads, model.kv_heads = kv_heads, model.head_dim = size;
  model.feed_forward = inner, model.vocabulary = vocabulary, model.rotary_dim = size, model.is_bf16 = is_bf16, model.tiles = tiles;
  model.norm_epsilon = 1e-5f, model.attention_scale = 0.2f, model.embedding_scale = 1.0f;
  model.residual_scale = model.logit_scale = 1.0f, model.norm_rounds = 1;
  if (!plain) {
    layer.attention_post_norm = layer.mlp_post_norm = layer.mlp_norm_bias = layer.key_norm_bias = norm.data();
    layer.gate = Matrix{};
    model.norm_centres = model.interleaved = 1, model.activation = 2, model.attention_cap = 0.5f, model.residual_scale = 0.7f;
  }
  model.embedding = embedding.elements.data(), model.head = embedding.matrix, model.final_norm = norm.data(), model.layer = &layer;
  int64_t prompt[length];
  for (int64_t i = 0; i < length; i++) prompt[i] = i * 7 % vocabulary;
  int64_t wanted[length], found[length];
  for (const bool in_8_bits : {false, true}) {
    if (in_8_bits && look_at_matrices<P>(model, 1)) return false;
    for (int64_t width : {1, 2, 3, 4, 5, 8, 13, 26}) {
      std::vector<E> keys(kv_heads * length * size), values(kv_heads * length * size);
      void *key_rows[] = {keys.data()}, *value_rows[] = {values.data()};
      CacheView cache{};
      cache.keys = key_rows, cache.values = value_rows, cache.capacity = length;
      for (int64_t first = 0; first < length; first += width) {
        const int64_t own = std::min(width, length - first);
        const Pass pass{own, own, &first};
        if (after(model, cache, pass, prompt + first, found + first)) return false;
      }
      if (width == 1 && !in_8_bits) std::copy(found, found + length, wanted);
      if (!std::equal(found, found + length, wanted)) return false;
    }
  }
  return true;
}

}  // namespace
