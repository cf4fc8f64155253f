// The c10d backend "soap": collectives and messages of CPU tensors over memory that the ranks of a host share.
//
// Where ranks are on several hosts, those of each share memory, and messages between hosts go through connections of their own (transport/tcp_wire.h). What
// isn't a collective then, and everything where a host can't have shared memory, is handed to another backend, given with `set_fallback`.
//
// Differences from gloo, on purpose: results are summed in the order of the ranks, so they are the same bits on all ranks and in
// every run; 16-bit numbers are summed in float32; ranks that call different things get an error, not a hang; a rank
// that has ended is named at once, not when the timeout has passed.
#pragma once

#include <memory>
#include <string>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <vector>

#include "backend/work.h"
#include "transport/collectives.h"
#include "transport/group.h"
#include "transport/spanning.h"

namespace soap::backend {

class SoapBackend final : public c10d::Backend {
 public:
  // Collective over the ranks of the group; see meeting.h.
  SoapBackend(const c10::intrusive_ptr<c10d::Store>& store, int rank, int num_ranks, std::chrono::milliseconds timeout, const std::string& host);
  ~SoapBackend() override;

  // Whether all ranks share memory.
  bool shares_memory() const { return group_ != nullptr && one_host_; }
  // Whether the ranks of each of several hosts do.
  bool spans_hosts() const { return group_ != nullptr && !one_host_; }
  // Neither: why not.
  const std::string& why_not() const { return why_not_; }
  int num_hosts() const { return hosts_.num_hosts(); }
  void set_fallback(c10::intrusive_ptr<c10d::Backend> fallback) { fallback_ = std::move(fallback); }
  // What the profiler shows before ":all_reduce"; torch's own tests look for "gloo".
  void set_profiler_name(const std::string& name) { profiler_name_ = name + ":"; }
  // For tests: delays every step by a random time up to this.
  void set_random_delay(std::chrono::microseconds most);

  // For movements, which know of each byte where it is and where it stays; only where ranks share memory, on one host or on each. They have ended on return,
  // and throw what a Work's wait would. Exchanges: memory for each rank; `outgoing` to and `incoming` from this rank are not read.
  void exchange_memory(std::vector<transport::Memory> outgoing, std::vector<transport::Memory> incoming);
  // As exchange_memory, also in the eyes of the others; what comes becomes one sum in the order of the ranks, to which this rank gives outgoing[rank]. On one
  // host only.
  void exchange_sum(std::vector<transport::Memory> outgoing, const transport::Memory& result, at::ScalarType dtype);
  // `result` may be `source`.
  void all_reduce_memory(const transport::Memory& source, const transport::Memory& result, at::ScalarType dtype, bool maximum);

  const std::string getBackendName() const override { return "soap"; }
  c10::intrusive_ptr<Options> getBackendOptions() override { return options_; }
  void setTimeout(std::chrono::milliseconds timeout) override;
  uint64_t getSequenceNumberForGroup() override;
  void setSequenceNumberForGroup() override {}
  void abort() override;
  void shutdown() override;

