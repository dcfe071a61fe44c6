// Matrices that are kept in 8 bits as well: 32 weights side by side in a row share a scale, and each is scale * value, rounded to
// the model's dtype. The model's own matrix holds these very numbers, so a product that reads the short form makes them in
// registers and goes on as one that reads the long form: its result has the same bits, at any width and on any processor.
// Four rows lie together, group by group, so that they are read in the order of their addresses. Where products go by matrix tiles
// it is sixteen rows, in an order of their own (see Widening), but for rows at the end that fill no tile. Processors with AVX2 take
// the values of a group in an order of theirs (see packed_avx2.h).
#pragma once
#include "model.h"
#include "products.h"
#include "tiles.h"

namespace {

constexpr int64_t group_size = 32, packed_rows = 4, packed_ahead = 4096, tiled_ahead = 2048, compared_ahead = 8192;

inline int64_t groups_of(int64_t depth) { return (depth + group_size - 1) / group_size; }

// Numbers in half precision that are not negative, sixteen at once. Those below 2^-14 never pass through a denormal float, which a
// thread may be set to take for zero.
inline f16 from_half(const uint16_t* p) {
#if defined(TELLTALE_AVX2) && defined(__F16C__)
  const __m128i* halves = (const __m128i*)p;
  const f8 low = (f8)_mm256_cvtph_ps(_mm_loadu_si128(halves)), high = (f8)_mm256_cvtph_ps(_mm_loadu_si128(halves + 1));
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#endif
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

#if defined(TELLTALE_AVX2)

}  // namespace
#include "packed_avx2.h"
namespace {

#else

// Outputs of four weight rows for M rows: block() of products.h, whose order of additions it has.
template <typename P, int M>
[[gnu::noinline]] void packed_block(PackedRows w, const typename P::input* x, int64_t depth, const typename P::element* bias,
                                    float* y, int64_t y_stride) {
  typename P::sums sums[packed_rows][M];
#pragma GCC unroll 4
  for (int n = 0; n < packed_rows; n++) {
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) sums[n][m] = typename P::sums{};
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

#endif

#if defined(TELLTALE_TILES)

// Sixteen rows lie together for tiles, group by group: their pairs of neighbours side by side, (groups, 16 pairs, 16 rows, 2), each
// value v as v + 128. So they come out as the second factor of a product of tiles, of which the first is the input as it lies.
constexpr int64_t tile_bytes = tile_side * group_size;

// What makes bfloat16 of a tile: byte v + 128 becomes the float 2^15 + v + 128 by its place in the mantissa.
struct Widening {
  const __m512i base = _mm512_set1_epi32(0x47000000);
  __m512i places[4];
  Widening() {
    alignas(64) uint8_t bytes[64];
    for (int part = 0; part < 4; part++) {
      for (int i = 0; i < 64; i++) bytes[i] = (uint8_t)(part * 16 + i / 4);
      places[part] = _mm512_load_si512(bytes);
    }
  }

  // The numbers of a tile as BFloat16::widened() makes them. `scales`: in half precision, in the order in which unpacking makes
  // neighbours of them. A scale times -(2^15 + 128) is exact as a float, and so is a number before it is rounded to bfloat16.
  inline void tile(const int8_t* values, const uint16_t* scales, bf16* out) const {
    const __m512 own = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)scales));
    const __m512 scale[2] = {_mm512_unpacklo_ps(own, own), _mm512_unpackhi_ps(own, own)};
    const __m512 offset = _mm512_set1_ps(-32896.0f);
    const __m512 lower[2] = {_mm512_mul_ps(scale[0], offset), _mm512_mul_ps(scale[1], offset)};
#pragma GCC unroll 8
    for (int line = 0; line < 8; line++) {
      const __m512i bytes = _mm512_loadu_si512(values + line * 64);
      auto made = [&](int part) {
        const __m512i number = _mm512_mask_permutexvar_epi8(base, 0x2222222222222222, places[part], bytes);
        return _mm512_fmadd_ps((__m512)number, scale[part % 2], lower[part % 2]);
      };
      _mm512_storeu_si512(out + line * 64, (__m512i)_mm512_cvtne2ps_pbh(made(1), made(0)));
      _mm512_storeu_si512(out + line * 64 + 32, (__m512i)_mm512_cvtne2ps_pbh(made(3), made(2)));
    }
  }
};

template <int Place>
inline void multiply_tile(const bf16* weights) {
  if constexpr (Place % 2 == 0) _tile_loadd(4, weights, 64);
  else _tile_loadd(5, weights, 64);
  if constexpr (Place == 0) _tile_dpbf16ps(0, 6, 4);
  if constexpr (Place == 1) _tile_dpbf16ps(1, 6, 5);
  if constexpr (Place == 2) _tile_dpbf16ps(2, 6, 4);
  if constexpr (Place == 3) _tile_dpbf16ps(3, 6, 5);
}

