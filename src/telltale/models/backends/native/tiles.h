// Products in bfloat16 on a processor with matrix tiles (AMX). A tile holds 16 weight rows as they lie in memory, so weights are
// read in place and once; what is put in another order is the input, which is small. A sum runs over tiles in an order of its own:
// other bits than product() has, but the same ones whatever the width of a pass and the number of threads, since a pass over one
// token goes this way as well. Only the depth and the number of a matrix's rows decide which outputs do.
#pragma once
#include "model.h"
#include "products.h"
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512VBMI__) && defined(__linux__)
#define TELLTALE_TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t tile_side = 16, tile_depth = 32;  // rows of weights or of input in a tile, and their elements

constexpr int64_t narrow_ahead = 512;  // bytes
constexpr int64_t fetched_places = 8;
constexpr int64_t chains_below = 512;  // depth of a product that is too short for one chain of tiles to be worth its beginning

inline bool fits_tiles(int64_t depth) { return depth % tile_depth == 0; }

inline int64_t tiles_of(int64_t rows) { return (rows + tile_side - 1) / tile_side; }

// Elements that the packed input of so many rows takes.
inline int64_t packed_input_size(int64_t rows, int64_t depth) { return tiles_of(rows) * tile_side * depth; }

#if defined(TELLTALE_TILES)

// Whether the system lets this process use the tiles. It has to be asked once, before the first thread does. The answer may change
// (it is no while a thread has a small stack for signals), and two decoders of one process should have the same bits: the first
// one counts.
inline bool has_tiles() {
  constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool allowed = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  return allowed;
}

// The compiler is not told that instructions of tiles read and write memory: what was written is there before this, what is read
// after it is what they have written.
inline void settle() { asm volatile("" ::: "memory"); }

// The tiles' shapes for the thread that holds it; PyTorch's kernels have shapes of their own, which they find again.
class TileShapes {
 public:
  // Weights in tiles 4 and 5, input and output in the others. `narrow`: these are of one token.
  TileShapes(bool wanted, bool narrow) : wanted_(wanted) {
    if (wanted) start([&](int tile) { return !narrow || tile == 4 || tile == 5 ? 64 : 4; }, [](int) { return tile_side; });
  }
  // Weights in tiles 4 and 5 in the other order, pairs of elements side by side; the others hold rows of input and output.
  explicit TileShapes(int64_t rows) : wanted_(true) {
    start([](int) { return 64; }, [&](int tile) { return tile == 4 || tile == 5 ? tile_side : rows; });
  }
  ~TileShapes() {
    if (!wanted_) return;
    if (before_.palette) _tile_loadconfig(&before_);
    else _tile_release();
  }

 private:
  struct alignas(64) Shapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  template <typename Bytes, typename Rows>
  void start(const Bytes& bytes, const Rows& rows) {
    _tile_storeconfig(&before_);
    settle();
    Shapes own{};
    own.palette = 1;
    for (int tile = 0; tile < 8; tile++) own.row_bytes[tile] = bytes(tile), own.rows[tile] = (uint8_t)rows(tile);
    settle();
    _tile_loadconfig(&own);
  }
  Shapes before_{};
  bool wanted_;
};

inline void transpose(__m512* r) {
  __m512 t[16], u[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    auto pair = [&](int at) { return (__m512d)t[i + at]; };
    u[i] = (__m512)_mm512_unpacklo_pd(pair(0), pair(2)), u[i + 1] = (__m512)_mm512_unpackhi_pd(pair(0), pair(2));
    u[i + 2] = (__m512)_mm512_unpacklo_pd(pair(1), pair(3)), u[i + 3] = (__m512)_mm512_unpackhi_pd(pair(1), pair(3));
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    const __m512 even = _mm512_shuffle_f32x4(u[j], u[4 + j], 0x88), odd = _mm512_shuffle_f32x4(u[j], u[4 + j], 0xdd);
    const __m512 even2 = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0x88), odd2 = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0xdd);
    r[j] = _mm512_shuffle_f32x4(even, even2, 0x88), r[8 + j] = _mm512_shuffle_f32x4(even, even2, 0xdd);
    r[4 + j] = _mm512_shuffle_f32x4(odd, odd2, 0x88), r[12 + j] = _mm512_shuffle_f32x4(odd, odd2, 0xdd);
  }
}

// Input (rows, depth) as tiles take it: for 16 rows and 32 elements, pairs of neighbours of all rows side by side, (16 pairs, 16
// rows). This member of the team packs its share; rows beyond the last are zero.
inline void pack_input(const bf16* x, int64_t rows, int64_t depth, bf16* packed, const Team& team) {
  const int64_t steps = depth / tile_depth;
  int64_t first, last;
  team.share(tiles_of(rows) * steps, 1, first, last);
  for (int64_t unit = first; unit < last; unit++) {
    const int64_t row = unit / steps * tile_side, k = unit % steps * tile_depth;
    __m512 block[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
      block[i] = row + i < rows ? (__m512)_mm512_loadu_si512(x + (row + i) * depth + k) : _mm512_setzero_ps();
    transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) _mm512_storeu_si512(packed + unit * tile_side * tile_depth + i * tile_depth, (__m512i)block[i]);
  }
}

