// The way of an early exit to its own drafts (models/draft_exits.py): a linear map of the exit's state and of what the late layers have
// left of the last verified token, a gated MLP, a norm, and the rows of the model's head that stand for the tokens of a shortlist.
#pragma once
#include "layer.h"

constexpr int64_t draft_steps = 3;  // that have a map of their own for what the late layers have left

// The structure that pointers.py fills, field by field.
extern "C" {
struct DraftExit {
  Matrix state, read[draft_steps], gate, up, down, head;
  const void *state_norm, *mlp_norm, *norm;  // (hidden,) in the model's dtype
  const int64_t *tokens, *late_layers;       // which token each of `count` rows of the head stands for; the `late` layers
  int64_t late, width, count;
};
}

namespace {

constexpr float draft_epsilon = 1e-6f;

// x / rms(x) times the weight.
template <typename P, typename Out>
void rms_norm(const float* x, const void* weights, int64_t size, Out* y) {
  const auto* weight = (const typename P::element*)weights;
  f16 squares = {};
  int64_t i = 0;
  for (; i + 16 <= size; i += 16) squares += load(x + i) * load(x + i);
  if (i < size) squares += load_part(x + i, size - i) * load_part(x + i, size - i);
  const float scale = 1.0f / sqrtf(sum(squares) / (float)size + draft_epsilon);
  for (i = 0; i + 16 <= size; i += 16) store(y + i, P::rounded(load(x + i) * scale * load(weight + i)));
  if (i < size) store_part(y + i, P::rounded(load_part(x + i, size - i) * scale * load_part(weight + i, size - i)), size - i);
}

// Working memory of a draft's way, one row of each per token.
template <typename P>
struct DraftBuffers {
  typedef typename P::input I;
  float *hidden, *added, *gate, *up;
  I *normed, *values, *inner, *packed, *packed_values;

