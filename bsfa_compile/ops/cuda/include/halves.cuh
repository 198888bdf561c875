// 16-bit numbers as they lie in memory, to float32. Macro BF16: bfloat16, else float16.
#include "base.cuh"

DEVICE void unpack_16bit(u32 pair, float& low, float& high) {
#if BF16
  low = __uint_as_float(pair << 16);
  high = __uint_as_float(pair & 0xffff0000u);
#else
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
      : "=f"(low), "=f"(high)
      : "r"(pair));
#endif
}
DEVICE void unpack8(uint4 raw, float (&x)[8]) {
  unpack_16bit(raw.x, x[0], x[1]);
  unpack_16bit(raw.y, x[2], x[3]);
  unpack_16bit(raw.z, x[4], x[5]);
  unpack_16bit(raw.w, x[6], x[7]);
}
