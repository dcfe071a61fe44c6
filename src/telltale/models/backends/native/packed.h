// Matrices that are kept in 8 bits as well: 32 weights side by side in a row share a scale, and each is scale * value, rounded to
// the model's dtype. The model's own matrix holds these very numbers, so a product that reads the short form makes them in
// registers and goes on as one that reads the long form: its result has the same bits, at any width and on any processor.
// Four rows lie together, group by group, so that they are read in the order of their addresses.
#pragma once
#include "model.h"
#include "products.h"
#include "tiles.h"

namespace {

constexpr int64_t group_size = 32, packed_rows = 4, packed_ahead = 4096, tiled_ahead = 1024, compared_ahead = 8192;

inline int64_t groups_of(int64_t depth) { return (depth + group_size - 1) / group_size; }

// Numbers in half precision that are not negative, sixteen at once. Those below 2^-14 never pass through a denormal float, which a
// thread may be set to take for zero.
inline f16 from_half(const uint16_t* p) {
  h16 bits;
  memcpy(&bits, p, sizeof bits);
  const u16 wide = __builtin_convertvector(bits, u16) << 13;
  const f16 small = (f16)(wide + 0x38800000u) - 0x1p-14f;
  return wide < 0x00800000u ? small : (f16)(wide + 0x38000000u);
}

// Four rows of a matrix: values (groups, 4, 32), and their scales (groups, 4) as float.
struct PackedRows {
  const int8_t* values;
  const float* scales;
};

// Outputs of four weight rows for M rows: block() of products.h, whose order of additions it has.
template <typename P, int M>
[[gnu::noinline]] void packed_block(PackedRows w, const typename P::input* x, int64_t depth, const typename P::element* bias,
                                    float* y, int64_t y_stride) {
  f16 sums[packed_rows][M];
#pragma GCC unroll 4
  for (int n = 0; n < packed_rows; n++) {
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) sums[n][m] = f16{};
  }
  auto piece = [&](int64_t k, auto fetch) {
    typename P::chunk chunks[packed_rows];
    const int8_t* values = w.values + k / group_size * (packed_rows * group_size) + k % group_size;
#pragma GCC unroll 4
    for (int n = 0; n < packed_rows; n++)
      chunks[n] = P::widened(values + n * group_size, w.scales[k / group_size * packed_rows + n]);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      typename P::chunk input = fetch(x + m * depth + k);
#pragma GCC unroll 4
      for (int n = 0; n < packed_rows; n++) sums[n][m] = P::accumulate(sums[n][m], chunks[n], input);
    }
  };
  int64_t k = 0;
  for (; k + P::lanes <= depth; k += P::lanes) {
    const int8_t* ahead = w.values + k * packed_rows + packed_ahead;
    __builtin_prefetch(ahead);
    if (P::lanes == group_size) __builtin_prefetch(ahead + 64);
    piece(k, [](const typename P::input* p) { return P::fetch(p); });
  }
  if (k < depth) piece(k, [&](const typename P::input* p) { return P::fetch_part(p, depth - k); });
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) {
    f4 result = sum4(sums[0][m], sums[1][m], sums[2][m], sums[3][m]);
    if (bias) result += load4(bias);
    result = P::rounded(result);
    memcpy(y + m * y_stride, &result, sizeof result);
  }
}

// The four rows as the model has them, (4, depth).
template <typename Element>
void widen(PackedRows w, int64_t depth, Element* out) {
  for (int64_t k = 0; k < depth; k += 16) {
    const int8_t* values = w.values + k / group_size * (packed_rows * group_size) + k % group_size;
    __builtin_prefetch(values + packed_ahead);
    for (int n = 0; n < packed_rows; n++) {
      const f16 made = load(values + n * group_size) * w.scales[k / group_size * packed_rows + n];
      if (k + 16 <= depth) store(out + n * depth + k, made);
      else store_part(out + n * depth + k, made, depth - k);
    }
  }
}

