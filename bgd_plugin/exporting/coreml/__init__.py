"""Core ML packages, iOS 18 and later: weights as look-up tables, which Apple's runtimes support."""
