// Dense attention of one token of every sequence, onto codes.
#include "dense_decode.cuh"

int still::launch_dense_decode_codes(const StillShape& shape, const StillDenseDecode& args, StillStream stream) {
  switch (args.cache.coding) {
    case STILL_INT8: return launch_dense_decode<STILL_INT8>(shape, args, stream);
    case STILL_INT4: return launch_dense_decode<STILL_INT4>(shape, args, stream);
    default: return cudaErrorInvalidValue;
  }
}
