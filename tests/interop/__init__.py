"""Programs of other projects, from Debian's packages, at our server; and our ends at the C gearmand."""
