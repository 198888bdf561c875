// Which tiles a q block sees and keeps: the rule of tiles.py. Macros CAUSAL, WINDOW, PADDED.
#include "base.cuh"

#define BLOCK_Q 128
#define BLOCK_K 64

struct Shape {
  const i64* q_start_gmem;  // null: q_start below; else [1], the start known on the device only
  const u64* pad_gmem;      // PADDED: [B, k_tiles], bit c of a tile set where its key c is a key
  const int* bounds_gmem;   // PADDED: [B, 2], tiles [first, stop) that hold unpadded keys
  i64 q_start;
  int q_len, k_len, window, sink_tiles;
  int rows;   // rows of the tile mask
  int words;  // 32-tile words in one of them
};

// One q block of a call: mask row `i`, absolute block `block`, at positions low .. low + 127, of
// which the call holds first .. last (row0 is the call's row at position low, negative if none).
struct Span {
  int block, low, row0, first, last;
  int key_lo, key_hi, tile_lo, tile_hi;  // what causality and window leave to any of its rows
  DEVICE bool empty() const { return first > last; }
};

DEVICE int start_of(const Shape& s) { return (int)(s.q_start_gmem ? *s.q_start_gmem : s.q_start); }

DEVICE Span span_of(const Shape& s, int q_start, int i) {
  Span r;
  r.block = q_start / BLOCK_Q + i;
  r.low = r.block * BLOCK_Q;
  r.row0 = r.low - q_start;
  r.first = max(r.low, q_start);
  r.last = min(r.low + BLOCK_Q - 1, q_start + s.q_len - 1);
  r.key_lo = 0;
  r.key_hi = s.k_len;
  if (CAUSAL) r.key_hi = min(r.key_hi, r.last + 1);
  if (WINDOW) {
    r.key_lo = max(r.key_lo, r.first - s.window + 1);
    if (!CAUSAL) r.key_hi = min(r.key_hi, r.last + s.window);
  }
  if (r.first > r.last || r.key_lo >= r.key_hi) r.key_lo = r.key_hi = 0;
  r.tile_lo = r.key_lo / BLOCK_K;
  r.tile_hi = (r.key_hi + BLOCK_K - 1) / BLOCK_K;
  return r;
}

// Keys that row position p sees: [key_low_of, key_high_of).
DEVICE int key_high_of(const Shape& s, int p) {
  const int hi = CAUSAL ? min(s.k_len, p + 1) : s.k_len;
  return WINDOW && !CAUSAL ? min(hi, p + s.window) : hi;
}
DEVICE int key_low_of(const Shape& s, int p) { return WINDOW ? p - s.window + 1 : 0; }

// Tiles [first, stop) of a batch row that hold unpadded keys.
DEVICE int2 bounds_of(const Shape& s, int batch) {
  if (PADDED) return make_int2(s.bounds_gmem[2 * batch], s.bounds_gmem[2 * batch + 1]);
  return make_int2(0, (s.k_len + BLOCK_K - 1) / BLOCK_K);
}

// Bit c set: key c of tile j is no padding. Only for tiles that hold keys.
DEVICE u64 pad_bits(const Shape& s, int batch, int j) {
  if (!PADDED) return ~0ull;
  return s.pad_gmem[(i64)batch * ((s.k_len + BLOCK_K - 1) / BLOCK_K) + j];
}

DEVICE bool visible(const Shape& s, const Span& r, int batch, int j) {
  if (j < r.tile_lo || j >= r.tile_hi) return false;
  if (!PADDED) return true;
  const int from = max(r.key_lo - j * BLOCK_K, 0), to = min(r.key_hi - j * BLOCK_K, BLOCK_K);
  return (pad_bits(s, batch, j) >> from) << (BLOCK_K - to + from) != 0;
}

// Geometry.always_kept of tiles.py, for a visible tile.
DEVICE bool always_kept(const Shape& s, const Span& r, int2 bounds, int j) {
  const int high = r.low + BLOCK_Q - 1;
  const int key_low = j * BLOCK_K, key_high = min(key_low + BLOCK_K, s.k_len) - 1;
  if (j < bounds.x + s.sink_tiles || j == min(r.tile_hi, bounds.y) - 1) return true;
  if (CAUSAL && key_high > r.low) return true;
  if (!WINDOW) return false;
  return key_low <= high - s.window || (!CAUSAL && key_high >= r.low + s.window);
}

// Whether some row of the block does not see some key of visible tile j.
DEVICE bool cut(const Shape& s, const Span& r, int batch, int j) {
  const int key_low = j * BLOCK_K, key_high = key_low + BLOCK_K - 1;
  if (key_high >= s.k_len || (CAUSAL && key_high > r.first)) return true;
  if (WINDOW && (key_low <= r.last - s.window || (!CAUSAL && key_high >= r.first + s.window)))
    return true;
  return PADDED && pad_bits(s, batch, j) != ~0ull;
}

// Order of work: sections of `width` kv heads (of all batch rows) that fit the L2 cache together,
// and in a section the longest q blocks first, all its heads side by side.
struct Order {
  int kv_total, width;
};
// item -> (place counted from the top of a section's list, kv head); `places` a kv head.
DEVICE int2 place_of(const Order& o, int places, int item) {
  const int section = item / (places * o.width);
  const int in_section = item - section * places * o.width;
  const int heads = min(o.width, o.kv_total - section * o.width);
  const int place = in_section / heads;
  return make_int2(place, section * o.width + in_section - place * heads);
}

// One q block of one query head.
struct HeadBlock {
  int row, head, kv_head, batch;  // row: of the mask
};
DEVICE HeadBlock head_block_of(const Order& o, const Shape& s, int heads, int kv_heads, int item) {
  const int per_kv = heads / kv_heads;
  const int2 place = place_of(o, s.rows * per_kv, item);
  HeadBlock r;
  r.batch = place.y / kv_heads;
  r.kv_head = place.y % kv_heads;
  r.head = r.kv_head * per_kv + place.x % per_kv;
  r.row = s.rows - 1 - place.x / per_kv;
  return r;
}