// Calls body(first row, four rows) for all rows from `first`, a multiple of four, to `last` - 1.
template <typename Body>
void each_packed(const Matrix& matrix, int64_t depth, int64_t first, int64_t last, float* scales, const Body& body) {
  const int64_t groups = groups_of(depth), count = packed_rows * groups;
  for (int64_t n = first; n < last; n += packed_rows) {
    const uint16_t* halves = matrix.scales + n * groups;
    for (int64_t i = 0; i < count; i += 16) store(scales + i, from_half(halves + i));  // up to 15 more lie behind the last
    if (!body(n, PackedRows{matrix.values + n * groups * group_size, scales})) return;
  }
}

// product() of products.h, from the short form of the matrix where that is good. It is made once for each group of input rows, so
// from the second group on the long form takes less time.
template <typename P>
void matrix_product(const Matrix& matrix, const typename P::input* x, int64_t rows, int64_t depth, int64_t first, int64_t last,
                    float* y, int64_t y_stride) {
  typedef typename P::element E;
  if (!matrix.intact || rows > group_rows) return product<P>(matrix.weights, matrix.bias, x, rows, depth, first, last, y, y_stride);
  const int64_t scale_count = packed_rows * groups_of(depth) + 16;
  product_scratch.start(scale_count * sizeof(float) + packed_rows * depth * sizeof(E), 2);
  float* scales = product_scratch.take<float>(scale_count);
  E* wide = product_scratch.take<E>(packed_rows * depth);
  each_packed(matrix, depth, first, last, scales, [&](int64_t n, PackedRows w) {
    const E* bias = matrix.bias ? (const E*)matrix.bias + n : nullptr;
    float* out = y + n;
    switch (n + packed_rows <= last ? rows : 0) {
      case 1: packed_block<P, 1>(w, x, depth, bias, out, y_stride); break;
      case 2: packed_block<P, 2>(w, x, depth, bias, out, y_stride); break;
      case 3: packed_block<P, 3>(w, x, depth, bias, out, y_stride); break;
      case 4: packed_block<P, 4>(w, x, depth, bias, out, y_stride); break;
      case 5: packed_block<P, 5>(w, x, depth, bias, out, y_stride); break;
      case 6: packed_block<P, 6>(w, x, depth, bias, out, y_stride); break;
      default:  // the last rows, which are no four
        widen(w, depth, wide);
        product<P>(wide, bias, x, rows, depth, 0, std::min(packed_rows, last - n), out, y_stride);
    }
    return true;
  });
}

#if defined(TELLTALE_TILES)

// What makes floats of 64 values: byte v + 128 becomes the float 2^15 + v + 128 by its place in the mantissa.
struct Widening {
  const __m512i bias = _mm512_set1_epi8(-128), base = _mm512_set1_epi32(0x47000000);
  __m512i places[4];
  Widening() {
    alignas(64) uint8_t bytes[64];
    for (int part = 0; part < 4; part++) {
      for (int i = 0; i < 64; i++) bytes[i] = (uint8_t)(part * 16 + i / 4);
      places[part] = _mm512_load_si512(bytes);
    }
  }

  // BFloat16::widened() of two groups side by side. `scale`: of each, and behind `lower` its product with -(2^15 + 128); as a float
  // that is exact, and so is the number before it is rounded to bfloat16.
  void two_groups(const int8_t* values, const float* scale, const float* lower, bf16* first, bf16* second) const {
    const __m512i both = _mm512_xor_si512(_mm512_loadu_si512(values), bias);
    auto made = [&](int part) {
      const __m512i number = _mm512_mask_permutexvar_epi8(base, 0x2222222222222222, places[part], both);
      return _mm512_fmadd_ps((__m512)number, _mm512_set1_ps(scale[part / 2]), _mm512_set1_ps(lower[part / 2]));
    };
    _mm512_storeu_si512(first, (__m512i)_mm512_cvtne2ps_pbh(made(1), made(0)));
    _mm512_storeu_si512(second, (__m512i)_mm512_cvtne2ps_pbh(made(3), made(2)));
  }
};

