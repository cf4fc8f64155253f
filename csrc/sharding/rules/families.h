// The families of operators that have rules, one file each.
#pragma once

#include "sharding/expand.h"
#include "sharding/rule.h"

namespace soap {

void register_pointwise(RuleRegistry& rules);
void register_matmul(RuleRegistry& rules);
void register_view(RuleRegistry& rules);
void register_move(RuleRegistry& rules);
void register_conv(RuleRegistry& rules);
void register_embedding(RuleRegistry& rules);
void register_reduce(RuleRegistry& rules, ExpansionRegistry& expansions);
void register_norm(RuleRegistry& rules, ExpansionRegistry& expansions);
void register_attention(RuleRegistry& rules, ExpansionRegistry& expansions);
void register_loss(RuleRegistry& rules, ExpansionRegistry& expansions);
void register_rnn(RuleRegistry& rules, ExpansionRegistry& expansions);
void register_indexing(RuleRegistry& rules);
void register_opaque(RuleRegistry& rules);
void register_random(RuleRegistry& rules);

}  // namespace soap
