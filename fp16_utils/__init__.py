"""Mixed-precision helpers with the interface of apex.fp16_utils."""