  DraftBuffers(const Model& model, const DraftExit& exit, int64_t rows, Scratch& scratch) {
    const int64_t values_size = exit.late * model.kv_heads * model.head_dim;
    const int64_t floats = 2 * model.hidden + 2 * exit.width, inputs = model.hidden + values_size + exit.width;
    const int64_t packed_size = model.tiles ? packed_input_size(rows, std::max(model.hidden, exit.width)) : 0;
    const int64_t packed_values_size = model.tiles ? packed_input_size(rows, values_size) : 0;
    scratch.start(rows * (floats * sizeof(float) + inputs * sizeof(I)) + (packed_size + packed_values_size) * sizeof(I), 9);
    hidden = scratch.take<float>(rows * model.hidden);
    added = scratch.take<float>(rows * model.hidden);
    gate = scratch.take<float>(rows * exit.width);
    up = scratch.take<float>(rows * exit.width);
    normed = scratch.take<I>(rows * model.hidden);
    values = scratch.take<I>(rows * values_size);
    inner = scratch.take<I>(rows * exit.width);
    packed = scratch.take<I>(packed_size);
    packed_values = scratch.take<I>(packed_values_size);
  }
};

// The late layers' values at `position` of a row, (late, kv heads, head_dim); zero for a position before the first.
template <typename P>
void take_values(const Model& model, const CacheView& cache, const DraftExit& exit, int64_t batch, int64_t position,
                 typename P::input* out) {
  typedef typename P::element E;
  const int64_t size = model.head_dim, cut = cache.shared(batch);
  for (int64_t i = 0; i < exit.late; i++)
    for (int64_t head = 0; head < model.kv_heads; head++, out += size) {
      if (position < 0) {
        std::fill(out, out + size, typename P::input{});
        continue;
      }
      const bool own = position >= cut;
      const auto* stored = (const E*)(own ? cache.values : cache.prefix_values)[exit.late_layers[i]];
      const int64_t slot = own ? cache.own_slots(model, batch, head) + position - cut : cache.shared_slots(model, batch, head) + position;
      convert(stored + slot * size, out, size);
    }
}

// Logits of the shortlist for states x (rows, hidden), which stay as they are. The late layers are read one position before
// since[batch], from where all rows are equally far, or, without `since`, before each token's own position. logits (rows, count) and
// tokens (rows,) may each be null. Returns 0, or 1 where there is no largest finite value.
template <typename P>
int64_t read_draft_exit(const Model& model, const CacheView& cache, const Pass& pass, const DraftExit& exit, const int64_t* since,
                        const float* x, float* logits, int64_t* tokens, int64_t threads) {
  const int64_t hidden = model.hidden, rows = pass.rows, wide = exit.width, count = exit.count;
  const int64_t values_size = exit.late * model.kv_heads * model.head_dim;
  const Matrix& read = exit.read[since ? std::min(pass.position(0) - since[0], draft_steps - 1) : 0];
  const DraftBuffers<P> buffer(model, exit, rows, layer_scratch);
  head_scratch.start(logits ? 0 : rows * count * sizeof(float), 1);
  float* out = logits ? logits : head_scratch.take<float>(rows * count);
  with_team(threads, [&](const Team& team) {
    const TileShapes shapes(model.tiles, rows == 1);
    int64_t first, last, first_row, last_row;
    team.share(rows, 1, first_row, last_row);
    auto added_and_normed = [&](const void* weights) {
      team.wait();
      for (int64_t r = first_row; r < last_row; r++) {
        add_rounded<P>(buffer.hidden + r * hidden, buffer.added + r * hidden, hidden);
        rms_norm<P>(buffer.hidden + r * hidden, weights, hidden, buffer.normed + r * hidden);
      }
      team.wait();
    };
    for (int64_t r = first_row; r < last_row; r++) {
      rms_norm<P>(x + r * hidden, exit.state_norm, hidden, buffer.normed + r * hidden);
      take_values<P>(model, cache, exit, pass.batch(r), (since ? since[pass.batch(r)] : pass.position(r)) - 1,
                     buffer.values + r * values_size);
    }
    team.wait();
    const Products<P> of_state(model.tiles, buffer.normed, rows, hidden, buffer.packed, team);
    team.share(hidden, 16, first, last);
    of_state.run(exit.state, first, last, buffer.hidden, hidden);
    const Products<P> of_values(model.tiles, buffer.values, rows, values_size, buffer.packed_values, team);
    of_values.run(read, first, last, buffer.added, hidden);
    added_and_normed(exit.mlp_norm);
    const Products<P> of_normed(model.tiles, buffer.normed, rows, hidden, buffer.packed, team);
    team.share(wide, 16, first, last);
    of_normed.run(exit.gate, first, last, buffer.gate, wide);
    of_normed.run(exit.up, first, last, buffer.up, wide);
    for (int64_t r = 0; r < rows; r++) gated<P>(0, buffer.gate + r * wide, buffer.up + r * wide, first, last, buffer.inner + r * wide);
    team.wait();
    const Products<P> of_inner(model.tiles, buffer.inner, rows, wide, buffer.packed, team);
    team.share(hidden, 16, first, last);
    of_inner.run(exit.down, first, last, buffer.added, hidden);
    added_and_normed(exit.norm);
    const Products<P> of_draft(model.tiles, buffer.normed, rows, hidden, buffer.packed, team);
    team.share(count, 16, first, last);
    of_draft.run(exit.head, first, last, out, count);
  });
  int64_t bad = 0;
  if (tokens)
    for (int64_t r = 0; r < rows; r++) {
      const int64_t place = first_largest(out + r * count, count);
      bad |= place < 0;
      tokens[r] = place < 0 ? -1 : exit.tokens[place];
    }
  if (logits && model.logit_scale != 1.0f)
    for (int64_t i = 0; i < rows * count; i++) logits[i] = P::rounded(logits[i] * model.logit_scale);
  if (logits && model.logit_cap > 0.0f) soft_cap(logits, rows * count, model.logit_cap);
  return bad;
}

}  // namespace
