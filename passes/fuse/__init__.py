"""passes/fuse"""
