"""The wire: bytes to packets and back. No I/O, no clock, no Django."""