// N by M tiles of outputs, (N, M, 16 weight rows, 16 input rows). From the weight rows behind these, `per_step` lines for each step
// are fetched for later, from `line` on, in turn from several places.
template <int N, int M>
[[gnu::noinline]] void tile_block(const bf16* w, const bf16* x, int64_t depth, float* out, int64_t line, int64_t per_step) {
  const char* ahead = (const char*)(w + N * tile_side * depth);
  const int64_t part = N * tile_side * depth * (int64_t)sizeof(bf16) / fetched_places;
  settle();
  _tile_zero(0);
  if constexpr (M > 1) _tile_zero(1);
  if constexpr (N > 1) _tile_zero(2);
  if constexpr (N > 1 && M > 1) _tile_zero(3);
  const int64_t stride = depth * sizeof(bf16);
  for (int64_t k = 0; k < depth; k += tile_depth) {
    _tile_loadd(4, w + k, stride);
    if constexpr (N > 1) _tile_loadd(5, w + tile_side * depth + k, stride);
    _tile_loadd(6, x + k * tile_side, 64);
    if constexpr (M > 1) _tile_loadd(7, x + (depth + k) * tile_side, 64);
    for (const int64_t stop = line + per_step; line < stop; line++)
      __builtin_prefetch(ahead + line % fetched_places * part + line / fetched_places * 64, 0, 2);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (M > 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (N > 1) _tile_dpbf16ps(2, 5, 6);
    if constexpr (N > 1 && M > 1) _tile_dpbf16ps(3, 5, 7);
  }
  constexpr int64_t size = tile_side * tile_side;
  _tile_stored(0, out, 64);
  if constexpr (M > 1) _tile_stored(1, out + size, 64);
  if constexpr (N > 1) _tile_stored(2, out + M * size, 64);
  if constexpr (N > 1 && M > 1) _tile_stored(3, out + 3 * size, 64);
  settle();
}

// Up to 16 adjacent outputs of several input rows; row(i) are the sums of output i.
template <typename Row>
inline void keep_adjacent(int64_t count, const Row& row, int64_t rows, const bf16* bias, float* y, int64_t y_stride) {
  __m512 block[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) block[i] = i < count ? _mm512_loadu_ps(row(i)) : _mm512_setzero_ps();
  transpose(block);
  const f16 more = !bias ? f16{} : count == 16 ? load(bias) : load_part(bias, count);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++)
    if (i < rows) _mm512_mask_storeu_ps(y + i * y_stride, (__mmask16)((1u << count) - 1), (__m512)round_bf16((f16)block[i] + more));
}

// Outputs first..last-1, whole tiles, of more than 16 rows; `packed` as pack_input() made it.
inline void wide_tiles(const bf16* w, const bf16* bias, const bf16* packed, int64_t rows, int64_t depth, int64_t first,
                       int64_t last, float* y, int64_t y_stride) {
  const int64_t tiles = tiles_of(rows), turns = (tiles + 1) / 2, steps = depth / tile_depth;
  alignas(64) float out[4 * tile_side * tile_side];
  int64_t n = first;
  auto column = [&](auto number) {
    constexpr int N = decltype(number)::value;
    const int64_t per_step = (N * tile_side + turns - 1) / turns;
    for (int64_t tile = 0; tile < tiles; tile += 2) {
      const int64_t line = tile / 2 * per_step * steps;
      const bf16* input = packed + tile * tile_side * depth;
      const int M = tile + 1 < tiles ? 2 : 1;
      if (M == 2) tile_block<N, 2>(w + n * depth, input, depth, out, line, per_step);
      else tile_block<N, 1>(w + n * depth, input, depth, out, line, per_step);
      for (int a = 0; a < N; a++)
        for (int b = 0; b < M; b++) {
          const int64_t row = (tile + b) * tile_side, output = n + a * tile_side;
          const float* sums = out + (a * M + b) * tile_side * tile_side;
          keep_adjacent(tile_side, [&](int i) { return sums + i * tile_side; }, rows - row, bias ? bias + output : nullptr,
                        y + row * y_stride + output, y_stride);
        }
    }
    n += N * tile_side;
  };
  while (n + 2 * tile_side <= last) column(std::integral_constant<int, 2>{});
  if (n < last) column(std::integral_constant<int, 1>{});
}

