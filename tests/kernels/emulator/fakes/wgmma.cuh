// Stands for wgmma.cuh: products are formed as late as they may be, at the wait for them.
//
// So whoever reads an accumulator, changes an operand or gives a stage back before that wait gets
// wrong numbers, as may happen on a card.
#include "base.cuh"
#include "numeric.cuh"

struct Product {
  void* d;  // the thread's accumulators
  const u32* a;
  u64 x, y;
  void (*form)(const Product* const* of);
};
struct Warpgroup {
  Meeting meeting;
  std::vector<Product> open[128];
  std::deque<std::vector<Product>> groups[128];  // a thread's, committed

  void form_all_but(size_t newest) {
    while (groups[0].size() > newest) {
      const Product* of[128];
      for (size_t i = 0; i < groups[0].front().size(); i++) {
        for (int t = 0; t < 128; t++) of[t] = &groups[t].front()[i];
        of[0]->form(of);
      }
      for (auto& own : groups) own.pop_front();
    }
  }
};
struct Warpgroups {
  Warpgroup at[CTA_THREADS / 128];
};
DEVICE Warpgroup& warpgroup() { return of_cta<Warpgroups>().at[threadIdx.x / 128]; }

DEVICE void wgmma_fence() {}
DEVICE void wgmma_commit() {
  Warpgroup& w = warpgroup();
  auto& open = w.open[threadIdx.x % 128];
  w.groups[threadIdx.x % 128].push_back(open);
  open.clear();
}
template <int N> DEVICE void wgmma_wait() {
  Warpgroup& w = warpgroup();
  if (w.meeting.count == 127) w.form_all_but(N);  // all the others are here
  w.meeting.sync(128, "products of its warpgroup");
}
template <class T> DEVICE void pin(T&) {}

// Descriptors: an address, and the bytes of a row, or for V from one slab of 64 columns to the next.
template <int ROW_BYTES> DEVICE u64 k_major(u32 address, u32 offset) {
  return (u64)ROW_BYTES << 32 | (address + offset);
}
template <int SLAB> DEVICE u64 mn_major(u32 address, u32 offset) {
  return (u64)SLAB << 32 | (address + offset);
}

// d += a b, for 64 rows and K terms. A thread holds pairs of columns of two rows.
template <int N, bool ACC, class T, int K>
void multiply_add(const Product* const* of, const T (&a)[64][K], const T (&b)[K][N]) {
  for (int row = 0; row < 64; row++) {
    T sums[N] = {};
    for (int k = 0; k < K; k++)
      for (int c = 0; c < N; c++) sums[c] += a[row][k] * b[k][c];
    for (int c = 0; c < N; c++) {
      const int thread = row / 16 * 32 + row % 8 * 4 + c % 8 / 2;
      T& d = ((T*)of[thread]->d)[c / 8 * 4 + (row & 8) / 4 + c % 2];
      d = ACC ? d + sums[c] : sums[c];
    }
  }
}

// Of rows of 128 bytes.
DEVICE float half_at(u32 address, u32 offset) {
  return from_16bit(shared<u16>(swizzled(address + offset, 128)));
}

// Both operands from shared memory, both K-major.
template <bool ACC, int R> void form_ss(const Product* const* of) {
  float a[64][16], b[16][2 * R];
  for (int k = 0; k < 16; k++) {
    for (int r = 0; r < 64; r++) a[r][k] = half_at(of[0]->x, r * 128 + k * 2);
    for (int c = 0; c < 2 * R; c++) b[k][c] = half_at(of[0]->y, c * 128 + k * 2);
  }
  multiply_add<2 * R, ACC>(of, a, b);
}
template <bool ACC, int R> DEVICE void wgmma_ss(float (&d)[R], u64 x, u64 y) {
  warpgroup().open[threadIdx.x % 128].push_back({d, nullptr, x, y, form_ss<ACC, R>});
}

// A from four registers of each thread, B MN-major from shared memory; always accumulates.
template <int R> void form_rs(const Product* const* of) {
  float a[64][16], b[16][2 * R];
  for (int t = 0; t < 128; t++)
    for (int e = 0; e < 8; e++) {
      const u32 pair = of[t]->a[e / 2];
      a[t / 32 * 16 + (e & 2) * 4 + t % 32 / 4][(e & 4) * 2 + t % 4 * 2 + e % 2] =
          from_16bit(e % 2 ? pair >> 16 : pair & 0xffff);
    }
  const u32 address = (u32)of[0]->y, slab = of[0]->y >> 32;
  for (int k = 0; k < 16; k++)
    for (int c = 0; c < 2 * R; c++)
      b[k][c] = half_at(address, c / 64 * slab + k * 128 + c % 64 * 2);
  multiply_add<2 * R, true>(of, a, b);
}
template <int R> DEVICE void wgmma_rs(float (&d)[R], const u32* a, u64 y) {
  warpgroup().open[threadIdx.x % 128].push_back({d, a, 0, y, form_rs<R>});
}

// int8: A from four registers of each thread, B K-major from shared memory.
template <bool ACC, int R> void form_s8(const Product* const* of) {
  int a[64][32], b[32][2 * R];
  for (int t = 0; t < 128; t++)
    for (int e = 0; e < 16; e++)
      a[t / 32 * 16 + (e & 4) * 2 + t % 32 / 4][(e & 8) * 2 + t % 4 * 4 + e % 4] =
          (signed char)(of[t]->a[e / 4] >> e % 4 * 8);
  const u32 address = (u32)of[0]->y, row_bytes = of[0]->y >> 32;
  for (int k = 0; k < 32; k++)
    for (int c = 0; c < 2 * R; c++)
      b[k][c] = shared<signed char>(swizzled(address + c * row_bytes + k, row_bytes));
  multiply_add<2 * R, ACC>(of, a, b);
}
template <bool ACC, int R> DEVICE void wgmma_s8(int (&d)[R], const u32* a, u64 y) {
  warpgroup().open[threadIdx.x % 128].push_back({d, a, 0, y, form_s8<ACC, R>});
}
