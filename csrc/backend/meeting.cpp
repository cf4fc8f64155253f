#include "backend/meeting.h"

#include <c10/util/Exception.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <random>
#include <set>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>

#include "fmt/format.h"
#include "fmt/ranges.h"
#include "transport/spanning.h"
#include "transport/tcp_wire.h"

namespace soap::backend {
namespace {

using transport::Layout;
using transport::ProcessIdentity;
using transport::Segment;

constexpr const char* kVersion = "3";  // of the segment's layout and of messages between hosts: ranks that differ use gloo

std::string text(const std::vector<uint8_t>& value) {
  return std::string(value.begin(), value.end());
}

std::vector<std::string> keys_of(const char* kind, int num_ranks) {
  std::vector<std::string> out;
  for (int r = 0; r < num_ranks; ++r) out.push_back(fmt::format("{}/{}", kind, r));
  return out;
}

// The values of all ranks; names those that don't come.
std::vector<std::string> gather(c10d::Store& store, const char* kind, int num_ranks, std::chrono::milliseconds timeout) {
  const std::vector<std::string> keys = keys_of(kind, num_ranks);
  try {
    store.wait(keys, timeout);
  } catch (const std::exception& error) {
    std::vector<int> absent;
    for (int r = 0; r < num_ranks; ++r) {
      if (!store.check({keys[r]})) absent.push_back(r);
    }
    if (absent.empty()) throw;
    C10_THROW_ERROR(DistBackendError, fmt::format("[soap] making a process group of {} ranks: of them {} did not come within {} s", num_ranks,
                                                  fmt::join(absent, ", "), std::chrono::duration<double>(timeout).count()));
  }
  std::vector<std::string> out;
  for (const std::string& key : keys) out.push_back(text(store.get(key)));
  return out;
}

std::string random_name() {
  std::random_device random;
  return fmt::format("/torch_soap.{}.{:08x}{:08x}", getpid(), random(), random());
}

// What was left in the store is taken away by the last rank that has read it, so that a later group with this name and store doesn't find it.
void clear(c10d::Store& store, const std::vector<const char*>& kinds, int num_ranks) {
  if (store.add("read", 1) != num_ranks) return;
  for (const char* kind : kinds) {
    for (const std::string& key : keys_of(kind, num_ranks)) store.deleteKey(key);
  }
  store.deleteKey("segment");
  store.deleteKey("read");
}

// Collective over ranks of one host: a segment of their own, or why there is none.
std::unique_ptr<Segment> share_segment(c10d::Store& store, int rank, int num_ranks, std::chrono::milliseconds timeout, std::string& why_not) {
  const Layout layout = transport::layout_for(num_ranks);
  if (num_ranks == 1) return Segment::anonymous(layout);
  std::string name, mine;  // `mine`: what this rank could not do
  std::unique_ptr<Segment> segment;
  try {
    if (rank == 0) {
      name = random_name();
      try {
        segment = Segment::create(name, layout);
        store.set("segment", name);
      } catch (const std::exception& error) {
        mine = error.what();
        store.set("segment", "");
      }
    } else {
      store.wait({"segment"}, timeout);
      name = text(store.get("segment"));
      try {
        if (!name.empty()) segment = Segment::open(name, layout);
      } catch (const std::exception& error) {
        mine = error.what();
      }
    }
    if (segment != nullptr && segment->num_attached().fetch_add(1) + 1 == static_cast<uint64_t>(num_ranks)) Segment::unlink(name);
    store.set(fmt::format("attached/{}", rank), mine);
    for (const std::string& reason : gather(store, "attached", num_ranks, timeout)) {
      if (why_not.empty()) why_not = reason;
    }
  } catch (...) {
    if (rank == 0 && !name.empty()) Segment::unlink(name);
    throw;
  }
  if (why_not.empty()) return segment;
  if (rank == 0 && !name.empty()) Segment::unlink(name);
  return nullptr;
}

std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

// To be reached by other hosts, or why that can't be.
std::unique_ptr<transport::Listener> listen(int num_ranks, std::string& why_not) {
  if (variable("GLOO_DEVICE_TRANSPORT") == "TCP_TLS") {
    why_not = "GLOO_DEVICE_TRANSPORT asks for TLS between hosts, which gloo has";
    return nullptr;
  }
  try {
    return std::make_unique<transport::Listener>(transport::own_address(variable("GLOO_SOCKET_IFNAME"), variable("MASTER_ADDR")), num_ranks);
  } catch (const transport::TransportError& error) {
    why_not = error.what();
    return nullptr;
  }
}

}  // namespace

Meeting meet(const c10::intrusive_ptr<c10d::Store>& store, int rank, int num_ranks, std::chrono::milliseconds timeout, const std::string& host) {
  Meeting out;
  const ProcessIdentity self = transport::this_process(host);
  if (num_ranks == 1) {
    out.segment = Segment::anonymous(transport::layout_for(1));
    out.processes = {self};
    out.hosts = {self.host};
    out.one_host = true;
    return out;
  }
  store->set(fmt::format("process/{}", rank), fmt::format("{} {}", kVersion, to_text(self)));
  std::set<std::string> versions;
  for (const std::string& line : gather(*store, "process", num_ranks, timeout)) {
    const std::size_t space = line.find(' ');
    versions.insert(line.substr(0, space));
    out.processes.push_back(transport::process_from_text(line.substr(space + 1)));
    out.hosts.push_back(out.processes.back().host);
  }
  const std::vector<const char*> kinds{"process", "attached", "ready", "contact"};
  if (versions.size() > 1) {
    out.why_not = "its ranks have different versions of torch_soap";
    clear(*store, kinds, num_ranks);
    return out;
  }
  const transport::Hosts hosts = transport::Hosts::of(out.hosts);
  out.one_host = hosts.num_hosts() == 1;
  if (out.one_host) {
    out.segment = share_segment(*store, rank, num_ranks, timeout, out.why_not);
    clear(*store, kinds, num_ranks);
    return out;
  }
  const int own = hosts.host[rank], num_local = static_cast<int>(hosts.ranks[own].size());
  const auto of_host = c10::make_intrusive<c10d::PrefixStore>(fmt::format("host/{}", own), store);
  std::string mine;
  out.segment = share_segment(*of_host, hosts.place[rank], num_local, timeout, mine);
  clear(*of_host, {"attached"}, num_local);
  if (mine.empty()) out.listener = listen(num_ranks, mine);
  store->set(fmt::format("ready/{}", rank), mine);
  store->set(fmt::format("contact/{}", rank), out.listener == nullptr ? "" : out.listener->contact());
  for (const std::string& reason : gather(*store, "ready", num_ranks, timeout)) {
    if (out.why_not.empty()) out.why_not = reason;
  }
  out.contacts = gather(*store, "contact", num_ranks, timeout);
  for (const int r : hosts.ranks[own]) out.contacts[r].clear();
  if (!out.why_not.empty()) out.segment = nullptr;
  clear(*store, kinds, num_ranks);
  return out;
}

std::unique_ptr<transport::Wire> connect(const Meeting& meeting, int rank, std::chrono::milliseconds timeout) {
  try {
    return std::make_unique<transport::TcpWire>(meeting.listener->connect(rank, meeting.contacts, transport::Clock::now() + timeout));
  } catch (const transport::TransportError& error) {
    const std::string what = error.what();
    C10_THROW_ERROR(DistBackendError, what);
  }
}

}  // namespace soap::backend