// Outputs first, first + 1, ... of `turns` tiles of rows at each of Places places, for up to 16 rows of input. Tiles of weights are
// multiplied a step after they were made: by then they have arrived where tiles are loaded from.
template <int Places>
[[gnu::noinline]] void packed_tiles(const Matrix& matrix, const bf16* x, int64_t rows, int64_t depth, int64_t first, int64_t turns,
                                    float* y, int64_t y_stride) {
  constexpr int64_t made_size = tile_side * tile_depth, sum_size = tile_side * tile_side;
  alignas(64) bf16 made[2][Places][made_size];
  alignas(64) float sums[Places][sum_size];
  const int64_t groups = groups_of(depth), apart = turns * tile_side * groups;  // in groups of a row
  const Widening widening;
  auto multiply = [&](int64_t group) {
    _tile_loadd(6, x + group * tile_depth, depth * (int64_t)sizeof(bf16));
    auto& weights = made[group % 2];
    multiply_tile<0>(weights[0]);
    if constexpr (Places > 1) multiply_tile<1>(weights[1]), multiply_tile<2>(weights[2]), multiply_tile<3>(weights[3]);
  };
  for (int64_t turn = 0; turn < turns; turn++) {
    const int64_t n = first + turn * tile_side;
    _tile_zero(0);
    if constexpr (Places > 1) {
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t group = 0; group < groups; group++) {
      const int64_t at = n * groups + group * tile_side;
#pragma GCC unroll 4
      for (int64_t place = 0; place < Places; place++) {
        const int8_t* values = matrix.values + (at + place * apart) * group_size;
        const uint16_t* scales = matrix.scales + at + place * apart;
#pragma GCC unroll 8
        for (int64_t line = 0; line < tile_bytes; line += 64) __builtin_prefetch(values + tiled_ahead + line);
        __builtin_prefetch(scales + tiled_ahead / group_size);
        widening.tile(values, scales, made[group % 2][place]);
      }
      settle();
      if (group > 0) multiply(group - 1);
      settle();
    }
    multiply(groups - 1);
    _tile_stored(0, sums[0], 64);
    if constexpr (Places > 1) {
      _tile_stored(1, sums[1], 64);
      _tile_stored(2, sums[2], 64);
      _tile_stored(3, sums[3], 64);
    }
    settle();
    for (int64_t place = 0; place < Places; place++) {
      const int64_t output = n + place * turns * tile_side;
      const f16 more = matrix.bias ? load((const bf16*)matrix.bias + output) : f16{};
      for (int64_t row = 0; row < rows; row++)
        store(y + row * y_stride + output, round_bf16(load(sums[place] + row * tile_side) + more));
    }
  }
}

// tile_product() from the short form where that is good. Weights are read from four places in turn.
inline void matrix_product_by_tiles(const Matrix& matrix, const bf16* x, const bf16* packed, int64_t rows, int64_t depth,
                                    int64_t first, int64_t last, float* y, int64_t y_stride) {
  if (!matrix.intact || rows > tile_side)
    return tile_product(matrix.weights, matrix.bias, x, packed, rows, depth, first, last, y, y_stride);
  static_assert(group_size == tile_depth, "a group is a row of a tile");
  int64_t n = first;
  const int64_t whole = first + (last - first) / tile_side * tile_side;
  if (n < whole) {
    const TileShapes shapes(rows);
    for (int64_t tiles; (tiles = (whole - n) / tile_side) >= 4;) {
      const int64_t turns = spread(tiles / 4);
      packed_tiles<4>(matrix, x, rows, depth, n, turns, y, y_stride);
      n += 4 * turns * tile_side;
    }
    if (n < whole) packed_tiles<1>(matrix, x, rows, depth, n, (whole - n) / tile_side, y, y_stride);
  }
  if (whole < last) matrix_product<BFloat16>(matrix, x, rows, depth, whole, last, y, y_stride);
}

// same_numbers() of whole tiles.
inline bool same_tiles(const Matrix& matrix, int64_t depth, int64_t first, int64_t last) {
  alignas(64) bf16 made[tile_side * tile_depth];
  const Widening widening;
  const int64_t groups = groups_of(depth);
  __m512i differs = _mm512_setzero_si512();
  for (int64_t n = first; n < last; n += tile_side) {
    const bf16* own = (const bf16*)matrix.weights + n * depth;
    for (int64_t group = 0; group < groups; group++) {
      const int64_t at = n * groups + group * tile_side;
      widening.tile(matrix.values + at * group_size, matrix.scales + at, made);
      __m512 rows[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) rows[i] = _mm512_load_ps((const float*)(made + i * tile_depth));
      transpose(rows);
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) {
        __builtin_prefetch((const char*)own + (group * tile_side + i) * 64 + compared_ahead);
        const __m512i given = _mm512_loadu_si512(own + i * depth + group * tile_depth);
        differs = _mm512_or_si512(differs, _mm512_xor_si512((__m512i)rows[i], given));
      }
    }
    if (_mm512_test_epi32_mask(differs, differs)) return false;
  }
  return true;
}

#endif

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
      const auto& [matrix, rows, depth] = items[i];
      int64_t first, last;
      team.share(rows, tile_side, first, last);
      bool same = true;
#if defined(TELLTALE_TILES)
      if constexpr (std::is_same<P, BFloat16>::value)
        if (model.tiles && fits_tiles(depth)) {
          const int64_t whole = first + (last - first) / tile_side * tile_side;
          same = same_tiles(*matrix, depth, first, whole), first = whole;
        }
#endif
      differs[i * threads + team.index] = !(same && same_numbers<P>(*matrix, depth, first, last));
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
