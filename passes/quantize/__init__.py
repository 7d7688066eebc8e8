"""passes/quantize"""
