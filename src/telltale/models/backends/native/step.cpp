// One step of a decoder on CPU: some layers for some tokens, the LM head, and greedy loops over both.
// Built by build.py, called through ctypes by step.py. No global state but per-thread scratch memory.
#include "draft_exit.h"
#include "layer.h"
#include "probe.h"

namespace {

// Layers start..stop-1 on x (rows, hidden) in place.
template <typename P>
void run_layers(const Model& model, const CacheView& cache, const Pass& pass, int64_t start, int64_t stop, float* x,
                int64_t threads) {
  const Buffers<P> buffer(model, cache, pass, layer_scratch);
  with_team(threads, [&](const Team& team) {
    const TileShapes shapes(model.tiles, pass.rows == 1);
    for (int64_t index = start; index < stop; index++) layer_step<P>(model, cache, pass, index, x, buffer, team);
  });
}

// Final norm and LM head of x (rows, hidden). logits (rows, vocabulary) and tokens (rows) may each be null. Returns 0, or 1
// where there is no largest finite value.
template <typename P>
int64_t read_head(const Model& model, const float* x, int64_t rows, float* logits, int64_t* tokens, int64_t threads) {
  typedef typename P::input I;
  const int64_t size = model.vocabulary, hidden = model.hidden;
  const int64_t packed_size = model.tiles ? packed_input_size(rows, hidden) : 0;
  head_scratch.start((rows * hidden + packed_size) * sizeof(I) + (logits ? 0 : rows * size * sizeof(float)), 3);
  I *normed = head_scratch.take<I>(rows * hidden), *packed = head_scratch.take<I>(packed_size);
  float* out = logits ? logits : head_scratch.take<float>(rows * size);
  for (int64_t r = 0; r < rows; r++) norm<P>(model, x + r * hidden, model.final_norm, model.final_norm_bias, hidden, normed + r * hidden);
  with_team(threads, [&](const Team& team) {
    const TileShapes shapes(model.tiles, rows == 1);
    const Products<P> of_normed(model.tiles, normed, rows, hidden, packed, team);
    int64_t first, last;
    team.share(size, 16, first, last);
    of_normed.run(model.head, first, last, out, size);
  });
  int64_t bad = 0;
  if (tokens)
    for (int64_t r = 0; r < rows; r++) {
      tokens[r] = first_largest(out + r * size, size);
      bad |= tokens[r] < 0;
    }
  // Neither changes which logit is the largest.
  if (logits && model.logit_scale != 1.0f)
    for (int64_t i = 0; i < rows * size; i++) logits[i] = P::rounded(logits[i] * model.logit_scale);
  if (logits && model.logit_cap > 0.0f) soft_cap(logits, rows * size, model.logit_cap);
  return bad;
}

template <typename P>
void embed(const Model& model, int64_t token, float* x) {
  convert((const typename P::element*)model.embedding + token * model.hidden, x, model.hidden);
  if (model.embedding_scale != 1.0f)
    for (int64_t i = 0; i < model.hidden; i++) x[i] = P::rounded(x[i] * model.embedding_scale);
}

template <typename P>
int64_t run(const Model& model, const CacheView& cache, const Pass& pass, int64_t start, int64_t stop, const void* in,
            void* out, int64_t threads) {
  typedef typename P::element E;
  const int64_t count = pass.rows * model.hidden;
  loop_scratch.start(count * sizeof(float), 1);
  float* x = loop_scratch.take<float>(count);
  convert((const E*)in, x, count);
  run_layers<P>(model, cache, pass, start, stop, x, threads);
  convert(x, (E*)out, count);
  return 0;
}

template <typename P>
int64_t head(const Model& model, const void* in, int64_t rows, float* logits, int64_t* tokens, int64_t threads) {
  loop_scratch.start(rows * model.hidden * sizeof(float), 1);
  float* x = loop_scratch.take<float>(rows * model.hidden);
  convert((const typename P::element*)in, x, rows * model.hidden);
  return read_head<P>(model, x, rows, logits, tokens, threads);
}

// Up to `count` greedy steps of `batch` rows through layers 0..stop-1, from one token per row on; tokens is (batch, count).
// With `states` (batch, count + 1, hidden) each step's states are kept there and one more step runs for the states of the
// last tokens alone (the catch-up of a draft). With an `exit` its own way leads to the tokens, and `positions` are those of the first
// tokens that the late layers have not seen. A single row ends after a stop token. Returns the number of steps, or -1 on NaN.
template <typename P>
int64_t greedy_steps(const Model& model, const CacheView& cache, int64_t batch, const int64_t* given,
                     const int64_t* positions, int64_t stop, int64_t count, const int64_t* stop_tokens, int64_t stop_count,
                     int64_t* tokens, void* states, const DraftExit* exit, int64_t threads) {
  typedef typename P::element E;
  const int64_t hidden = model.hidden;
  loop_scratch.start(batch * (hidden * sizeof(float) + 2 * sizeof(int64_t)), 3);
  float* x = loop_scratch.take<float>(batch * hidden);
  int64_t *current = loop_scratch.take<int64_t>(batch), *places = loop_scratch.take<int64_t>(batch);
  std::copy(given, given + batch, current);
  bool ended = false;
  for (int64_t step = 0;; step++) {
    for (int64_t b = 0; b < batch; b++) {
      embed<P>(model, current[b], x + b * hidden);
      places[b] = positions[b] + step;
    }
    const Pass pass{batch, 1, places};
    run_layers<P>(model, cache, pass, 0, stop, x, threads);
    if (states) {
      for (int64_t b = 0; b < batch; b++) convert(x + b * hidden, (E*)states + (b * (count + 1) + step) * hidden, hidden);
      if (step == count || ended) return step;
    }
    const int64_t bad = exit ? read_draft_exit<P>(model, cache, pass, *exit, positions, x, nullptr, current, threads)
                             : read_head<P>(model, x, batch, nullptr, current, threads);
    if (bad) return -1;
    for (int64_t b = 0; b < batch; b++) tokens[b * count + step] = current[b];
    ended = batch == 1 && std::find(stop_tokens, stop_tokens + stop_count, current[0]) != stop_tokens + stop_count;
    if (!states && (step + 1 == count || ended)) return step + 1;
  }
}

template <typename P>
int64_t draft_exit(const Model& model, const CacheView& cache, const Pass& pass, const DraftExit& exit, const int64_t* since,
                   const void* in, float* logits, int64_t* tokens, int64_t threads) {
  loop_scratch.start(pass.rows * model.hidden * sizeof(float), 1);
  float* x = loop_scratch.take<float>(pass.rows * model.hidden);
  convert((const typename P::element*)in, x, pass.rows * model.hidden);
  return read_draft_exit<P>(model, cache, pass, exit, since, x, logits, tokens, threads);
}

// Layers start..L-1 on the given states, or on the embeddings of the given tokens, and the greedy token after each.
template <typename P>
int64_t greedy_after(const Model& model, const CacheView& cache, const Pass& pass, const int64_t* given, const void* states,
                     int64_t start, int64_t* tokens, int64_t threads) {
  const int64_t hidden = model.hidden;
  loop_scratch.start(pass.rows * hidden * sizeof(float), 1);
  float* x = loop_scratch.take<float>(pass.rows * hidden);
  if (states) convert((const typename P::element*)states, x, pass.rows * hidden);
  else
    for (int64_t r = 0; r < pass.rows; r++) embed<P>(model, given[r], x + r * hidden);
  run_layers<P>(model, cache, pass, start, model.layers, x, threads);
  return read_head<P>(model, x, pass.rows, nullptr, tokens, threads);
}

}  // namespace