  c10::intrusive_ptr<c10d::Work> broadcast(std::vector<at::Tensor>& tensors, const c10d::BroadcastOptions& options) override;
  c10::intrusive_ptr<c10d::Work> allreduce(std::vector<at::Tensor>& tensors, const c10d::AllreduceOptions& options) override;
  c10::intrusive_ptr<c10d::Work> allreduce_sparse(std::vector<at::Tensor>& tensors, const c10d::AllreduceOptions& options) override;
  c10::intrusive_ptr<c10d::Work> allreduce_coalesced(std::vector<at::Tensor>& tensors, const c10d::AllreduceCoalescedOptions& options) override;
  c10::intrusive_ptr<c10d::Work> reduce(std::vector<at::Tensor>& tensors, const c10d::ReduceOptions& options) override;
  c10::intrusive_ptr<c10d::Work> allgather(std::vector<std::vector<at::Tensor>>& outputs, std::vector<at::Tensor>& inputs,
                                           const c10d::AllgatherOptions& options) override;
  c10::intrusive_ptr<c10d::Work> _allgather_base(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) override;
  c10::intrusive_ptr<c10d::Work> allgather_coalesced(std::vector<std::vector<at::Tensor>>& outputs, std::vector<at::Tensor>& inputs,
                                                     const c10d::AllgatherOptions& options) override;
  c10::intrusive_ptr<c10d::Work> allgather_into_tensor_coalesced(std::vector<at::Tensor>& outputs, std::vector<at::Tensor>& inputs,
                                                                 const c10d::AllgatherOptions& options) override;
  c10::intrusive_ptr<c10d::Work> gather(std::vector<std::vector<at::Tensor>>& outputs, std::vector<at::Tensor>& inputs,
                                        const c10d::GatherOptions& options) override;
  c10::intrusive_ptr<c10d::Work> scatter(std::vector<at::Tensor>& outputs, std::vector<std::vector<at::Tensor>>& inputs,
                                         const c10d::ScatterOptions& options) override;
  c10::intrusive_ptr<c10d::Work> reduce_scatter(std::vector<at::Tensor>& outputs, std::vector<std::vector<at::Tensor>>& inputs,
                                                const c10d::ReduceScatterOptions& options) override;
  c10::intrusive_ptr<c10d::Work> _reduce_scatter_base(at::Tensor& output, at::Tensor& input, const c10d::ReduceScatterOptions& options) override;
  c10::intrusive_ptr<c10d::Work> reduce_scatter_tensor_coalesced(std::vector<at::Tensor>& outputs, std::vector<at::Tensor>& inputs,
                                                                 const c10d::ReduceScatterOptions& options) override;
  c10::intrusive_ptr<c10d::Work> alltoall_base(at::Tensor& output, at::Tensor& input, std::vector<int64_t>& output_splits, std::vector<int64_t>& input_splits,
                                               const c10d::AllToAllOptions& options) override;
  c10::intrusive_ptr<c10d::Work> alltoall(std::vector<at::Tensor>& outputs, std::vector<at::Tensor>& inputs, const c10d::AllToAllOptions& options) override;
  c10::intrusive_ptr<c10d::Work> send(std::vector<at::Tensor>& tensors, int destination, int tag) override;
  c10::intrusive_ptr<c10d::Work> recv(std::vector<at::Tensor>& tensors, int source, int tag) override;
  c10::intrusive_ptr<c10d::Work> recvAnysource(std::vector<at::Tensor>& tensors, int tag) override;
  c10::intrusive_ptr<c10d::Work> barrier(const c10d::BarrierOptions& options) override;
  void monitoredBarrier(const c10d::BarrierOptions& options, bool wait_all_ranks) override;

 private:
  struct Call {  // what all operations have in common
    c10d::OpType type = c10d::OpType::UNKNOWN;
    const char* title = nullptr;  // for the profiler
    std::string text;             // for errors
    std::chrono::milliseconds timeout{};
    bool blocking = false;
    int root = -1;  // of one that has a root
  };

  c10::intrusive_ptr<c10d::Work> run(const Call& call, std::shared_ptr<transport::Operation> operation, std::vector<at::Tensor> inputs,
                                     std::vector<at::Tensor> outputs, Tensors tensors);
  c10::intrusive_ptr<c10d::Work> exchange(const Call& call, std::vector<transport::Memory> outgoing, std::vector<transport::Memory> incoming,
                                          std::vector<bool> wanted, std::vector<at::Tensor> inputs, std::vector<at::Tensor> outputs, Tensors tensors);
  std::shared_ptr<transport::Operation> spanning_exchange(const Call& call, std::vector<transport::Memory> outgoing, std::vector<transport::Memory> incoming,
                                                          std::vector<bool> wanted) const;
  c10::intrusive_ptr<c10d::Work> reduce_scatter(const Call& call, std::vector<transport::Memory> parts, const transport::Memory& result, at::ScalarType dtype,
                                                const c10d::ReduceOp& reduce, std::vector<at::Tensor> inputs, std::vector<at::Tensor> outputs, Tensors tensors);
  void take(std::shared_ptr<transport::Runner> runner);
  c10::intrusive_ptr<c10d::Work> all_reduce(const Call& call, std::vector<at::Tensor>& tensors, const c10d::ReduceOp& reduce);
  c10::intrusive_ptr<c10d::Work> message(std::vector<at::Tensor>& tensors, int peer, int tag, c10d::OpType type);
  std::vector<at::Tensor> gather_uneven(const at::Tensor& input, const std::vector<int64_t>& rows, std::chrono::milliseconds timeout);

  std::shared_ptr<transport::Group> group_;  // of the ranks of this host
  std::shared_ptr<transport::SpanningGroup> spanning_;
  std::shared_ptr<transport::Runner> runner_;  // what collectives are given to, one of the two; null: the fallback
  transport::Hosts hosts_;
  std::string why_not_;
  bool one_host_ = false;
  c10::intrusive_ptr<Options> options_;
  c10::intrusive_ptr<c10d::Backend> fallback_;
  std::string profiler_name_ = "soap:";
  uint64_t num_monitored_ = 0;
};

// Leaves all groups of this process. To be called before the interpreter ends: no thread of ours may need it afterwards.
void leave_all_groups();

}  // namespace soap::backend
