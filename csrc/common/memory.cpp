#include <torch/csrc/stable/library.h>

#include "common/tensor.h"

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff_cpu, m) { m.def("prepare(Tensor(a!) x) -> ()"); }
STABLE_TORCH_LIBRARY_IMPL(fastdiff_cpu, CPU, m) { m.impl("prepare", TORCH_BOX(&fastdiff::prepare)); }
