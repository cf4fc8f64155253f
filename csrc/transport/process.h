// Who shares a host, and who is still alive.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace soap::transport {

// What a process tells the others of a group about itself, as one line of text.
struct ProcessIdentity {
  std::string host;           // boot id and the shared-memory file system: equal for two processes that can share memory through it
  std::string kernel;         // boot id: equal for two processes that share cores, in containers of their own too
  std::string pid_namespace;  // pids of two processes can be compared where it is equal
  int64_t pid = 0;
  uint64_t start_ticks = 0;  // when the process began: another process with a pid that is used again differs in it
  std::vector<int> cores;    // that it may run on

  bool operator==(const ProcessIdentity&) const = default;
};

// Of the calling process. `host`, unless empty, stands for what would be found (for tests: two "hosts" on one machine).
ProcessIdentity this_process(const std::string& host);

std::string to_text(const ProcessIdentity& identity);
// Throws std::invalid_argument for a text that to_text didn't write.
ProcessIdentity process_from_text(const std::string& text);

// Whether the process is known to have ended, a zombie included. False where it can't be known (another pid namespace).
bool has_ended(const ProcessIdentity& other, const ProcessIdentity& self);

// Counts the forks between the loading of this library and the calling process: equal to an earlier value unless the caller is a forked child.
uint64_t fork_generation();

}  // namespace soap::transport
