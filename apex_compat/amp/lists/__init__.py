"""Lists the functions that O1 casts, by the module where they are patched."""
