// Tile geometry of one q block: the device side of ops/tiles.py. Tiles are 128 queries x 64 keys.

#define BLOCK_Q 128
#define BLOCK_K 64

struct Geometry {
  int first_row;               // row of this call that is row 0 of the block; may be negative
  int row_begin, row_end;      // rows of this call that lie in the block
  int block_low;               // absolute position of row 0 of the block
  int key_begin, key_end;      // keys that causality and window leave to any row
  int tile_begin, tile_end;    // visible tiles (padding may hide more of them)
  int sink_end;                // tiles [tile_begin, sink_end) are visited first
  int drop_begin, drop_end;    // tiles that may be dropped; the others are always kept
  int clear_begin, clear_end;  // tiles that causality, window and length cut nowhere
};

__device__ __forceinline__ int floor_tile(int key) { return key >> 6; }  // BLOCK_K, rounds down

// block: mask row; first_tile, stop_tile: tiles of the batch row that hold unpadded keys.
// window 0: none.
__device__ __forceinline__ Geometry make_geometry(int block, int q_start, int q_len, int k_len,
                                                  bool causal, int window, int sink_tiles,
                                                  int first_tile, int stop_tile) {
  Geometry g;
  g.block_low = (q_start / BLOCK_Q + block) * BLOCK_Q;
  g.first_row = g.block_low - q_start;
  g.row_begin = max(g.first_row, 0);
  g.row_end = min(g.first_row + BLOCK_Q, q_len);
  const int first = q_start + g.row_begin, last = q_start + g.row_end - 1;
  g.key_begin = 0;
  g.key_end = causal ? min(k_len, last + 1) : k_len;
  g.clear_begin = 0;
  g.clear_end = floor_tile(k_len);
  if (causal) g.clear_end = min(g.clear_end, floor_tile(first + 1));
  if (window) {
    g.key_begin = max(0, first - window + 1);
    g.clear_begin = floor_tile(last - window) + 1;
    if (!causal) {
      g.key_end = min(g.key_end, last + window);
      g.clear_end = min(g.clear_end, floor_tile(first + window));
    }
  }
  if (g.row_begin >= g.row_end || g.key_begin >= g.key_end) {
    g.tile_begin = g.tile_end = g.sink_end = g.drop_begin = g.drop_end = 0;
    return g;
  }
  g.tile_begin = max(floor_tile(g.key_begin), first_tile);
  g.tile_end = max(min(floor_tile(g.key_end - 1) + 1, stop_tile), g.tile_begin);
  g.sink_end = min(max(first_tile + sink_tiles, g.tile_begin), g.tile_end);
  g.drop_begin = first_tile + sink_tiles;
  g.drop_end = g.tile_end - 1;
  if (causal) g.drop_end = min(g.drop_end, floor_tile(g.block_low));
  if (window) {
    g.drop_begin = max(g.drop_begin, floor_tile(g.block_low + BLOCK_Q - 1 - window) + 1);
    if (!causal) g.drop_end = min(g.drop_end, floor_tile(g.block_low + window));
  }
  return g;
}

// Bit c of the result: key tile * 64 + c lies in [key_begin, key_end).
__device__ __forceinline__ unsigned long long range_bits(int tile, int key_begin, int key_end) {
  const int lo = max(key_begin - tile * BLOCK_K, 0);
  const int hi = min(key_end - tile * BLOCK_K, BLOCK_K);
  return hi <= lo ? 0ull : ((~0ull >> (BLOCK_K - hi)) >> lo) << lo;
}
