// Tells when a parameter's gradient isn't the one that the program gave.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <vector>

namespace soap::engine {

class GradientWatch : public std::enable_shared_from_this<GradientWatch> {
 public:
  // `other(index)`: the gradient that came to a parameter has a part from elsewhere.
  explicit GradientWatch(std::function<void(int index)> other) : other_(std::move(other)) {}

  // From here on what comes to this parameter is looked at; its number. It lives as long as it likes.
  int attach(const at::Tensor& parameter);
  // The program hands these gradients to autograd; undefined ones aren't handed over. Of several to one parameter autograd makes a sum, of which nothing is
  // known.
  void expect(const std::vector<int>& indices, const std::vector<at::Tensor>& gradients);

 private:
  struct Expected {
    bool waits = false, any = false;
    const void* data = nullptr;
  };
  void look(int index, const at::Tensor& gradient);

  std::function<void(int)> other_;
  std::vector<Expected> expected_;
};

}  // namespace soap::engine
