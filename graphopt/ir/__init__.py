"""graphopt/ir"""
