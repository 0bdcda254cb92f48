"""Loss configs, items, kwargs and contexts: functional, head and calibration joined in the order of the paper."""
