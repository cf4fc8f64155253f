// c10d::Work over an operation of a group.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <memory>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <utility>
#include <vector>

#include "transport/runner.h"

namespace soap::backend {

// The tensors of one operation, as memory. A tensor that isn't contiguous stands in as a contiguous copy, written back at the end where it is a result.
class Tensors {
 public:
  transport::Memory input(const at::Tensor& tensor);
  transport::Memory output(const at::Tensor& tensor);
  // What it holds now, in memory of its own.
  transport::Memory copy(const at::Tensor& tensor);
  // Read and written.
  transport::Memory in_place(const at::Tensor& tensor);
  void write_back();

 private:
  std::vector<at::Tensor> held_;
  std::vector<std::pair<at::Tensor, at::Tensor>> copies_;  // tensor, its copy
};

// Part `index` of memory that is cut in `count` equal parts.
transport::Memory part_of(const transport::Memory& memory, int index, int count);

class SoapWork final : public c10d::Work {
 public:
  SoapWork(std::shared_ptr<transport::Runner> group, int rank, c10d::OpType type, uint64_t sequence, const char* title, std::vector<at::Tensor> inputs,
           std::vector<at::Tensor> outputs, Tensors tensors);

  // Links both ways until the operation has ended.
  void attach(std::shared_ptr<transport::Operation> operation);

  bool isCompleted() override;
  bool isSuccess() const override;
  std::exception_ptr exception() const override;
  int sourceRank() const override;
  std::vector<at::Tensor> result() override { return outputs_; }
  void synchronize() override {}
  bool wait(std::chrono::milliseconds timeout) override;
  void abort() override;
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override;
  uint64_t getSequencenumber() const override { return sequence_; }
  std::chrono::milliseconds getTimeout() const;  // torch 2.13's Work has none to override

 private:
  void ended(std::exception_ptr error);
  void complete_future();

  const std::shared_ptr<transport::Runner> group_;
  std::shared_ptr<transport::Operation> operation_;
  const uint64_t sequence_;
  std::vector<at::Tensor> outputs_;
  Tensors tensors_;
  mutable std::mutex mutex_of_end_;  // guards what follows
  bool ended_ = false;
  std::exception_ptr error_;
  c10::intrusive_ptr<c10::ivalue::Future> future_;
};

}  // namespace soap::backend
