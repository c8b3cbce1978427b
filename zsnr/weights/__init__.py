"""Where weights lie, and how untrusted files of them are read."""
