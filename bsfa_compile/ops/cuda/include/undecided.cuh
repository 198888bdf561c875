// What int8 leaves undecided, for resolve.cu to decide in 16 bits.
#include "base.cuh"

// An entry of the list: one row and the keys 2c, 2c + 1, 2c + 8, ... of one tile, as its line of
// the mask and tile << TILE_SHIFT | row << 2 | c.
#define TILE_SHIFT 9

struct Undecided {
  uint2* list_gmem;  // [room], the absolute gate's: single rows
  int* count_gmem;   // entries, also those for which there was no room; zero on entry
  u32* open_gmem;    // [B, H, rows, words], zero on entry: tiles
  u32* raise_gmem;   // as large, the relative gate's: tiles that may raise a running maximum
  int room;
};

// Entries on their way to the list: lane i of a warp holds the i-th.
struct Entries {
  u32 line, code;
  int count;
  // All lanes call with the same values.
  DEVICE void add(bool really, u32 of_line, u32 of_code, int lane) {
    const bool mine = really && lane == count;
    line = mine ? of_line : line;
    code = mine ? of_code : code;
    count += really;
  }
  DEVICE void flush(const Undecided& to, int words, int lane) {
    int at = 0;
    if (lane == 0 && count) at = atomicAdd(to.count_gmem, count);
    at = __shfl_sync(FULL_WARP, at, 0) + lane;
    if (lane < count) {
      const int tile = code >> TILE_SHIFT;
      if (at < to.room) to.list_gmem[at] = make_uint2(line, code);
      else atomicOr(to.open_gmem + (i64)line * words + tile / 32, 1u << tile % 32);
    }
    count = 0;
  }
};