// tile_product() from the short form where that is good: sixteen rows are made at a time, four each from four places.
inline void matrix_product_by_tiles(const Matrix& matrix, const bf16* x, const bf16* packed, int64_t rows, int64_t depth,
                                    int64_t first, int64_t last, float* y, int64_t y_stride) {
  if (!matrix.intact || rows > tile_side)
    return tile_product(matrix.weights, matrix.bias, x, packed, rows, depth, first, last, y, y_stride);
  static_assert(group_size == tile_depth, "a group is a row of a tile");
  constexpr int64_t places = tile_side / packed_rows, ring = 8, delay = 4, size = tile_side * tile_side;
  const int64_t groups = groups_of(depth), scale_count = packed_rows * groups + 16;
  product_scratch.start((2 * places * scale_count) * sizeof(float) + ring * tile_side * tile_depth * sizeof(bf16), 3);
  float *scales = product_scratch.take<float>(places * scale_count), *lowers = product_scratch.take<float>(places * scale_count);
  bf16* wide = product_scratch.take<bf16>(ring * tile_side * tile_depth);
  const bf16 *input = rows == 1 ? x : packed, *bias = (const bf16*)matrix.bias;
  const int64_t stride = pair_stride(rows);
  const Widening widening;
  auto tile = [&](int64_t n, int64_t apart, float* out) {
    for (int64_t place = 0; place < places; place++)
      for (int64_t i = 0; i < packed_rows * groups; i += 16) {  // up to 15 more lie behind the last
        const f16 own = from_half(matrix.scales + (n + place * apart) * groups + i);
        store(scales + place * scale_count + i, own), store(lowers + place * scale_count + i, own * -32896.0f);
      }
    _tile_zero(0);
    // A tile is multiplied some steps after it was made: by then its rows have arrived where tiles are loaded from.
    for (int64_t step = 0; step < groups + delay; step++) {
      bf16* made = wide + step % ring * tile_side * tile_depth;
      for (int64_t place = 0; place < (step < groups ? places : 0); place++) {
        const int8_t* values = matrix.values + ((n + place * apart) * groups + step * packed_rows) * group_size;
        const int64_t at = place * scale_count + step * packed_rows;
        bf16* out = made + place * packed_rows * tile_depth;
        __builtin_prefetch(values + tiled_ahead), __builtin_prefetch(values + tiled_ahead + 64);
        widening.two_groups(values, scales + at, lowers + at, out, out + tile_depth);
        widening.two_groups(values + 2 * group_size, scales + at + 2, lowers + at + 2, out + 2 * tile_depth, out + 3 * tile_depth);
      }
      settle();
      if (const int64_t group = step - delay; group >= 0) {
        _tile_loadd(4, wide + group % ring * tile_side * tile_depth, 64);
        _tile_loadd(6, input + group * tile_side * stride / (int64_t)sizeof(bf16), stride);
        _tile_dpbf16ps(0, 4, 6);
      }
    }
    _tile_stored(0, out, stride);
    settle();
  };
  const int64_t whole = first + (last - first) / tile_side * tile_side;
  // Sums of several input rows are kept until there are 16 neighbours.
  auto spread_tiles = [&](int64_t begin, int64_t turns, int64_t apart) {
    alignas(64) float sums[places * size];
    for (int64_t turn = 0; turn < turns; turn++) {
      const int64_t n = begin + turn * packed_rows, kept = rows == 1 ? 0 : turn % places;
      tile(n, apart, sums + kept * size);
      if (rows > 1 && kept + 1 < places && turn + 1 < turns) continue;
      for (int64_t place = 0; place < places; place++) {
        const int64_t output = n - kept * packed_rows + place * apart;
        const bf16* own = bias ? bias + output : nullptr;
        if (rows == 1) keep_lone(sums + place * packed_rows, packed_rows, 1, own, y + output);
        else
          keep_adjacent((kept + 1) * packed_rows, [&](int i) {
            return sums + i / packed_rows * size + (place * packed_rows + i % packed_rows) * tile_side;
          }, rows, own, y + output, y_stride);
      }
    }
  };
  const int64_t turns = spread((whole - first) / tile_side);
  spread_tiles(first, turns, packed_rows * turns);
  for (int64_t n = first + tile_side * turns; n < whole; n += tile_side) spread_tiles(n, 1, packed_rows);
  if (whole < last) matrix_product<BFloat16>(matrix, x, rows, depth, whole, last, y, y_stride);
}

