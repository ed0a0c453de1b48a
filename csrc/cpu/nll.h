#pragma once

#include <cmath>

namespace memdlm {

// -log p(target), never negative, where `others` is the sum of exp(logit - maximum) of all words
// but the target. In this form a confident token keeps its digits: log(1 + tiny) is never taken
// apart.
inline double nll_of(double maximum, double others, double target_logit) {
  const double margin = maximum - target_logit + std::log(others);
  return margin > 0 ? margin + std::log1p(std::exp(-margin)) : std::log1p(std::exp(margin));
}

}  // namespace memdlm
