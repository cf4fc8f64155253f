#include "program/item_flows.h"

#include "base/error.h"

namespace soap {

Flows item_flows(const Program& p, StepKind kind, const StepItem& item) {
  const CopyGroup& g = p.groups.at(item.id);
  const bool collectives = g.via == Via::kAuto;
  return kind == StepKind::kGradFill ? grad_flows(p.tiles[g.tensor], g.copies, item.chunk, collectives)
                                     : fill_flows(p.tiles[g.tensor], g.copies, item.chunk, collectives);
}

std::vector<Piece> item_pieces(const Program& p, StepKind kind, const StepItem& item) {
  const CopyGroup& g = p.groups.at(item.id);
  if (kind == StepKind::kGradFill) return grad_pieces(p.tiles[g.tensor], g.copies, item.chunk);
  SOAP_CHECK(kind == StepKind::kFill || kind == StepKind::kRefill, "[program] step {} moves nothing", to_string(kind));
  return fill_pieces(p.tiles[g.tensor], g.copies, item.chunk);
}

Movement item_movement(const Program& p, StepKind kind, const StepItem& item, const std::vector<Piece>& pieces) {
  const CopyGroup& g = p.groups.at(item.id);
  const bool collectives = g.via == Via::kAuto;
  if (kind == StepKind::kGradFill) return recognise(pieces, g.copies, p.tiles[g.tensor], collectives ? Reduce::kSum : Reduce::kNone);
  return recognise(pieces, p.tiles[g.tensor], g.copies, collectives ? p.tiles[g.tensor].partial : Reduce::kNone);
}

}  // namespace soap