#define BY_DTYPE(function, ...) (model->is_bf16 ? function<BFloat16>(*model, __VA_ARGS__) : function<Float32>(*model, __VA_ARGS__))

extern "C" {

int64_t telltale_has_threads() {
#if defined(_OPENMP)
  return 1;
#else
  return 0;
#endif
}

// 1 if the processor has matrix tiles and the system lets this process use them.
int64_t telltale_has_tiles() { return has_tiles(); }

// The order in which the values of matrices in 8 bits are taken, but for those that matrix tiles take: its number among ORDERS of
// int8_weights.py.
int64_t telltale_int8_order(int64_t is_bf16) {
#if defined(TELLTALE_AVX2)
  return is_bf16 ? 2 : 3;
#else
  (void)is_bf16;
  return 0;
#endif
}

// 1 if products of many input rows by vectors are made for this processor, and take no longer than PyTorch's.
int64_t telltale_has_wide_products() {
#if defined(TELLTALE_AVX2)
  return 1;
#else
  return 0;
#endif
}

// 0 if every kernel runs on this processor and a token's result does not depend on the width of its pass.
int64_t telltale_probe() {
  auto after = [](auto kind) {
    return [](const Model& model, const CacheView& cache, const Pass& pass, const int64_t* given, int64_t* tokens) {
      return greedy_after<decltype(kind)>(model, cache, pass, given, nullptr, 0, tokens, 1);
    };
  };
  for (bool plain : {true, false}) {
    if (!probe<Float32>(0, plain, false, after(Float32{})) || !probe<BFloat16>(1, plain, false, after(BFloat16{}))) return 1;
    if (has_tiles() && !probe<BFloat16>(1, plain, true, after(BFloat16{}))) return 1;
  }
  return 0;
}

int64_t telltale_run(const Model* model, const CacheView* cache, int64_t batch, int64_t width, const int64_t* positions,
                     int64_t start, int64_t stop, const void* in, void* out, const Blocks* blocks, int64_t threads) {
  const Pass pass{batch * width, width, positions, blocks};
  return BY_DTYPE(run, *cache, pass, start, stop, in, out, threads);
}

int64_t telltale_head(const Model* model, const void* in, int64_t rows, float* logits, int64_t* tokens, int64_t threads) {
  return BY_DTYPE(head, in, rows, logits, tokens, threads);
}

int64_t telltale_greedy_steps(const Model* model, const CacheView* cache, int64_t batch, const int64_t* given,
                              const int64_t* positions, int64_t stop, int64_t count, const int64_t* stop_tokens,
                              int64_t stop_count, int64_t* tokens, void* states, const DraftExit* exit, int64_t threads) {
  return BY_DTYPE(greedy_steps, *cache, batch, given, positions, stop, count, stop_tokens, stop_count, tokens, states, exit, threads);
}

int64_t telltale_draft_exit(const Model* model, const CacheView* cache, int64_t batch, int64_t width, const int64_t* positions,
                            const DraftExit* exit, const int64_t* since, const void* in, float* logits, int64_t* tokens,
                            int64_t threads) {
  const Pass pass{batch * width, width, positions};
  return BY_DTYPE(draft_exit, *cache, pass, *exit, since, in, logits, tokens, threads);
}

int64_t telltale_greedy_after(const Model* model, const CacheView* cache, int64_t batch, int64_t width,
                              const int64_t* positions, const int64_t* given, const void* states, int64_t start,
                              int64_t* tokens, int64_t threads) {
  const Pass pass{batch * width, width, positions};
  return BY_DTYPE(greedy_after, *cache, pass, given, states, start, tokens, threads);
}

// Compares the matrices with their short forms; from then on the short ones that hold the same numbers are read. Returns how many
// do not.
int64_t telltale_look_at_matrices(Model* model, int64_t threads) {
  return model->is_bf16 ? look_at_matrices<BFloat16>(*model, threads) : look_at_matrices<Float32>(*model, threads);
}

}  // extern "C"
