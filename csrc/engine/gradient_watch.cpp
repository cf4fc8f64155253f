#include "engine/gradient_watch.h"

namespace soap::engine {

int GradientWatch::add() {
  expected_.emplace_back();
  return static_cast<int>(expected_.size()) - 1;
}

void GradientWatch::expect(const std::vector<int>& indices, const std::vector<at::Tensor>& gradients) {
  for (size_t i = 0; i < indices.size() && i < gradients.size(); ++i) {
    if (indices[i] < 0 || !gradients[i].defined()) continue;
    Expected& expected = expected_.at(indices[i]);
    expected.any = expected.waits;
    expected.waits = true;
    expected.data = gradients[i].is_sparse() ? nullptr : gradients[i].const_data_ptr();
  }
}

bool GradientWatch::is_ours(int index, const at::Tensor& gradient) {
  const Expected expected = std::exchange(expected_.at(index), {});
  return !gradient.defined() || expected.any || (expected.waits && !gradient.is_sparse() && gradient.const_data_ptr() == expected.data);
}

}  // namespace soap::engine
