"""passes/cache"""