#endif

// Whether rows first..last-1 of the model's matrix are the numbers that the short form gives, to the bit.
template <typename P>
bool same_numbers(const Matrix& matrix, int64_t depth, int64_t first, int64_t last) {
  typedef typename P::element E;
  const int64_t scale_count = packed_rows * groups_of(depth) + 16;
  product_scratch.start(scale_count * sizeof(float), 1);
  float* scales = product_scratch.take<float>(scale_count);
  u16 differs = {};
  each_packed(matrix, depth, first, last, scales, [&](int64_t n, PackedRows w) {
    const E* own = (const E*)matrix.weights + n * depth;
    auto piece = [&](int64_t k, int64_t rows, int64_t lanes) {
      const int8_t* values = w.values + k / group_size * (packed_rows * group_size) + k % group_size;
      if (k % group_size == 0) __builtin_prefetch(values + packed_ahead), __builtin_prefetch(values + packed_ahead + 64);
#pragma GCC unroll 4
      for (int64_t i = 0; i < rows; i++) {
        __builtin_prefetch((const char*)(own + k * packed_rows + i * 16) + compared_ahead);
        f16 made = P::rounded(load(values + i * group_size) * w.scales[k / group_size * packed_rows + i]);
        if (lanes < 16) made = load_part((const float*)&made, lanes);
        const E* given = own + i * depth + k;
        differs |= (u16)made ^ (u16)(lanes < 16 ? load_part(given, lanes) : load(given));
      }
    };
    const int64_t rows = std::min(packed_rows, last - n);
    int64_t k = 0;
    for (; k + 16 <= depth; k += 16) {
      if (rows == packed_rows) piece(k, packed_rows, 16);
      else piece(k, rows, 16);
    }
    if (k < depth) piece(k, rows, depth - k);
    for (int lane = 1; lane < 16; lane++) differs[0] |= differs[lane];
    return differs[0] == 0;
  });
  return differs[0] == 0;
}

// Compares every matrix that has a short form with it, and notes where that is still good. Returns how many are not.
template <typename P>
int64_t look_at_matrices(Model& model, int64_t threads) {
  struct Item { Matrix* matrix; int64_t rows, depth; };
  std::vector<Item> items;
  const int64_t hidden = model.hidden, wide = model.feed_forward;
  const int64_t query_size = model.heads * model.head_dim, kv_size = model.kv_heads * model.head_dim;
  auto add = [&](Matrix& matrix, int64_t rows, int64_t depth) {
    if (matrix.values) items.push_back({&matrix, rows, depth});
  };
  for (int64_t index = 0; index < model.layers; index++) {
    Layer& layer = model.layer[index];
    add(layer.query, query_size, hidden), add(layer.key, kv_size, hidden), add(layer.value, kv_size, hidden);
    add(layer.output, hidden, query_size), add(layer.gate, wide, hidden), add(layer.up, wide, hidden), add(layer.down, hidden, wide);
  }
  add(model.head, model.vocabulary, hidden);
  std::vector<char> differs(items.size() * std::max<int64_t>(1, threads));
  with_team(threads, [&](const Team& team) {
    for (size_t i = 0; i < items.size(); i++) {
      int64_t first, last;
      team.share(items[i].rows, packed_rows, first, last);
      differs[i * threads + team.index] = !same_numbers<P>(*items[i].matrix, items[i].depth, first, last);
    }
  });
  int64_t changed = 0;
  for (size_t i = 0; i < items.size(); i++) {
    const auto own = differs.begin() + i * threads;
    items[i].matrix->intact = std::find(own, own + threads, 1) == own + threads;
    changed += !items[i].matrix->intact;
  }
  return changed;
}

}  // namespace
