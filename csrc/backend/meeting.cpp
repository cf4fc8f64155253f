#include "backend/meeting.h"

#include <c10/util/Exception.h>
#include <unistd.h>

#include <chrono>
#include <random>
#include <set>

#include "fmt/format.h"
#include "fmt/ranges.h"

namespace soap::backend {
namespace {

using transport::Layout;
using transport::ProcessIdentity;
using transport::Segment;

constexpr const char* kVersion = "1";  // of the segment's layout: ranks that differ don't share memory

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
void clear(c10d::Store& store, int num_ranks) {
  if (store.add("read", 1) != num_ranks) return;
  std::vector<std::string> keys = keys_of("process", num_ranks);
  for (const std::string& key : keys_of("attached", num_ranks)) keys.push_back(key);
  keys.push_back("segment");
  keys.push_back("read");
  for (const std::string& key : keys) store.deleteKey(key);
}

}  // namespace

Meeting meet(c10d::Store& store, int rank, int num_ranks, std::chrono::milliseconds timeout, const std::string& host) {
  Meeting out;
  const ProcessIdentity self = transport::this_process(host);
  if (num_ranks == 1) {
    out.segment = Segment::anonymous(transport::layout_for(1));
    out.processes = {self};
    out.one_host = true;
    return out;
  }
  store.set(fmt::format("process/{}", rank), fmt::format("{} {}", kVersion, to_text(self)));
  std::set<std::string> hosts;
  for (const std::string& line : gather(store, "process", num_ranks, timeout)) {
    const std::size_t space = line.find(' ');
    out.processes.push_back(transport::process_from_text(line.substr(space + 1)));
    hosts.insert(line.substr(0, space) + " " + out.processes.back().host);
  }
  out.one_host = hosts.size() == 1;
  if (!out.one_host) {
    out.why_not = fmt::format("its ranks are on {} hosts", hosts.size());
    clear(store, num_ranks);
    return out;
  }

  const Layout layout = transport::layout_for(num_ranks);
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
      if (out.why_not.empty()) out.why_not = reason;
    }
  } catch (...) {
    if (rank == 0 && !name.empty()) Segment::unlink(name);
    throw;
  }
  if (out.why_not.empty()) {
    out.segment = std::move(segment);
  } else if (rank == 0 && !name.empty()) {
    Segment::unlink(name);
  }
  clear(store, num_ranks);
  return out;
}

}  // namespace soap::backend
