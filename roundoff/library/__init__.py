"""The calls of the library, which put its floors together: `probe`, and `compare`."""
