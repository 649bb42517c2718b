"""Sources, cache, student, distillation, evaluation and tracking: data flows one way through them."""
