// Messages of a group whose ranks all share memory; gloo has the others.
#include "backend/checks.h"
#include "backend/soap_backend.h"
#include "fmt/format.h"

namespace soap::backend {

using c10d::OpType;
using WorkPtr = c10::intrusive_ptr<c10d::Work>;
using TensorList = std::vector<at::Tensor>;

WorkPtr SoapBackend::message(TensorList& tensors, int peer, int tag, OpType type) {
  const bool sends = type == OpType::SEND;
  const char* name = sends ? "send" : "recv";
  const at::Tensor& tensor = only(name, tensors);
  if (type != OpType::RECVANYSOURCE && (peer < 0 || peer >= size_)) invalid(name)(fmt::format("rank {} is not one of {}", peer, size_));
  Tensors held;
  auto operation = std::make_shared<transport::Message>();
  operation->memory = sends ? held.input(tensor) : held.output(tensor);
  operation->peer = type == OpType::RECVANYSOURCE ? -1 : peer;
  operation->tag = tag;
  operation->call = type == OpType::RECVANYSOURCE ? fmt::format("recv(from any rank, tag {})", tag)
                                                  : fmt::format("{}({} rank {}, tag {})", name, sends ? "to" : "from", peer, tag);
  const std::string title = profiler_name_ + (type == OpType::RECVANYSOURCE ? "recvAnySource" : name);
  auto work = c10::make_intrusive<SoapWork>(group_, rank_, type, 0, title.c_str(), tensors, sends ? TensorList{} : tensors, std::move(held));
  work->attach(operation);
  if (sends) {
    group_->send(std::move(operation), {});
  } else {
    group_->receive(std::move(operation), {});
  }
  return work;
}

WorkPtr SoapBackend::send(TensorList& tensors, int destination, int tag) {
  if (!shares_memory()) return fallback_->send(tensors, destination, tag);
  return message(tensors, destination, tag, OpType::SEND);
}

WorkPtr SoapBackend::recv(TensorList& tensors, int source, int tag) {
  if (!shares_memory()) return fallback_->recv(tensors, source, tag);
  return message(tensors, source, tag, OpType::RECV);
}

WorkPtr SoapBackend::recvAnysource(TensorList& tensors, int tag) {
  if (!shares_memory()) return fallback_->recvAnysource(tensors, tag);
  return message(tensors, -1, tag, OpType::RECVANYSOURCE);
}

}  // namespace soap::backend
