// Dense attention of one token of every sequence, onto rows as they come.
#include "dense_decode.cuh"

extern "C" int64_t still_dense_decode_floats(const StillShape* shape, int32_t splits) {
  const int group = shape->heads / shape->kv_heads, slices = (group + still::GROUP - 1) / still::GROUP;
  return int64_t(shape->batch) * shape->kv_heads * slices * splits * still::partial_floats(group, shape->head_dim);
}

extern "C" int still_dense_decode(const StillShape* shape, const StillDenseDecode* args, StillStream stream) {
  if (shape->tokens != 1 || args->splits < 1 || args->splits > STILL_DENSE_SPLITS) return cudaErrorInvalidValue;
  if (args->cos && (args->rotary < 0 || args->rotary % 16 || args->rotary > shape->head_dim)) return cudaErrorInvalidValue;
  if (args->cache.coding != STILL_PLAIN) return still::launch_dense_decode_codes(*shape, *args, stream);
  return still::launch_dense_decode<STILL_PLAIN>(*shape, *args, stream);
}
