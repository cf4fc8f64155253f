#include "backend/gloo_wire.h"

#include <ATen/ops/from_blob.h>

#include <algorithm>

namespace soap::backend {
namespace {

using transport::Clock;
using transport::Wire;

class GlooTransfer final : public Wire::Transfer {
 public:
  explicit GlooTransfer(c10::intrusive_ptr<c10d::Work> work) : work_(std::move(work)) {}

  void wait(Clock::duration limit) override {
    const auto in_ms = std::chrono::ceil<std::chrono::milliseconds>(limit);
    if (!work_->wait(std::max(in_ms, std::chrono::milliseconds(1)))) throw transport::TransportError("aborted");
  }
  void abort() override { work_->abort(); }

 private:
  const c10::intrusive_ptr<c10d::Work> work_;
};

class GlooWire final : public Wire {
 public:
  explicit GlooWire(c10::intrusive_ptr<c10d::Backend> gloo) : gloo_(std::move(gloo)) {}

  std::unique_ptr<Transfer> send(int rank, int tag, std::byte* data, uint64_t num_bytes) override {
    std::vector<at::Tensor> tensors{tensor_of(data, num_bytes)};
    return std::make_unique<GlooTransfer>(gloo_->send(tensors, rank, tag));
  }
  std::unique_ptr<Transfer> receive(int rank, int tag, std::byte* data, uint64_t num_bytes) override {
    std::vector<at::Tensor> tensors{tensor_of(data, num_bytes)};
    return std::make_unique<GlooTransfer>(gloo_->recv(tensors, rank, tag));
  }

 private:
  static at::Tensor tensor_of(std::byte* data, uint64_t num_bytes) { return at::from_blob(data, {static_cast<int64_t>(num_bytes)}, at::kByte); }

  const c10::intrusive_ptr<c10d::Backend> gloo_;
};

}  // namespace

std::unique_ptr<Wire> make_wire(c10::intrusive_ptr<c10d::Backend> gloo) {
  return std::make_unique<GlooWire>(std::move(gloo));
}

}  // namespace soap::backend
