"""The method, in the paper's words: prompts, adapters, transport, gating, causal, readout."""
