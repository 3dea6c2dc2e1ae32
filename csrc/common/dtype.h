// The storage types of native kernels; arithmetic is in float32.
#pragma once

namespace fastdiff {

enum class Type { f32, bf16, f16 };

}  // namespace fastdiff