// N tiles of outputs for up to 16 input rows: weight rows that are `apart` from each other, and those `between` rows further on.
// `ahead`: so many bytes further on in each row are fetched for later, unless 0.
template <int N>
[[gnu::noinline]] void narrow_block(const bf16* w, int64_t apart, int64_t between, const bf16* x, int64_t x_stride, int64_t depth,
                                    int64_t ahead, float* out, int64_t out_stride) {
  settle();
  _tile_zero(0);
  if constexpr (N > 1) _tile_zero(1);
  const int64_t stride = apart * depth * sizeof(bf16);
  for (int64_t k = 0; k < depth; k += tile_depth, x += x_stride / (int64_t)sizeof(bf16) * tile_side) {
    if (ahead)
#pragma GCC unroll 16
      for (int i = 0; i < tile_side; i++) __builtin_prefetch((const char*)(w + k) + i * stride + ahead);
    _tile_loadd(6, x, x_stride);
    _tile_loadd(4, w + k, stride);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (N > 1) {
      _tile_loadd(5, w + between * depth + k, stride);
      _tile_dpbf16ps(1, 5, 6);
    }
  }
  _tile_stored(0, out, out_stride);
  if constexpr (N > 1) _tile_stored(1, out + tile_side * tile_side, out_stride);
  settle();
}

// Bytes from one pair of elements to the next in an input of up to 16 rows: a lone one is taken as it is.
inline int64_t pair_stride(int64_t rows) { return rows == 1 ? 4 : 64; }

// The sums of a lone input row, to outputs that are `apart` from each other.
inline void keep_lone(const float* sums, int64_t count, int64_t apart, const bf16* bias, float* y) {
  for (int64_t i = 0; i < count; i++) y[i * apart] = round_bf16(sums[i] + (bias ? to_float(bias[i * apart]) : 0.0f));
}

// Outputs first..last-1, whole tiles, of up to 16 input rows; `x` is a lone row itself, or what pack_input() made of several. One
// reader of memory is served faster when it reads from several places in turn, so the rows of a tile are spread over all that this
// member of the team reads. Sums of several input rows are kept until there are 16 neighbours.
inline void narrow_tiles(const bf16* w, const bf16* bias, const bf16* x, int64_t rows, int64_t depth, int64_t first, int64_t last,
                         float* y, int64_t y_stride) {
  constexpr int64_t size = tile_side * tile_side;
  alignas(64) float sums[tile_side * 2 * size];
  const int64_t stride = pair_stride(rows), chains = depth < chains_below ? 2 : 1;
  const int64_t apart = spread((last - first) / (chains * tile_side)), between = tile_side * apart;
  for (int64_t turn = 0; turn < apart; turn++) {
    const int64_t n = first + turn, kept = rows == 1 ? 0 : turn % tile_side;
    float* out = sums + kept * chains * size;
    if (chains == 2) narrow_block<2>(w + n * depth, apart, between, x, stride, depth, 0, out, stride);
    else narrow_block<1>(w + n * depth, apart, 0, x, stride, depth, narrow_ahead, out, stride);
    if (rows == 1)
      for (int64_t chain = 0; chain < chains; chain++)
        keep_lone(out + chain * size, tile_side, apart, bias ? bias + n + chain * between : nullptr, y + n + chain * between);
    else if (kept + 1 == tile_side || turn + 1 == apart)
      for (int64_t i = 0; i < chains * tile_side; i++) {
        const int64_t output = n - kept + i * apart;
        keep_adjacent(kept + 1, [&](int t) { return sums + t * chains * size + i * tile_side; }, rows,
                      bias ? bias + output : nullptr, y + output, y_stride);
      }
  }
  for (int64_t n = first + chains * between; n < last; n += tile_side) {
    narrow_block<1>(w + n * depth, 1, 0, x, stride, depth, 0, sums, stride);
    const bf16* own = bias ? bias + n : nullptr;
    if (rows == 1) keep_lone(sums, tile_side, 1, own, y + n);
    else keep_adjacent(tile_side, [&](int i) { return sums + i * tile_side; }, rows, own, y + n, y_stride);
  }
}

// product() of products.h by tiles. `first` is a multiple of 16; rows at the end of the matrix that fill no tile go the other way.
inline void tile_product(const void* weights, const void* biases, const bf16* x, const bf16* packed, int64_t rows, int64_t depth,
                         int64_t first, int64_t last, float* y, int64_t y_stride) {
  const auto *w = (const bf16*)weights, *bias = (const bf16*)biases;
  const int64_t whole = first + (last - first) / tile_side * tile_side;
  if (rows > tile_side) wide_tiles(w, bias, packed, rows, depth, first, whole, y, y_stride);
  else narrow_tiles(w, bias, rows == 1 ? x : packed, rows, depth, first, whole, y, y_stride);
  if (whole < last) product<BFloat16>(weights, biases, x, rows, depth, whole, last, y, y_stride);
}


#else

inline bool has_tiles() { return false; }

struct TileShapes {
  TileShapes(bool, bool) {}
};

#endif

}  // namespace
