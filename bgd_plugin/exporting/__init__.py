"""Export: a compressed network as one small file of another runtime, checked in that runtime."""
