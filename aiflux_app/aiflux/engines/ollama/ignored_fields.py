"""Fields of a body that Ollama's OpenAI API accepts but ignores."""

from __future__ import annotations

from aiflux.core.batch.ignored_fields import FieldRule

# Fields ignored by the OpenAI API of Ollama 0.33, and the effect.
IGNORED_FIELDS = {
    "n": FieldRule("each gets one answer", (1,)),
    "tool_choice": FieldRule("the model decides whether it calls a tool", ("auto",)),
    "logit_bias": FieldRule("tokens keep their probabilities"),
    "top_k": FieldRule("the model's own value is used"),
    "user": FieldRule("it has no effect"),
}
