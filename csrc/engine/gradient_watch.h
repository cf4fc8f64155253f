// Tells when a parameter's gradient isn't the one that the program gave.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace soap::engine {

class GradientWatch {
 public:
  // The number of one more parameter.
  int add();
  // The program hands these gradients to autograd; undefined ones aren't handed over. Of several to one parameter autograd makes a sum, of which nothing is
  // known.
  void expect(const std::vector<int>& indices, const std::vector<at::Tensor>& gradients);
  // Of what has come to a parameter, once for what was expected: whether it is that. To be called by a hook of Python's: the first one of C++ on a tensor
  // drops those that the user has put there (torch::autograd::impl::create_cpp_hook).
  bool is_ours(int index, const at::Tensor& gradient);

 private:
  struct Expected {
    bool waits = false, any = false;
    const void* data = nullptr;
  };
  std::vector<Expected> expected_;
};

}  // namespace soap::engine
