// Queries that read the same keys and values read them together: the tokens of a row, the candidates of a prompt, and the
// query heads of a kv head. Slots pass through the nearest cache once, a tile at a time, for all of them. Each query meets its
// slots in the order in which it would meet them alone, so its result has the same bits in any company.
#pragma once
#include "attention.h"
#include "model.h"

namespace {

constexpr int64_t most_readers = 16, tile_floats = 4096;

// One query head of one token. It sees positions first..last: below `cut` in the shared row, from there on in its own.
template <typename P>
struct Reader {
  const typename P::input* query;
  typename P::input* mixed;
  const typename P::element *own_keys, *own_values;
  int64_t first, last, cut;
  float* block;  // the weights of positions since..last go there, unless null
  int64_t since;
  float *scores, *chains, norm;
};

// Tokens of a pass in groups that read the same stored row: tokens[starts[g]..starts[g + 1] - 1].
struct Groups {
  int64_t count = 0, *tokens, *starts;

  static size_t bytes(int64_t rows) { return (2 * rows + 1) * sizeof(int64_t); }

  Groups(const CacheView& cache, const Pass& pass, Scratch& scratch)
      : tokens(scratch.take<int64_t>(pass.rows)), starts(scratch.take<int64_t>(pass.rows + 1)) {
    auto stored = [&](int64_t token) {
      const int64_t batch = pass.batch(token);
      return cache.shared(batch) ? std::make_pair(0, cache.prefix_rows[batch]) : std::make_pair(1, cache.own(batch));
    };
    for (int64_t r = 0; r < pass.rows; r++) tokens[r] = r;
    std::stable_sort(tokens, tokens + pass.rows, [&](int64_t a, int64_t b) { return stored(a) < stored(b); });
    for (int64_t r = 0; r < pass.rows; r++)
      if (r == 0 || stored(tokens[r]) != stored(tokens[r - 1])) starts[count++] = r;
    starts[count] = pass.rows;
  }
};

// Call body(reader, first slot, its number among the reader's slots, how many) for all slots of positions begin(reader) ..
// end(reader) - 1, of which `origin` stands at `slots`: tile by tile, all readers at each. Widen: readers that are several
// get float copies.
template <bool Widen, typename P, typename Begin, typename End, typename Body>
void sweep(const typename P::element* slots, int64_t origin, int64_t size, Reader<P>* readers, int64_t count, float* wide,
           const Begin& begin, const End& end, const Body& body) {
  int64_t low = INT64_MAX, high = 0;
  for (Reader<P>* r = readers; r < readers + count; r++)
    if (begin(*r) < end(*r)) low = std::min(low, begin(*r)), high = std::max(high, end(*r));
  const int64_t tile = count == 1 ? high : std::max<int64_t>(16, tile_floats / size / 16 * 16);
  for (int64_t start = low, stop; start < high; start = stop) {
    stop = std::min(high, (start / tile + 1) * tile);
    const int64_t pace = stop < high ? size * sizeof(*slots) / count : 0;
    auto serve = [&](const auto* here) {
      for (Reader<P>* r = readers; r < readers + count; r++) {
        const int64_t from = std::max(start, begin(*r)), to = std::min(stop, end(*r));
        const Ahead ahead{(const char*)(slots + (stop - origin) * size) + (r - readers) * tile * pace, pace};
        if (from < to) body(*r, here + (from - start) * size, from - r->first, to - from, ahead);
      }
    };
    const auto* here = slots + (start - origin) * size;
    if constexpr (Widen)
      if (count > 1) {
        convert(here, wide, (stop - start) * size);
        serve((const float*)wide);
        continue;
      }
    serve(here);
  }
}

// sweep() over the shared row, if there is one, and over each run of readers with the same own row.
template <bool Widen, typename P, typename Own, typename Body>
void sweep_all(const typename P::element* shared, const Own& own, int64_t size, Reader<P>* readers, int64_t count, float* wide,
               const Body& body) {
  if (shared)
    sweep<Widen>(shared, 0, size, readers, count, wide, [](const Reader<P>& r) { return r.first; },
                 [](const Reader<P>& r) { return std::min(r.cut, r.last + 1); }, body);
  for (int64_t i = 0, next; i < count; i = next) {
    for (next = i + 1; next < count && own(readers[next]) == own(readers[i]);) next++;
    sweep<Widen>(own(readers[i]), readers[i].cut, size, readers + i, next - i, wide,
                 [](const Reader<P>& r) { return std::max(r.first, r.cut); }, [](const Reader<P>& r) { return r.last + 1; },
                 body);
  }
}

// Attention of all readers, which have the shared row in common; readers of the same own row stand side by side.
template <typename P>
void attend(const Model& model, const typename P::element* shared_keys, const typename P::element* shared_values,
            Reader<P>* readers, int64_t count) {
  typedef Reader<P> R;
  const int64_t size = model.head_dim, chain = 4 * chain_size(size);
  int64_t longest = 0;
  for (R* r = readers; r < readers + count; r++) longest = std::max(longest, r->last - r->first + 1);
  const int64_t row = (longest + 31) / 16 * 16, wide_size = std::max(tile_floats, 16 * size);
  score_scratch.start((count * (row + chain) + wide_size) * sizeof(float), 3);
  float *scores = score_scratch.take<float>(count * row), *chains = score_scratch.take<float>(count * chain);
  float* wide = score_scratch.take<float>(wide_size);
  for (int64_t i = 0; i < count; i++) readers[i].scores = scores + i * row, readers[i].chains = chains + i * chain;

  sweep_all<P::widens_keys>(
      shared_keys, [](const R& r) { return r.own_keys; }, size, readers, count, wide,
      [&](R& reader, const auto* keys, int64_t index, int64_t number, const Ahead& ahead) {
        score_slots<P>(reader.query, keys, size, number, model.attention_scale, reader.scores + index, ahead);
      });
  for (R* r = readers; r < readers + count; r++) {
    if (model.attention_cap > 0.0f) soft_cap(r->scores, r->last - r->first + 1, model.attention_cap);
    r->norm = soften(r->scores, r->last - r->first + 1);
    if (r->block)
      for (int64_t t = std::max(r->first, r->since); t <= r->last; t++)
        r->block[t - r->since] = r->scores[t - r->first] * r->norm;
  }
  std::fill(chains, chains + count * chain, 0.0f);
  sweep_all<sizeof(typename P::element) != sizeof(float)>(
      shared_values, [](const R& r) { return r.own_values; }, size, readers, count, wide,
      [&](R& reader, const auto* values, int64_t index, int64_t number, const Ahead& ahead) {
        mix_slots(values, size, index, number, reader.scores + index, reader.chains, ahead);
      });
  for (R* r = readers; r < readers + count; r++) finish<P>(r->chains, size, r->norm, r->mixed);
}

}  // namespace
