#include "engine/gradient_watch.h"

namespace soap::engine {

int GradientWatch::attach(const at::Tensor& parameter) {
  const int index = static_cast<int>(expected_.size());
  expected_.emplace_back();
  parameter.register_hook([watch = weak_from_this(), index](const at::Tensor& gradient) {
    if (const auto self = watch.lock()) self->look(index, gradient);
  });
  return index;
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

void GradientWatch::look(int index, const at::Tensor& gradient) {
  const Expected expected = std::exchange(expected_[index], {});
  if (!gradient.defined() || expected.any || (expected.waits && !gradient.is_sparse() && gradient.const_data_ptr() == expected.data)) return;
  other_(index);
}

}  // namespace soap::engine
