// Schemas of the private ops. Each op's kernel file registers its implementation
// (STABLE_TORCH_LIBRARY_IMPL). Public names, fakes and autograd live in Python: these ops are
// called with arguments already validated and outputs already allocated.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(memdlm_C, m) {
}
