// Messages between two ranks, through a ring of bytes per ordered pair.
#pragma once

#include <deque>
#include <list>
#include <memory>
#include <optional>
#include <vector>

#include "transport/operation.h"

namespace soap::transport {

using MessagePtr = std::shared_ptr<Message>;

// All sends and receives of one rank. Not thread-safe: the group's lock guards it.
//
// A send is written into the ring as there is room, and is done when all of it is in the ring; a receive takes the first message from its source with its tag.
// A message for which there is no receive yet stays in the ring, unless a receive with another tag waits behind it: then
// it is put aside.
class Messages {
 public:
  Messages(Segment& segment, int rank);

  void send(MessagePtr message);
  void receive(MessagePtr message);
  // Withdraws a receive that nothing has come for. Returns whether it was there.
  bool withdraw(const MessagePtr& message);

  // Moves what can be moved without waiting; ended operations go to `ended`. Returns whether anything moved.
  bool advance(std::vector<std::shared_ptr<Operation>>& ended);

  bool empty() const { return num_pending_ == 0; }
  // Those pending, in no order.
  std::vector<MessagePtr> pending() const;
  // Takes out those for which `failed(message)` gives an error, and sets it.
  void fail(const std::function<std::exception_ptr(const Message&)>& failed, std::vector<std::shared_ptr<Operation>>& ended);

 private:
  struct Aside {
    int tag = 0;
    std::vector<std::byte> data;
    bool whole = false;
  };
  struct Incoming {  // the message that is being read from a source
    bool active = false;
    int tag = 0;
    uint64_t num_bytes = 0;
    uint64_t num_read = 0;
    MessagePtr target;  // none: put aside, or dropped where it doesn't fit
    Aside* aside = nullptr;
  };

  bool write(int destination, std::vector<std::shared_ptr<Operation>>& ended);
  bool read(int source, std::vector<std::shared_ptr<Operation>>& ended);
  bool begin_message(int source, std::vector<std::shared_ptr<Operation>>& ended);
  bool take_aside(std::vector<std::shared_ptr<Operation>>& ended);
  void end(const MessagePtr& message, std::vector<std::shared_ptr<Operation>>& ended);

  Segment& segment_;
  const int rank_;
  std::vector<std::deque<MessagePtr>> sends_;  // by destination
  std::list<MessagePtr> receives_;             // in the order in which they were posted
  std::vector<Incoming> incoming_;             // by source
  std::vector<std::list<Aside>> aside_;        // by source
  std::vector<bool> reserved_;                 // rings to others
  std::size_t num_pending_ = 0;
};

}  // namespace soap::transport
