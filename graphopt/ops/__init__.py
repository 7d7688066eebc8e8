"""graphopt/ops"""
