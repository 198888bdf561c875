// Stands for halves.cuh.
#include "numeric.cuh"

DEVICE void unpack_16bit(u32 pair, float& low, float& high) {
  low = from_16bit(pair & 0xffff);
  high = from_16bit(pair >> 16);
}
