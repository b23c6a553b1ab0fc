"""Where a model, its configuration and its quantization come from, and the checks of what comes from outside."""
