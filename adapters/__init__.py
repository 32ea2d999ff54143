"""What is patched or subclassed in the host libraries, and when their own code runs instead."""
