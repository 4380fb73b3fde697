"""What needs no clock: that every kernel compiles as people launch it, and that it is clean under a sanitizer."""
