// How the gate rounds Q to int8: from a 16-bit tile in shared memory into the A fragments of wgmma and
// what a thread knows of its rows. Macros of gate.cu.
#include "gate_rows.cuh"
#include "halves.cuh"

#define SAVE_REGISTERS (HEAD_DIM > 128)  // by not reading far ahead
#define SLABS_AT_ONCE (SAVE_REGISTERS ? 1 : Q_SLABS)
#define SLAB_BYTES_16 (BLOCK_Q * 128)  // 64 columns in 16 bits

// x / 127, correctly rounded as the reference's is (a Newton step on the product with the rounded
// reciprocal). The division operator is a call, which would keep loop state out of uniform
// registers.
DEVICE float divide_by_127(float x) {
  const float guess = x * (1.f / 127.f);
  return fmaf(fmaf(-guess, 127.f, x), 1.f / 127.f, guess);
}

// Hands out a lane's part of rows `row` and `row + 8` in 64 columns, in the order of A fragments
// (row, row + 8, 16 columns on): use(i, the first of 16 columns, four numbers).
template <class Use> DEVICE void for_slab(u32 q_smem, int row, int lane, int slab, Use use) {
  const u32 from = q_smem + slab * SLAB_BYTES_16 + row * 128 + (lane & 1) * 8;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    if (SAVE_REGISTERS && i % 2 == 0) __syncwarp();
    const int chunk = i / 2 * 2 + (lane >> 1 & 1);
    const uint2 raw = load_shared_pair(from + i % 2 * 1024 + ((chunk ^ lane >> 2) << 4));
    float x[4];
    unpack_16bit(raw.x, x[0], x[1]);
    unpack_16bit(raw.y, x[2], x[3]);
    use(i, slab * 64 + i / 2 * 16, x);
  }
}

// Multiplies a lane's four of 16 channels by what K is divided by.
DEVICE void spread_out(float (&x)[4], u32 spread_smem, int lane) {
  const float4 spread = load_shared_floats(spread_smem + (lane & 3) * 16);
  x[0] *= spread.x;
  x[1] *= spread.y;
  x[2] *= spread.z;
  x[3] *= spread.w;
}

// The step of each of the two rows, and its inverse.
struct Steps {
  float sq[2], inverse[2];
};

// What is to be known of the two rows. channels_smem: K's mean of each channel, then its spread
// (quantise.cu).
DEVICE Steps measure(const Scale& p, u32 q_smem, int row, int lane, u32 channels_smem,
                     float threshold, Row (&out)[2]) {
  float peak[2] = {}, square[2] = {}, with_mean[2] = {};
#pragma unroll SLABS_AT_ONCE
  for (int slab = 0; slab < Q_SLABS; slab++)
    for_slab(q_smem, row, lane, slab, [&](int i, int channel, float(&x)[4]) {
      const int r = i % 2;
      if (channel >= K_STEPS * 32) return;
      if (!RELATIVE || SOFTCAP || EXACT_SINKS) {
        const float4 mean = load_shared_floats(channels_smem + channel * 4 + (lane & 3) * 16);
        with_mean[r] += x[0] * mean.x + x[1] * mean.y + x[2] * mean.z + x[3] * mean.w;
      }
      spread_out(x, channels_smem + (KEY_BYTES + channel) * 4, lane);
#pragma unroll
      for (int e = 0; e < 4; e++) {
        peak[r] = fmaxf(peak[r], fabsf(x[e]));
        square[r] = fmaf(x[e], x[e], square[r]);
      }
    });
  Steps steps;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    peak[r] = quad_max(peak[r]);
    square[r] = quad_sum(square[r]);
    const float sq = fmaxf(divide_by_127(peak[r]), 1.17549435e-38f), inverse = reciprocal(sq);
    // Not a number or infinite somewhere: NaN in t keeps every tile.
    const bool finite = square[r] < __int_as_float(0x7f800000);
    const float unit = finite ? sq * p.scale : __int_as_float(0x7fffffff);
    steps.sq[r] = sq;
    steps.inverse[r] = inverse;
    out[r].a = sqrt_approx(square[r]) * (INT8_MARGIN * WIDER) * inverse;
    out[r].m = RELATIVE ? NEG_INF : -quad_sum(with_mean[r]) * inverse;
    out[r].t = threshold * reciprocal(unit);
#if EXACT && RELATIVE
    out[r].high = NEG_INF;
#endif
#if EXACT_SINKS
    out[r].mean = quad_sum(with_mean[r]);
    out[r].per_unit = inverse;
#endif
#if SOFTCAP
    out[r].unit = unit;
    out[r].shift = quad_sum(with_mean[r]) * inverse;
    out[r].m = RELATIVE ? NEG_INF : 0.f;
    out[r].t = finite ? threshold : unit;
#endif
  }
  return steps;
}

// Rounds 64 columns: the A fragments of two wgmma steps.
DEVICE void round_slab(u32 q_smem, int row, int lane, u32 channels_smem, const Steps& steps, int slab,
                       u32 (&a)[8]) {
  for_slab(q_smem, row, lane, slab, [&](int i, int channel, float(&x)[4]) {
    if (channel >= K_STEPS * 32) return;
    spread_out(x, channels_smem + (KEY_BYTES + channel) * 4, lane);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      // One Newton step makes the product the correctly rounded quotient, as the reference's is;
      // adding 1.5 2^23 rounds it to a whole number, which then stands in the low bits.
      const float guess = x[e] * steps.inverse[i % 2];
      const float quotient =
          fmaf(fmaf(-guess, steps.sq[i % 2], x[e]), steps.inverse[i % 2], guess);
      x[e] = quotient + 12582912.f;
    }
    const u32 low = __byte_perm(__float_as_uint(x[0]), __float_as_uint(x[1]), 0x0040);
    const u32 high = __byte_perm(__float_as_uint(x[2]), __float_as_uint(x[3]), 0x0040);
    a[i] = __byte_perm(low, high, 0x5410);
  });
}

// Rounds rows `row` and `row + 8` into the fragments of K_STEPS wgmmas.
DEVICE void quantise(const Scale& p, u32 q_smem, int row, int lane, u32 channels_smem,
                     float threshold, u32 (&a)[K_STEPS * 4], Row (&out)[2]) {
  const Steps steps = measure(p, q_smem, row, lane, channels_smem, threshold, out);
#pragma unroll
  for (int slab = 0; slab < Q_SLABS; slab++) {
    u32 part[8];
    round_slab(q_smem, row, lane, channels_smem, steps, slab, part);
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (slab * 8 + i < K_STEPS * 4) a[slab * 8 + i] = part[i];
  }
}
